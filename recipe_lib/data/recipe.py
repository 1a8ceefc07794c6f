"""A recipe as its source gives it: the one type that every importer yields and preparation reads."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_UNSAFE = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")  # no table or terminal takes these


class DataError(Exception):
    """Something is wrong with the data. One line: which file or recipe, what is wrong, what to do."""


@dataclass(slots=True)
class Recipe:
    """One recipe with its photos.

    Args:
        id: unique over the whole data set.
        title: name of the dish.
        ingredients: raw ingredient lines, in order.
        instructions: steps, in order.
        images: photo files, their bytes, or rendered dishes (H, W, 3) uint8; empty for a text-only recipe.
        split: "train", "val" or the name of a test split.
        names: canonical ingredient of each line where the source knows it, several with ";" between them; None: names
            are then made by rules. Further names after those of the lines are in the recipe but on no known line.
        truth: the causal variables behind a synthetic dish; empty for real ones.
        description: what the finished dish looks like, as the source says it; "" where it does not.
        segments: a folder of its segments for each photo, where the source has them, as paths below `segment_root`,
            which they may not leave once links are followed.
        image_root: photo files must lie in this folder once links are followed; None: the reader has checked them.
    """

    id: str
    title: str
    ingredients: list[str]
    instructions: list[str]
    images: list[Path | bytes | np.ndarray]
    split: str
    names: list[str | None] | None = None
    truth: dict = field(default_factory=dict)
    image_root: Path | None = None
    description: str = ""
    segments: list[Path] | None = None
    segment_root: Path | None = None


def clean(text: str) -> str:
    """One line that UTF-8 can hold; emoji and right-to-left marks stay."""
    return " ".join(_UNSAFE.sub("", text).split())
