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

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from recipe_lib.data.images import ImageError, read_image
from recipe_lib.data.recipe import DataError, Recipe, clean
from recipe_lib.sources.cookbook_formats import READERS

_REMOTE = re.compile(r"(?:https?|ftp|data):|//", re.IGNORECASE)
_ABSOLUTE = re.compile(r"[/\\]|[a-z]:[/\\]|file:", re.IGNORECASE)


@dataclass
class CookbookReport:
    """What became of a folder: the recipes read, and one line for everything that was left out."""

    pairs: int = 0  # recipes with at least one good photo
    text_only: int = 0
    remote_photos: int = 0  # http and data addresses, never fetched
    duplicates: list[str] = field(default_factory=list)
    broken_files: list[str] = field(default_factory=list)  # left out whole
    skipped: list[str] = field(default_factory=list)  # recipes, and files without any, each with its reason
    missing_photos: list[str] = field(default_factory=list)
    refused_photos: list[str] = field(default_factory=list)  # names and links that leave the folder
    broken_photos: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = (
            f"{self.pairs} recipes with photo, {self.text_only} without, {self.remote_photos} remote photos ignored"
        )
        named = {name.replace("_", " "): lines for name, lines in vars(self).items() if isinstance(lines, list)}
        return "\n".join([counts, *(f"{len(v)} {name}: {'; '.join(v)}" for name, v in named.items() if v)])


class _Skip(Exception):
    """Why a recipe or photo cannot be used."""


@dataclass
class _Entry:
    where: str  # file and line
    folder: Path  # photo names start here
    recipe: Recipe  # images still as written: names, not paths
    shifted: bool = False  # belongs to the test split "shift"


