"""Counterfactual context: a dish keeps its place and gets the surroundings of another photo.

Where the surroundings of a training photo are drawn at random, they say nothing of its recipe any more: do(context) by
construction, without a word on what the context is. What belongs to the dish is taken to be a disc about the centre, or
the parts that are stored with the photo (`Split.foreground`).
"""

from __future__ import annotations

import numpy as np


def discs(count: int, side: int, radius: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """(count, side, side) bool: discs about the centre, of radii drawn between two shares of the side."""
    away = np.hypot(*(np.mgrid[:side, :side] + 0.5 - side / 2)) / side
    return away < rng.uniform(*radius, count)[:, None, None]


def swap_context(images: np.ndarray, dish: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Give a share of the photos of a batch, drawn at random, the surroundings of other photos of it.

    Shape:
        images (B, H, W, 3) uint8; dish (B, H, W) bool, what stays -> (B, H, W, 3). No photo lends to itself.
    """
    chosen, order = rng.random(len(images)) < share, rng.permutation(len(images))
    lender = np.empty_like(order)
    lender[order] = np.roll(order, 1)  # once round a random cycle: none keeps its own
    return np.where((dish | ~chosen[:, None, None])[..., None], images, images[lender])
