"""What the kitchen cooks with: pantry.csv, a row per ingredient."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from recipe_lib.kitchen.looks import rgb


@dataclass(frozen=True)
class Ingredient:
    """A row of pantry.csv. `cuts` maps a preparation to the form it gives; staples are what a dish is made on."""

    name: str
    plural: str
    visibility: str  # "salient", "subtle", "invisible", or "staple": always there, seen as the base of its dish
    rank: int  # place in the popularity order of its visibility
    unit: str
    cuts: dict[str, str]
    colours: np.ndarray  # (2, 3) flesh and accent, 0..255
    size: int
    cooks: bool
    cuisines: list[str]  # empty: at home in all of them
    dishes: list[str]


@lru_cache(maxsize=1)
def pantry() -> tuple[Ingredient, ...]:
    """All ingredients, in the file's order."""
    with open(Path(__file__).with_name("pantry.csv"), newline="", encoding="utf-8") as file:
        return tuple(
            Ingredient(
                **{key: row[key] for key in ("name", "plural", "visibility", "unit")},
                rank=int(row["rank"]),
                cuts=dict(pair.split("=") for pair in row["cuts"].split("|") if pair),
                colours=rgb(f"{row['colour'] or '000000'} {row['accent'] or '000000'}"),
                size=int(row["size"]),
                cooks=row["cooks"] == "1",
                cuisines=row["cuisines"].split("|") if row["cuisines"] else [],
                dishes=row["dishes"].split("|") if row["dishes"] else [],
            )
            for row in csv.DictReader(file)
        )