def read_cookbook(
    root: Path,
    *,
    val: float = 0.15,
    test: float = 0.15,
    limit: int | None = None,
    ingredients: str = "ingredients",
    shift: Sequence[str] = (),
    photos: bool = True,
) -> tuple[list[Recipe], CookbookReport]:
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

    Raises:
        DataError: no such folder, one that may not be read, no recipe in it, one id twice, or no photo that is good.
    """
    if val < 0 or test < 0 or val + test >= 1 or (limit is not None and limit < 1):
        raise DataError(f"val={val}, test={test}, limit={limit}: shares of 0 or more, below 1 in all; a limit over 0")
    root = Path(root)
    if not os.path.isdir(root):  # unlike Path.is_dir it is False, not an error, where nothing may be seen
        raise DataError(f"{root}: {'not a' if os.path.exists(root) else 'no such'} folder; name the cookbook's folder")
    root, report = root.resolve(), CookbookReport()
    entries: dict[str, _Entry] = {}
    own = {"ingredients": ingredients, "shift": set(shift)}
    for entry in (entry for path in _files(root, report) for entry in _entries(path, root, report, **own)):
        first = entries.setdefault(entry.recipe.id, entry)
        if first is not entry:
            raise DataError(f"{root}: {first.where} and {entry.where} share the id {entry.recipe.id!r}; change one")
    if not entries:
        faults = [*report.broken_files, *report.skipped]
        reasons = f" ({'; '.join(faults[:3])})" if faults else ""
        raise DataError(f"{root}: no recipe found{reasons}; it needs JSON lines, CSV, JSON-LD or markdown files")
    kept = _without_duplicates(entries, report)[:limit]
    photo_faults: dict[Path, str | None] = {}  # what is wrong with each photo; recipes may share one
    for entry in kept:
        entry.recipe.images = _good_photos(entry, root, report, photo_faults)
        entry.recipe.split = _split(entry, val, test) if entry.recipe.images else "train"
    if shift and not any(entry.recipe.split == "shift" for entry in kept):
        raise DataError(f"{root}: no recipe with photo has {' or '.join(shift)}; see test_shift")
    report.pairs = sum(bool(entry.recipe.images) for entry in kept)
    report.text_only = len(kept) - report.pairs
    if photos and not report.pairs:
        _explain_lost_photos(root, report)
    return [entry.recipe for entry in kept], report


def _explain_lost_photos(root: Path, report: CookbookReport) -> None:
    """A DataError where recipes name photos and none can be used: how many of each fault, and the first one."""
    lines = {
        "outside the folder": report.refused_photos,
        "missing": report.missing_photos,
        "broken": report.broken_photos,
        "remote": ["remote photos are never fetched"] * report.remote_photos,
    }
    if lost := {fault: named for fault, named in lines.items() if named}:
        counts = ", ".join(f"{len(named)} {fault}" for fault, named in lost.items())
        first = next(iter(lost.values()))[0]
        raise DataError(f"{root}: no photo can be used: {counts} (first: {first}); put the files into the folder")


def _files(root: Path, report: CookbookReport) -> list[Path]:
    def stop(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); correct its permissions")

    files = []
    for folder, folders, names in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names):
            if path.name.startswith(".") or path.suffix.lower() not in READERS:
                continue
            if os.path.islink(path) or not os.path.isfile(path):  # a link may lead anywhere, a pipe never ends
                report.skipped.append(f"{_shown(path, root)}: not a plain file; put the file itself here")
            else:
                files.append(path)
    return sorted(files)


def _entries(path: Path, root: Path, report: CookbookReport, ingredients: str, shift: set[str]) -> list[_Entry]:
    """The good recipes of one file; the reasons against the others, or against the file, go to the report."""
    shown = _shown(path, root)
    try:
        rows = list(READERS[path.suffix.lower()](path))
    except (DataError, OSError, UnicodeDecodeError, RecursionError) as error:
        report.broken_files.append(_fault(error, shown, path))
        return []
    if not rows:
        report.skipped.append(f"{shown}: holds no recipe")
    entries, titles = [], Counter()
    for line, fields in rows:
        where = f"{shown}:{line}" if line else shown
        try:
            if ingredients != "ingredients" and isinstance(fields, dict):
                fields = fields | {"ingredients": fields.get(ingredients, [])}
            recipe = _recipe(fields)
        except _Skip as reason:
            name = (fields.get("id") or fields.get("title")) if isinstance(fields, dict) else None
            report.skipped.append(f"{where}{f' ({str(name)[:60]!r})' if name else ''}: {reason}")
            continue
        titles[recipe.title] += 1  # one file may hold two recipes of one title
        recipe.id = recipe.id or _digest(f"{shown}\0{recipe.title}\0{titles[recipe.title]}")[:10]
        entries.append(_Entry(where, path.parent, recipe, not shift.isdisjoint(_marks(fields))))
    return entries


def _marks(fields: dict) -> set[str]:
    """Every "field: value" of a recipe whose value is a text, or a list of texts, as a cell of a CSV is."""
    lists = ((name, value if isinstance(value, list) else [value]) for name, value in fields.items())
    return {f"{name}: {value}" for name, values in lists for value in values if isinstance(value, str)}


def _fault(error: Exception, shown: str, path: Path) -> str:
    """One line: which file, where in it, what is wrong, what to do."""
    if isinstance(error, DataError):  # it begins with the path, and a line where there is one
        return shown + clean(str(error)).removeprefix(clean(str(path)))
    if isinstance(error, OSError):
        return f"{shown}: cannot be read ({error.strerror}); correct its permissions"
    if isinstance(error, UnicodeDecodeError):
        return f"{shown}: not UTF-8 text; save it as UTF-8"
    return f"{shown}: nested too deep to be a recipe; remove the file"


def _recipe(fields: dict[str, Any] | str) -> Recipe:
    """Types checked, texts cleaned; _Skip names the first field that is wrong."""
    if isinstance(fields, str):
        raise _Skip(fields)
    own, title = fields.get("id"), fields.get("title")
    if isinstance(own, bool) or not isinstance(own, str | int | None):
        raise _Skip(f"id is {type(own).__name__}, must be text")
    if title is None:
        raise _Skip("title missing")
    if not isinstance(title, str):
        raise _Skip(f"title is {type(title).__name__}, must be text (in quotes)")
    lists = {}
    for name in ("ingredients", "instructions", "images"):
        value = fields.get(name, [])
        if name == "images":  # one photo needs no list
            value = [value] if isinstance(value, str) else value or []
        if not isinstance(value, list):
            raise _Skip(f"{name} is {type(value).__name__}, must be a list of texts")
        if wrong := [item for item in value if not isinstance(item, str)]:
            raise _Skip(f"{name} holds {str(wrong[0])[:60]!r}, must hold texts only (in quotes)")
        lists[name] = value if name == "images" else [text for line in value if (text := clean(line))]
    if not lists["ingredients"] and not lists["instructions"]:
        raise _Skip("no ingredients and no instructions")
    return Recipe(id="" if own is None else clean(str(own)), title=clean(title), split="train", **lists)


def _without_duplicates(entries: dict[str, _Entry], report: CookbookReport) -> list[_Entry]:
    kept: dict[str, _Entry] = {}
    for entry in (entries[name] for name in sorted(entries)):
        recipe = entry.recipe
        # Without ingredients a title alone would make all pancakes one.
        key = _digest(
            "\0".join(_letters(text) for text in (recipe.title, *(recipe.ingredients or recipe.instructions)))
        )
        first = kept.setdefault(key, entry)
        if first is not entry:
            report.duplicates.append(f"{entry.where}: {recipe.id!r} repeats {first.recipe.id!r} ({first.where})")
    return list(kept.values())


def _good_photos(entry: _Entry, root: Path, report: CookbookReport, faults: dict[Path, str | None]) -> list[Path]:
    photos = []
    for name in entry.recipe.images:
        line = f"{entry.where}: {name[:120]!r}"
        if not name.strip():
            continue
        if _REMOTE.match(name):
            report.remote_photos += 1
            continue
        try:
            path = _find_photo(name, entry.folder, root)
        except _Skip as reason:
            report.refused_photos.append(f"{line} {reason}")
            continue
        if path is None:
            report.missing_photos.append(line)
            continue
        if path not in faults:
            try:
                faults[path] = read_image(path) and None
            except ImageError as error:
                faults[path] = str(error)
        if faults[path]:
            report.broken_photos.append(f"{line}: {faults[path]}")
        elif path not in photos:
            photos.append(path)
    return photos


def _find_photo(name: str, folder: Path, root: Path) -> Path | None:
    """The file meant by a photo's name, None if there is none; _Skip if only a path out of `root` would lead there."""
    outside = False
    for plain in dict.fromkeys([name.strip(), unquote(name.strip())]):  # "my%20pie.jpg" in markdown and JSON-LD
        if _ABSOLUTE.match(plain) or "\0" in plain:
            raise _Skip("is not a name relative to its recipe file")
        # "../" counts from the recipe file only: from images/ or the root it would mean another place.
        for base in (folder,) if ".." in Path(plain).parts else (folder, folder / "images", root):
            try:
                path = (base / plain).resolve()  # follows links, so a link that leaves is seen here
                outside |= not path.is_relative_to(root)
                if path.is_relative_to(root) and path.is_file():
                    return path
            except (OSError, RuntimeError, UnicodeError):  # too long, a link to itself, not a file name
                continue
    if outside:
        raise _Skip("leaves the cookbook's folder")


def _split(entry: _Entry, val: float, test: float) -> str:
    if entry.shifted:
        return "shift"
    share = int(_digest(f"split {entry.recipe.id}")[:8], 16) / 2**32
    return "test" if share < test else "val" if share < test + val else "train"


def _letters(text: str) -> str:
    """What two spellings of one text share; a text without letters or digits stands for itself."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LMN") or text


def _shown(path: Path, root: Path) -> str:
    return clean(path.relative_to(root).as_posix())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
