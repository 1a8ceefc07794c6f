"""A cookbook of one's own: a folder of recipes in any mix of four formats, with photos beside them.

    *.jsonl, *.ndjson   one object per line: title, ingredients, instructions, images, id
    *.csv, *.tsv        the same names in the header; lists on lines of their own in the cell, or between '|'
    *.json, *.jsonld    schema.org/Recipe, anywhere in the file
    *.md, *.markdown    YAML front matter and / or sections Ingredients and Instructions / Directions / Method / Steps

All files below the folder are read together, hidden ones left out. A photo is looked for beside its recipe file, in
`images/` beside it, then in the folder itself. It may be a link, but neither name nor link may leave the folder.
A bad recipe or photo is skipped and named. So is a file that cannot be parsed, with all that it holds: more may be
wrong with it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipe_lib.data.recipe import DataError, Recipe, clean
from recipe_lib.sources.cookbook_formats import READERS, Fields
from recipe_lib.sources.judging import Entry, Judge, Report, digest, same


@dataclass(frozen=True)
class Layout:
    """How a folder of recipes is laid out.

    Args:
        readers: of each kind of file, by the end of its name.
        images: below a recipe file, where its photos may lie.
        needs: what must be there, for the error where there is no recipe.
    """

    readers: Mapping[str, Callable[[Path], Iterator[Fields]]] = field(default_factory=lambda: READERS)
    images: Sequence[str] = ("images",)
    needs: str = "JSON lines, CSV, JSON-LD or markdown files"


def read_cookbook(
    root: Path,
    *,
    val: float = 0.15,
    test: float = 0.15,
    limit: int | None = None,
    ingredients: str = "ingredients",
    shift: Sequence[str] = (),
    photos: bool = True,
    layout: Layout | None = None,
) -> tuple[list[Recipe], Report]:
    """Read every recipe below `root`, in order of id. Photos are opened once to check them; memory holds text only.

    The split follows from the id alone: adding recipes moves none of the others. A recipe without a usable photo is
    text-only and always "train", for it serves the self-supervised loss only. A recipe may lack its ingredients or its
    instructions, not both, and its title may be empty, not absent. Of recipes whose title and ingredients have the same
    letters and digits the first by id stays.

    Args:
        root: the folder.
        val, test: expected shares of the recipes with photo, each at least 0, together below 1.
        limit: read only this many recipes, the first by id.
        ingredients: name of the field that holds the ingredient lines.
        shift: "field: value": pairs with one of these are a test split of their own, "shift", and are in no other.
        photos: recipes that name photos are of no use where none of these is good.
        layout: of the folder, where it is not a cookbook's.

    Raises:
        DataError: no such folder, one that may not be read, no recipe in it, one id twice, or no photo that is good.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: of a cookbook's recipes; beside shares of 0 or more it must be over 0")
    layout, root = layout or Layout(), Path(root)
    options = {"val": val, "test": test, "ingredients": ingredients, "shift": shift, "folders": layout.images}
    judge = Judge(root, root.resolve(), **options)
    if not os.path.isdir(root):  # unlike Path.is_dir it is False, not an error, where nothing may be seen
        raise DataError(f"{root}: {'not a' if os.path.exists(root) else 'no such'} folder; name the cookbook's folder")
    entries: dict[str, Entry] = {}
    for entry in (entry for path in _files(judge, layout) for entry in _entries(path, judge, layout)):
        first = entries.setdefault(entry.recipe.id, entry)
        if first is not entry:
            raise DataError(f"{root}: {first.where} and {entry.where} share the id {entry.recipe.id!r}; change one")
    if not entries:
        raise judge.none_found(layout.needs)
    recipes = [judge.settle(entry) for entry in _without_duplicates(entries, judge.report)[:limit]]
    judge.conclude(photos)
    return recipes, judge.report


def _files(judge: Judge, layout: Layout) -> list[Path]:
    def stop(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); correct its permissions")

    files = []
    for folder, folders, names in os.walk(judge.root, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names):
            if path.name.startswith(".") or path.suffix.lower() not in layout.readers:
                continue
            if os.path.islink(path) or not os.path.isfile(path):  # a link may lead anywhere, a pipe never ends
                judge.report.skipped.append(f"{_shown(path, judge.root)}: not a plain file; put the file itself here")
            else:
                files.append(path)
    return sorted(files)


def _entries(path: Path, judge: Judge, layout: Layout) -> list[Entry]:
    """The good recipes of one file; the reasons against the others, or against the file, go to the report."""
    shown = _shown(path, judge.root)
    try:
        rows = list(layout.readers[path.suffix.lower()](path))
    except (DataError, OSError, UnicodeDecodeError, RecursionError) as error:
        judge.report.broken_files.append(_fault(error, shown, path))
        return []
    if not rows:
        judge.report.skipped.append(f"{shown}: holds no recipe")
    entries, titles = [], Counter()
    for line, fields in rows:
        if entry := judge.entry(f"{shown}:{line}" if line else shown, path.parent, fields):
            recipe = entry.recipe
            titles[recipe.title] += 1  # one file may hold two recipes of one title
            recipe.id = recipe.id or digest(f"{shown}\0{recipe.title}\0{titles[recipe.title]}")[:10]
            entries.append(entry)
    return entries


def _fault(error: Exception, shown: str, path: Path) -> str:
    """One line: which file, where in it, what is wrong, what to do."""
    if isinstance(error, DataError):  # it begins with the path, and a line where there is one
        return shown + clean(str(error)).removeprefix(clean(str(path)))
    if isinstance(error, OSError):
        return f"{shown}: cannot be read ({error.strerror}); correct its permissions"
    if isinstance(error, UnicodeDecodeError):
        return f"{shown}: not UTF-8 text; save it as UTF-8"
    return f"{shown}: nested too deep to be a recipe; remove the file"


def _without_duplicates(entries: dict[str, Entry], report: Report) -> list[Entry]:
    kept: dict[str, Entry] = {}
    for entry in (entries[name] for name in sorted(entries)):
        first = kept.setdefault(same(entry.recipe), entry)
        if first is not entry:
            report.duplicates.append(f"{entry.where}: {entry.recipe.id!r} repeats {first.recipe.id!r} ({first.where})")
    return list(kept.values())


def _shown(path: Path, root: Path) -> str:
    return clean(path.relative_to(root).as_posix())
