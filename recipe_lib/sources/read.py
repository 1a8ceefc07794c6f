"""Where recipes come from, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from recipe_lib.data.recipe import DataError, Recipe
from recipe_lib.kitchen.model import KitchenConfig, cook
from recipe_lib.sources.cookbook import read_cookbook
from recipe_lib.sources.recipe1m import read_recipe1m


def read_source(
    source: str,
    folder: Path | None,
    kitchen: KitchenConfig,
    *,
    val: float,
    test: float,
    image_dir: Path | None = None,
    names: str = "rules",
    ingredients: str = "ingredients",
    shift: Sequence[str] = (),
) -> tuple[Iterable[Recipe], object]:
    """Recipes of the source, and a report whose text says what was left out: ask for it when the recipes are read.

    Args:
        source: "kitchen", "cookbook" or "recipe1m".
        folder: the recipes, for every source but the kitchen.
        kitchen: the synthetic world, for the source "kitchen".
        val, test: shares of a cookbook's pairs.
        image_dir, names: of Recipe1M; see `read_recipe1m`.
        ingredients, shift: of a cookbook; see `read_cookbook`.

    Raises:
        DataError: no such source, or its folder is not named.
    """
    if source == "kitchen":
        return cook(kitchen), ""
    if folder is None:
        raise DataError(f"source {source}: set source_dir to the folder of the recipes")
    if source == "cookbook":
        return read_cookbook(folder, val=val, test=test, ingredients=ingredients, shift=shift)
    if source == "recipe1m":
        return read_recipe1m(folder, image_dir=image_dir, names=names)
    raise DataError(f"source {source!r}: choose kitchen, cookbook or recipe1m")
