"""Encoded images as pixels: opened, RGB, centre-cropped, as tensors.

Shapes: `N` images, `S` pixels per side, `H W` pixels.
"""

from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..files import check_file, reading


# What is opened, whatever a file is called: Pillow also knows formats that start other programs, such as EPS. TGA has
# no signature and is tried last.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
# A camera's largest, and what fits in memory several times over.
MAX_PIXELS = 2**27
MAX_IMAGE_BYTES = 2**30
# Modes that Pillow converts to RGB without a colour profile or a range that the file does not state.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I", "I;16", "I;16B", "I;16L", "I;16N")


@cache
def image_formats() -> tuple[str, ...]:
    """Those of `IMAGE_FORMATS` that this version of Pillow decodes."""
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def open_image(file: str | Path | BinaryIO) -> Image.Image:
    """
    Opens and decodes an image. Its content tells the format, one of `IMAGE_FORMATS`; of an animation it is the first
    frame.

    Args:
        file (`str`, `Path` or `BinaryIO`): The image.

    Returns:
        `PIL.Image.Image`: in the file's own mode.

    Raises:
        ValueError: if it is of another format, damaged, of more than `MAX_PIXELS`, or no regular file.
    """
    name = "the image"
    if isinstance(file, (str, Path)):
        name = str(check_file(file, MAX_IMAGE_BYTES))
    try:
        with reading(name, "an image"):
            image = Image.open(file, formats=image_formats())
            check_pixels(name, *image.size)  # before they are decoded
            image.load()
    except ValueError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise ValueError(
                f"{name} is not a supported image ({', '.join(image_formats())}) or is damaged."
            ) from error
        raise
    return image


def check_pixels(name: str, width: int, height: int) -> None:
    """`ValueError` for an image that is too large, before it takes memory."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} has {width:,} × {height:,} pixels; at most {MAX_PIXELS:,} in all are decoded.")


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Converts an image of any mode to RGB as a viewer shows it.

    Args:
        image (`PIL.Image.Image`):
            Of 8 or 16 bits per channel. Its EXIF orientation is applied; transparent pixels become white.

    Returns:
        `PIL.Image.Image`: RGB.

    Raises:
        ValueError: if it is of another mode, such as floating point, whose range of values is not known.
    """
    if image.mode not in MODES:
        raise ValueError(
            f"The image has mode {image.mode}, which is not read; save it as RGB or greyscale of 8 or 16 bits."
        )
    with reading("the image", "RGB"):  # EXIF and palettes of damaged files raise all kinds
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = eight_bits(image)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits per pixel, which Pillow would clip, as greyscale; its transparent grey becomes white."""
    pixels = np.asarray(image)
    if image.mode == "I" and not 0 <= pixels.min() <= pixels.max() < 2**16:
        raise ValueError(f"values from {pixels.min()} to {pixels.max()} exceed 16 bits; save it with 8 or 16 bits")
    grey = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    grey[pixels == image.info.get("transparency")] = 255
    return Image.fromarray(grey)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """
    The crop of ADM and DiT: halve with a box filter while possible, resize the short side, crop the centre.

    Args:
        image (`PIL.Image.Image`): Any size and mode, as for [`to_rgb`].
        size (`int`): Pixels per side of the result.

    Returns:
        `PIL.Image.Image`: RGB, `size` × `size`.

    Raises:
        ValueError: if its sides differ by so much that it would have more than `MAX_PIXELS` once resized.
    """
    image = to_rgb(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    check_pixels(
        f"An image of {image.width} × {image.height} pixels, resized to a short side of {size},", width, height
    )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """
    Converts an image to a tensor.

    Args:
        image (`PIL.Image.Image`): RGB.

    Returns:
        `torch.Tensor` of shape `(3, H, W)`, uint8.
    """
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def normalize_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """
    8-bit pixels to the range that autoencoders and extractors take.

    Args:
        pixels (`torch.Tensor`): uint8, any shape.

    Returns:
        `torch.Tensor`: float32 in [-1, 1], same shape.
    """
    return pixels.float() / 127.5 - 1.0
