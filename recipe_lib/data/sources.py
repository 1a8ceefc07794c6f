"""Where recipes come from, by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from recipe_lib.data.cookbook import read_cookbook
from recipe_lib.data.kitchen import KitchenConfig, cook
from recipe_lib.data.recipe import DataError, Recipe


def read_source(
    source: str, folder: Path | None, kitchen: KitchenConfig, *, val: float, test: float
) -> tuple[Iterable[Recipe], str]:
    """Recipes of the source, and in words what was left out while reading ("" where nothing was).

    Args:
        source: "kitchen" or "cookbook".
        folder: the recipes, for every source but the kitchen.
        kitchen: the synthetic world, for the source "kitchen".
        val, test: shares of a cookbook's pairs.

    Raises:
        DataError: no such source, or its folder is not named.
    """
    if source == "kitchen":
        return cook(kitchen), ""
    if folder is None:
        raise DataError(f"source {source}: set source_dir to the folder of the recipes")
    if source == "cookbook":
        recipes, report = read_cookbook(folder, val=val, test=test)
        return recipes, str(report)
    raise DataError(f"source {source!r}: this version reads kitchen and cookbook only; convert the data to a cookbook")
