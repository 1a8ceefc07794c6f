"""A query photo as the store's photos are: resized, stored as JPEG, cropped; and what happens to its surroundings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from recipe_lib.data.images import ImageError, centre_crop, decode_jpeg, read_image, to_jpeg

SMALLEST = 16  # shorter side in pixels, below which a photo shows no dish


def read_photo(photo: Path | bytes, config: Mapping, crop: int, name: str = "") -> np.ndarray:
    """Any photo -> (crop, crop, 3) uint8, the pixels that an evaluation would see of it.

    Args:
        photo: a file, or its bytes, of any kind that `read_image` takes.
        config: of the store's card: image_size, image_filter, jpeg_quality.
        crop: side of the square that the network sees.
        name: what errors call it.

    Raises:
        ImageError: not such a photo, or one of fewer than SMALLEST pixels.
    """
    image = read_image(photo, name=name)
    if min(image.size) < SMALLEST:
        size = "{} x {}".format(*image.size)
        raise ImageError(f"{name or photo}: {size} pixels is too small to show a dish; give a larger photo")
    # A stored photo is a JPEG, and what JPEG loses is part of what the system has learnt.
    jpeg = to_jpeg(image, config["image_size"], resample=config["image_filter"], quality=config["jpeg_quality"])
    return stored_photo(jpeg, crop)


def stored_photo(jpeg: bytes, crop: int) -> np.ndarray:
    """A photo of the store -> (crop, crop, 3) uint8."""
    return np.asarray(centre_crop(decode_jpeg(jpeg), crop))


def other_surroundings(pixels: np.ndarray, radius: float, other: np.ndarray | None = None) -> np.ndarray:
    """A photo (S, S, 3) uint8 whose surroundings are hidden, or those of another photo.

    Args:
        radius: of the disc round the centre that stays, as a share of S.
        other: (S, S, 3) uint8; None: the mean colour of the surroundings takes their place.
    """
    y, x = np.mgrid[: len(pixels), : len(pixels)] + 0.5 - len(pixels) / 2
    outside = np.hypot(x, y) > radius * len(pixels)
    changed = pixels.copy()
    if outside.any():
        changed[outside] = pixels[outside].mean(0).round() if other is None else other[outside]
    return changed
