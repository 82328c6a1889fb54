"""One picture to uint8 (C, H, W)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from robudget.errors import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


def shape_of(where: str, picture: Any, image_size: int | None) -> tuple[int, int, int]:
    """(channels, height, width) that the first picture sets for all: its own, or the size that is asked for.

    Grey pictures stay at one channel; everything else is RGB.
    """
    if isinstance(picture, np.ndarray):
        c, h, w = picture.shape
        if image_size is not None and (h, w) != (image_size, image_size):
            raise InputError(f"data.image_size = {image_size}: {where} is stored as {h}×{w} pixels")
        return c, h, w
    image = _open(where, picture)
    channels = 1 if image.mode in ("1", "L", "I;16") else 3
    return (channels, image_size, image_size) if image_size else (channels, image.height, image.width)


def decode(where: str, picture: Any, shape: tuple[int, int, int], *, resize: bool) -> NDArray[np.uint8]:
    """uint8 of `shape`. With `resize` the shorter side is scaled and the centre cut out; else the size must match.

    Raises InputError naming `where` for a picture that can't be decoded.
    """
    if isinstance(picture, np.ndarray):
        if picture.shape != shape or picture.dtype != np.uint8:
            raise InputError(f"{where} is {picture.dtype} {picture.shape} (allowed: uint8 {shape})")
        return picture
    channels, height, width = shape
    try:
        image = _open(where, picture).convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"corrupt image {where}: {error}") from None
    if resize and (image.height, image.width) != (height, width):
        scale = max(height / image.height, width / image.width)
        size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    if (image.height, image.width) != (height, width):
        raise InputError(
            f"image {where} has {image.height}×{image.width} pixels, the first one {height}×{width} "
            "(set data.image_size to scale them all)"
        )
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _open(where: str, picture: Any) -> Image.Image:
    try:
        return Image.open(picture if isinstance(picture, Path) else io.BytesIO(picture))
    except UnidentifiedImageError:
        raise InputError(f"corrupt image {where}: not a picture that can be read") from None
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise InputError(f"corrupt image {where}: {error}") from None
