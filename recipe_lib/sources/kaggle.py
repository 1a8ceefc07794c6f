"""The Kaggle set "Food Ingredients and Recipes Dataset with Images" (13.5k pairs of epicurious.com), as it is unpacked.

    Food Ingredients and Recipe Dataset with Image Name Mapping.csv    (number), Title, Ingredients, Instructions,
                                                                       Image_Name, Cleaned_Ingredients
    Food Images/Food Images/<Image_Name>.jpg

Lists are Python literals in a cell, steps are its lines. It is read, judged and reported as a cookbook is. A row
without a title is left out. Some photos are lost behind the name "#NAME?", a spreadsheet's for one with a "-" in front.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipe_lib.data.recipe import DataError, Recipe
from recipe_lib.sources.cookbook import Layout, read_cookbook
from recipe_lib.sources.cookbook_formats import Fields, literal_lines, read_csv
from recipe_lib.sources.judging import Report

_COLUMNS = ("Title", "Ingredients", "Instructions", "Image_Name")


def read_kaggle(root: Path, **options: Any) -> tuple[list[Recipe], Report]:
    """Read the set below `root`; ids are its row numbers, where it has them.

    Args:
        root: the folder that the archive was unpacked into, or any part of such a set.
        options: as of `read_cookbook`; `ingredients` may be "cleaned_ingredients".

    Raises:
        DataError: as `read_cookbook`.
    """
    needs = f"the set's CSV with the columns {', '.join(_COLUMNS)}"
    return read_cookbook(
        root, layout=Layout({".csv": _read}, ("Food Images/Food Images", "Food Images"), needs), **options
    )


def _read(path: Path) -> Iterator[Fields]:
    return read_csv(path, lambda row: _fields(path, row))


def _fields(path: Path, row: dict[str, str]) -> dict[str, Any]:
    if missing := [name for name in _COLUMNS if name.lower() not in row]:
        raise DataError(f"{path}: no column {missing[0]}; it is not the set's table")
    lists = {name: _list(text) for name, text in row.items() if name.endswith("ingredients")}
    photo = row["image_name"].strip()
    return {
        **row,
        "id": row.get("") or None,  # the column of row numbers has no name
        "title": row["title"].strip() or None,
        **lists,
        "instructions": row["instructions"].splitlines(),
        "images": [f"{photo}.jpg"] if photo else [],
    }


def _list(text: str) -> list[str] | str:
    return literal_lines(text) if text.strip() else []
