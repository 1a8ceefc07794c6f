"""Any table of recipes that the library `datasets` reads: a name on the Hugging Face hub, or a local file or folder.

It is streamed, a row group of its files in memory, and no picture is decoded by it: photos are bytes in the table, or
files in the local folder, which no name may leave. Addresses of pictures are not fetched. Fields are found by the names
that a cookbook may use, or by a mapping. A text stands for a list as in a cell of a CSV, or as a Python list literal.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe_lib.data.recipe import DataError, Recipe
from recipe_lib.sources.cookbook_formats import lines, literal_lines, renamed
from recipe_lib.sources.judging import Judge, Report, same

_LISTS = ("ingredients", "instructions")


def read_hub(
    data: str | Path,
    *,
    split: str = "train",
    config: str = "",
    revision: str = "",
    columns: Sequence[str] = (),
    val: float = 0.15,
    test: float = 0.15,
    ingredients: str = "ingredients",
    shift: Sequence[str] = (),
) -> tuple[Iterator[Recipe], Report]:
    """Recipes in the order of the table, and a report that is whole when they are all read.

    A recipe without an id gets one from its text, and the split follows from the id alone. Of recipes with the same
    text (see `read_cookbook`) the first stays. Whether all pixels of a photo are there is seen when it is prepared.

    Args:
        data: name of a data set on the hub, a Parquet file, or a folder in any layout that `datasets` reads.
        split: which of its splits is read; the study's own are drawn from that.
        config, revision: which of its configurations; which state of it, a commit say.
        columns: "field: column" for fields of a recipe that have other names there, or for further fields.
        val, test, ingredients, shift: see `read_cookbook`.

    Raises:
        DataError: at the call: no `datasets`, nothing there, a column that is not there. While reading: no recipe, one
            id twice, no photo that is good, a file that cannot be read to its end.
    """
    mapping = _mapping(columns)
    local = Path(data).resolve() if os.path.exists(data) else None
    root = local.parent if local and local.is_file() else local
    judge = Judge(data, root, val=val, test=test, ingredients=ingredients, shift=shift)
    rows = _open(data, local, split, config, revision, list(mapping.values()))
    return _read(rows, judge, mapping), judge.report


def _mapping(columns: Sequence[str]) -> dict[str, str]:
    pairs = [tuple(part.strip() for part in column.partition(":")[::2]) for column in columns]
    if wrong := [column for column, pair in zip(columns, pairs, strict=True) if not all(pair)]:
        raise DataError(f"hub_columns: {wrong[0]!r} must be 'field: column', such as 'title: name'")
    return {field.lower(): column for field, column in pairs}


def _open(
    data: str | Path, local: Path | None, split: str, config: str, revision: str, wanted: Sequence[str]
) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError("source hub needs the package datasets; install it: pip install 'datasets>=4.0'") from None
    if local is None and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(data)):
        raise DataError(f"{data}: no such file or folder, nor can it be the name of a data set on the hub")
    datasets.disable_progress_bars()
    where = {"path": str(local or data), "name": config or None, "revision": revision or None}
    if local and local.is_file():
        where = {"path": "parquet", "data_files": [glob.escape(str(local))]}
    try:
        stream = datasets.load_dataset(**where, split=split, streaming=True)
        if stream.features:  # without them nothing is decoded
            stream = stream.decode(False)
        names = list(stream.features or next(iter(stream), {}))
    except Exception as error:  # of the network, the hub, the file system, and of each format's reader
        raise DataError(f"{data}: split {split!r} cannot be read ({_line(error)}); see source_dir, hub_split") from None
    if missing := [name for name in wanted if name not in names]:
        raise DataError(f"{data}: no column {missing[0]!r}; it has {', '.join(map(str, names))}; see hub_columns")
    return stream


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _read(rows: Iterable[dict[str, Any]], judge: Judge, mapping: Mapping[str, str]) -> Iterator[Recipe]:
    ids: set[str] = set()
    first: dict[str, int] = {}  # row that has a text
    for number, row in enumerate(_checked(rows, judge.source), 1):
        where = f"row {number}"
        fields = renamed(row | {field: row.get(column) for field, column in mapping.items()})
        names, photos = _photos(fields.pop("images", None), judge.root)
        fields = {k: _list(v) if k in (*_LISTS, judge.ingredients) else v for k, v in fields.items()}
        entry = judge.entry(where, judge.root, fields | {"images": names}, photos)
        if entry is None:
            continue
        recipe, text = entry.recipe, same(entry.recipe)
        recipe.id = recipe.id or text[:16]
        if first.setdefault(text, number) != number:
            judge.report.duplicates.append(f"{where}: {recipe.id!r} repeats row {first[text]}")
            continue
        if recipe.id in ids:
            raise DataError(f"{judge.source}: {where}: the id {recipe.id!r} is there twice; map another column to id")
        ids.add(recipe.id)
        yield judge.settle(entry)
    if not ids:
        raise judge.none_found("columns title, ingredients, instructions and images; see hub_columns")
    judge.conclude()


def _checked(rows: Iterable[dict[str, Any]], source: object) -> Iterator[dict[str, Any]]:
    """The rows; whatever stops them on the way is one line."""
    try:
        yield from rows
    except Exception as error:
        raise DataError(f"{source}: cannot be read to its end ({_line(error)})") from None


def _photos(value: Any, root: Path | None) -> tuple[list[Any], list[bytes]]:
    """Names and bytes of photos: each a picture as `datasets` has it undecoded, plain bytes, or a name."""
    names, photos = [], []
    for item in value if isinstance(value, list) else [] if value is None else [value]:
        if isinstance(item, dict) and {"bytes", "path"} & item.keys():
            item = item.get("bytes") or item.get("path")
        if isinstance(item, bytes):
            photos.append(item)
        elif item is not None:
            inside = isinstance(item, str) and root and Path(item).is_relative_to(root)  # as an image folder has it
            names.append(str(Path(item).relative_to(root)) if inside else item)
    return names, photos


def _list(value: Any) -> Any:
    if isinstance(value, str):
        value = literal_lines(value)
    return lines(value) if isinstance(value, str) else [] if value is None else value
