"""What makes a recipe of fields that somebody wrote: types, texts, photos, split; a report on what is left out."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from recipe_lib.data.images import ImageError, check_image, read_image
from recipe_lib.data.recipe import DataError, Recipe, clean

_REMOTE = re.compile(r"(?:https?|ftp|data):|//", re.IGNORECASE)
_ABSOLUTE = re.compile(r"[/\\]|[a-z]:[/\\]|file:", re.IGNORECASE)


@dataclass
class Report:
    """What became of a source: the recipes read, and one line for everything that was left out."""

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
class Entry:
    """A recipe whose photos are not looked at yet: names, or the bytes of files."""

    where: str  # file and line
    folder: Path | None  # photo names start here
    recipe: Recipe
    shifted: bool = False  # belongs to the test split "shift"


class Judge:
    """Rows in, recipes out, all with one report.

    Args:
        source: name of it all in errors.
        root: the folder that no photo's name may leave; None: there is none, photos come as bytes.
        val, test, ingredients, shift: see `cookbook.read_cookbook`.
        folders: below a recipe file, where its photos may lie.

    Raises:
        DataError: impossible shares.
    """

    def __init__(
        self,
        source: object,
        root: Path | None,
        *,
        val: float,
        test: float,
        ingredients: str = "ingredients",
        shift: Sequence[str] = (),
        folders: Sequence[str] = ("images",),
    ):
        if val < 0 or test < 0 or val + test >= 1:
            raise DataError(f"val={val}, test={test}: shares of 0 or more, below 1 in all")
        self.source, self.root, self.val, self.test, self.folders = source, root, val, test, folders
        self.ingredients, self.shift, self.report = ingredients.lower(), set(shift), Report()
        self._shifted = 0
        self._faults: dict[Path, str | None] = {}  # what is wrong with each photo; recipes may share one

    def entry(self, where: str, folder: Path | None, fields: Any, photos: Sequence[bytes] = ()) -> Entry | None:
        """A recipe by its fields, or by a text that says why there is none; what cannot be used goes to the report.

        Args:
            photos: files' bytes, beside the names in the field "images".
        """
        try:
            if self.ingredients != "ingredients" and isinstance(fields, dict):
                if self.ingredients not in fields:
                    raise _Skip(f"no field {self.ingredients!r}; see ingredients_field")
                fields = fields | {"ingredients": fields[self.ingredients]}
            recipe = _recipe(fields)
        except _Skip as reason:
            name = (fields.get("id") or fields.get("title")) if isinstance(fields, dict) else None
            self.report.skipped.append(f"{where}{f' ({str(name)[:60]!r})' if name else ''}: {reason}")
            return None
        recipe.images += photos
        return Entry(where, folder, recipe, not self.shift.isdisjoint(_marks(fields)))

    def settle(self, entry: Entry) -> Recipe:
        """The recipe with the photos that are good, and its split."""
        recipe = entry.recipe
        recipe.images = self._good_photos(entry)
        recipe.split = self._split(entry) if recipe.images else "train"
        self._shifted += recipe.split == "shift"
        self.report.pairs += bool(recipe.images)
        self.report.text_only += not recipe.images
        return recipe

    def none_found(self, needs: str) -> DataError:
        """The error where there is not a single recipe."""
        faults = [*self.report.broken_files, *self.report.skipped]
        reasons = f" ({'; '.join(faults[:3])})" if faults else ""
        return DataError(f"{self.source}: no recipe found{reasons}; it needs {needs}")

    def conclude(self, photos: bool = True) -> None:
        """A DataError where the split "shift" is empty, or where recipes name photos and none of these is good."""
        if self.shift and not self._shifted:
            shift = " or ".join(sorted(self.shift))
            raise DataError(f"{self.source}: no recipe with photo has {shift}; see test_shift")
        lines = {
            "outside the folder": self.report.refused_photos,
            "missing": self.report.missing_photos,
            "broken": self.report.broken_photos,
            "remote": ["remote photos are never fetched"] * self.report.remote_photos,
        }
        lost = {fault: named for fault, named in lines.items() if named}
        if photos and not self.report.pairs and lost:
            counts = ", ".join(f"{len(named)} {fault}" for fault, named in lost.items())
            first = next(iter(lost.values()))[0]
            raise DataError(
                f"{self.source}: no photo can be used: {counts} (first: {first}); put the files into the folder"
            )

    def _good_photos(self, entry: Entry) -> list[Path | bytes]:
        photos: list[Path | bytes] = []
        for name in entry.recipe.images:
            if isinstance(name, bytes):  # its pixels are judged when they are needed: there may be a million of them
                try:
                    check_image(name, name="photo")
                    photos.append(name)
                except ImageError as error:
                    self.report.broken_photos.append(f"{entry.where}: {error}")
                continue
            line = f"{entry.where}: {name[:120]!r}"
            if not name.strip():
                continue
            if self.root is None or _REMOTE.match(name):
                self.report.remote_photos += 1
                continue
            try:
                path = self._find_photo(name, entry.folder)
            except _Skip as reason:
                self.report.refused_photos.append(f"{line} {reason}")
                continue
            if path is None:
                self.report.missing_photos.append(line)
                continue
            if path not in self._faults:
                try:
                    self._faults[path] = read_image(path) and None
                except ImageError as error:
                    self._faults[path] = str(error)
            if self._faults[path]:
                self.report.broken_photos.append(f"{line}: {self._faults[path]}")
            elif path not in photos:
                photos.append(path)
        return photos

    def _find_photo(self, name: str, folder: Path) -> Path | None:
        """The file meant by a photo's name, None if there is none; _Skip if only a path out of the root leads there."""
        outside = False
        for plain in dict.fromkeys([name.strip(), unquote(name.strip())]):  # "my%20pie.jpg" in markdown and JSON-LD
            if _ABSOLUTE.match(plain) or "\0" in plain:
                raise _Skip("is not a name relative to its recipe file")
            # "../" counts from the recipe file only: from images/ or the root it would mean another place.
            below = () if ".." in Path(plain).parts else (*(folder / name for name in self.folders), self.root)
            for base in (folder, *below):
                try:
                    path = (base / plain).resolve()  # follows links, so a link that leaves is seen here
                    outside |= not path.is_relative_to(self.root)
                    if path.is_relative_to(self.root) and path.is_file():
                        return path
                except (OSError, RuntimeError, UnicodeError):  # too long, a link to itself, not a file name
                    continue
        if outside:
            raise _Skip("leaves the cookbook's folder")

    def _split(self, entry: Entry) -> str:
        if entry.shifted:
            return "shift"
        share = int(digest(f"split {entry.recipe.id}")[:8], 16) / 2**32
        return "test" if share < self.test else "val" if share < self.test + self.val else "train"


def same(recipe: Recipe) -> str:
    """What two recipes share whose title and ingredients have the same letters and digits."""
    # Without ingredients a title alone would make all pancakes one.
    texts = (recipe.title, *(recipe.ingredients or recipe.instructions))
    return digest("\0".join(_letters(text) for text in texts))


def digest(text: str) -> str:
    """SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()


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


def _marks(fields: dict) -> set[str]:
    """Every "field: value" of a recipe whose value is a text, or a list of texts, as a cell of a CSV is."""
    lists = ((name, value if isinstance(value, list) else [value]) for name, value in fields.items())
    return {f"{name}: {value.strip()}" for name, values in lists for value in values if isinstance(value, str)}


def _letters(text: str) -> str:
    """What two spellings of one text share; a text without letters or digits stands for itself."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LMN") or text
