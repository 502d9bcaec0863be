"""A grid of images with the names of their classes."""

from PIL import Image, ImageDraw, ImageFont


LABEL_WIDTH = 104
GAP = 4


def grid_size(rows: int, columns: int, width: int, height: int) -> tuple[int, int]:
    """Width and height of a grid of images of a size."""
    return LABEL_WIDTH + columns * (width + GAP), rows * (height + GAP)


def labelled_grid(rows: list[list[Image.Image]], names: list[str]) -> Image.Image:
    """
    One row a class on white, its name on the left.

    Args:
        rows (`list[list[PIL.Image.Image]]`): Images of one size, equally many in each row.
        names (`list[str]`): A name for each row; of synonyms separated by commas the first is shown.

    Returns:
        `PIL.Image.Image`: RGB.
    """
    width, height = rows[0][0].size
    canvas = Image.new("RGB", grid_size(len(rows), len(rows[0]), width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=16)
    for index, (images, name) in enumerate(zip(rows, names, strict=True)):
        top = index * (height + GAP)
        draw.text((GAP, top + height // 2), name.split(",")[0][:14], fill="black", anchor="lm", font=font)
        for column, image in enumerate(images):
            canvas.paste(image, (LABEL_WIDTH + column * (width + GAP), top))
    return canvas
