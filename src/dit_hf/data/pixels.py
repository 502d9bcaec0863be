"""Decoded images as pixels: RGB, centre-cropped, as tensors.

Shapes: `N` images, `S` pixels per side, `H W` pixels.
"""

import numpy as np
import torch
from PIL import Image, ImageOps


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Converts an image of any mode to RGB as a viewer shows it.

    Args:
        image (`PIL.Image.Image`): Any mode. Its EXIF orientation is applied; transparent pixels become white.

    Returns:
        `PIL.Image.Image`: RGB.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """
    The crop of ADM and DiT: halve with a box filter while possible, resize the short side, crop the centre.

    Args:
        image (`PIL.Image.Image`): Any size and mode, as for [`to_rgb`].
        size (`int`): Pixels per side of the result.

    Returns:
        `PIL.Image.Image`: RGB, `size` × `size`.
    """
    image = to_rgb(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
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
