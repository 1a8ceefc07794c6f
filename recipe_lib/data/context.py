"""Counterfactual context: a dish keeps its place and gets the surroundings of another photo.

Where the surroundings of a training photo are drawn at random, they say nothing of its recipe any more: do(context) by
construction, without a word on what the context is. What belongs to the dish is taken to be a disc about the centre, or
the mask that is stored with the segments of the photo (`Split.foreground`). Where a dish that lends is the larger one,
its rim shows about the other: surroundings are swapped as they are, nothing is painted in.
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


def swap_context(
    images: np.ndarray,
    dish: np.ndarray,
    share: float,
    rng: np.random.Generator,
    strata: np.ndarray | None = None,
) -> np.ndarray:
    """Give a share of the photos of a batch, drawn at random, the surroundings of other photos of it.

    Args:
        strata: of each photo, which lends within its own alone: surroundings then say what they said before, and what
            is left is the augmentation (the placebo of do(context)).

    Shape:
        images (B, H, W, 3) uint8; dish (B, H, W) bool, what stays; strata (B,) -> (B, H, W, 3). No photo lends to
        itself, unless it is alone in its stratum.
    """
    chosen, order = rng.random(len(images)) < share, rng.permutation(len(images))
    lender = np.empty_like(order)
    of = np.zeros(len(order), int) if strata is None else strata[order]
    for stratum in np.unique(of):
        round_ = order[of == stratum]
        lender[round_] = np.roll(round_, 1)  # once round a random cycle: none keeps its own
    return np.where((dish | ~chosen[:, None, None])[..., None], images, images[lender])
