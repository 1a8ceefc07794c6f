"""Counterfactual context: a dish keeps its place and gets the surroundings of another photo.

Where the surroundings of a training photo are drawn at random, they say nothing of its recipe any more: do(context) by
construction, without a word on what the context is. What belongs to the dish is taken to be a disc about the centre, or
the parts that are stored of the photo (`Split.foreground`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """What a square crop shows of a photo: pixels above and left of it, how many more there are, mirrored or not."""

    top: int
    left: int
    spare_height: int
    spare_width: int
    flip: bool


def discs(count: int, side: int, radius: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """(count, side, side) bool: discs about the centre, of radii drawn between two shares of the side."""
    away = np.hypot(*(np.mgrid[:side, :side] + 0.5 - side / 2)) / side
    return away < rng.uniform(*radius, count)[:, None, None]


def stored_dish(masks: np.ndarray, windows: Sequence[Window], otherwise: np.ndarray) -> np.ndarray:
    """Where the dish is in some crops, by the masks that are stored of the whole photos.

    Shape:
        masks (B, cells) uint8, bits of square masks; otherwise (B, S, S) bool, for photos without any -> (B, S, S).
    """
    dish, side = otherwise.copy(), otherwise.shape[1]
    grid = int((8 * masks.shape[1]) ** 0.5)
    for i, (bits, window) in enumerate(zip(masks, windows, strict=True)):
        if bits.any():
            y = (np.arange(side) + window.top + 0.5) / (side + window.spare_height)
            x = (np.arange(side) + window.left + 0.5) / (side + window.spare_width)
            mask = np.unpackbits(bits).reshape(grid, grid).astype(bool)
            dish[i] = mask[np.ix_((y * grid).astype(int), (x * grid).astype(int))]
            if window.flip:
                dish[i] = dish[i, :, ::-1]
    return dish


def swap_context(images: np.ndarray, dish: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Give a share of the photos of a batch, drawn at random, the surroundings of other photos of it.

    Shape:
        images (B, H, W, 3) uint8; dish (B, H, W) bool, what stays -> (B, H, W, 3). No photo lends to itself.
    """
    chosen, order = rng.random(len(images)) < share, rng.permutation(len(images))
    lender = np.empty_like(order)
    lender[order] = np.roll(order, 1)  # once round a random cycle: none keeps its own
    return np.where((dish | ~chosen[:, None, None])[..., None], images, images[lender])
