"""Where recipes come from, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe_lib.data.recipe import DataError, Recipe
from recipe_lib.kitchen.model import KitchenConfig, cook
from recipe_lib.paths import resolve, resolve_if_there
from recipe_lib.sources.cookbook import read_cookbook
from recipe_lib.sources.hub import read_hub
from recipe_lib.sources.kaggle import read_kaggle
from recipe_lib.sources.recipe1m import read_recipe1m


def read_source(
    source: str,
    data: str,
    kitchen: KitchenConfig,
    *,
    val: float,
    test: float,
    image_dir: Path | None = None,
    names: str = "rules",
    ingredients: str = "ingredients",
    shift: Sequence[str] = (),
    table: Mapping[str, Any] | None = None,
) -> tuple[Iterable[Recipe], object]:
    """Recipes of the source, and a report whose text says what was left out: ask for it when the recipes are read.

    Args:
        source: "kitchen", "cookbook", "recipe1m", "kaggle" or "hub".
        data: the folder of the recipes, for every source but the kitchen, as a user writes it; of the hub also a file
            or a name.
        kitchen: the synthetic world, for the source "kitchen".
        val, test: shares of the pairs of a source that has no splits of its own.
        image_dir, names: of Recipe1M; see `read_recipe1m`.
        ingredients, shift: see `read_cookbook`.
        table: split, config, revision and columns; see `read_hub`.

    Raises:
        DataError: no such source, or its folder is not named.
    """
    if source == "kitchen":
        return cook(kitchen), ""
    if not data:
        raise DataError(f"source {source}: set source_dir to the folder of the recipes")
    own = {"val": val, "test": test, "ingredients": ingredients, "shift": shift}
    if source == "cookbook":
        return read_cookbook(resolve(data), **own)
    if source == "recipe1m":
        return read_recipe1m(resolve(data), image_dir=image_dir, names=names)
    if source == "kaggle":
        return read_kaggle(resolve(data), **own)
    if source == "hub":
        return read_hub(resolve_if_there(data), **own, **table or {})
    raise DataError(f"source {source!r}: choose kitchen, cookbook, recipe1m, kaggle or hub")
