"""A grid of images with the names of their classes."""

from PIL import Image, ImageDraw, ImageFont


COLUMNS = 10
GAP = 8
CAPTION_WIDTH, CAPTION_LINES, LINE_HEIGHT = 96, 2, 14


def cell_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of a grid cell: an image of a size, its caption, and the gap to the next cell."""
    return max(width, CAPTION_WIDTH) + GAP, height + CAPTION_LINES * LINE_HEIGHT + GAP


def grid_size(count: int, columns: int, width: int, height: int) -> tuple[int, int]:
    """Width and height of a grid of `count` images of a size."""
    cell_width, cell_height = cell_size(width, height)
    return GAP + min(columns, count) * cell_width, GAP + -(-count // columns) * cell_height


def labelled_grid(images: list[Image.Image], names: list[str], columns: int = COLUMNS) -> Image.Image:
    """
    Images on white, row by row, each with its name below.

    Args:
        images (`list[PIL.Image.Image]`): Of one size.
        names (`list[str]`): One per image; of synonyms separated by commas the first is shown.
        columns (`int`, defaults to 10): Images per row.

    Returns:
        `PIL.Image.Image`: RGB.
    """
    width, height = images[0].size
    canvas = Image.new("RGB", grid_size(len(images), columns, width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=12)
    cell_width, cell_height = cell_size(width, height)
    for index, (image, name) in enumerate(zip(images, names, strict=True)):
        left, top = GAP + index % columns * cell_width, GAP + index // columns * cell_height
        canvas.paste(image, (left + (cell_width - GAP - width) // 2, top))
        for line, text in enumerate(caption_lines(name.split(",")[0], font, cell_width - GAP)):
            place = left + (cell_width - GAP) // 2, top + height + line * LINE_HEIGHT
            draw.text(place, text, fill="black", anchor="ma", font=font)
    return canvas


def caption_lines(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """A name in at most two lines of a width in pixels, shortened if it is longer."""
    lines = [""]
    for word in name.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width and len(lines) < CAPTION_LINES:
            lines.append(word)
        else:
            lines[-1] = longer
    return [shortened(line, font, width) for line in lines]


def shortened(line, font, width):
    """The line, or as much of it as fits, with an ellipsis."""
    text = line = line[:width]  # no letter is narrower than a pixel
    while text and font.getlength(text) > width:
        line = line[:-1]
        text = f"{line}…" if line else ""
    return text
