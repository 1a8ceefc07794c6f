"""What both forms of Recipe1M share: checked fields become recipes, and a report counts what became of them."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe_lib.data.recipe import DataError, Recipe, clean

PARTITIONS = ("train", "val", "test")
ID = re.compile(r"[0-9a-f]{10}")
_PHOTO = re.compile(r"[0-9a-f]{10}\.jpg")


@dataclass
class Recipe1MReport:
    """What became of the data; right once the recipes are exhausted."""

    pairs: Counter[str] = field(default_factory=Counter)  # recipes with photo names, by partition
    text_only: Counter[str] = field(default_factory=Counter)
    repaired_lines: int = 0  # lost slashes put back
    unknown_photo_entries: int = 0  # ids of layer2.json that layer1.json lacks
    unknown_name_entries: int = 0  # ids of det_ingrs.json that layer1.json lacks
    labels_without_line: int = 0  # of pickles: no line holds the ingredient
    listed_without_pair: int = 0  # ids of the split lists that no pair has
    unlisted: list[str] = field(default_factory=list)  # pairs that the list of their partition lacks, left out
    names_by_rules: list[str] = field(default_factory=list)  # det_ingrs.json does not fit their lines
    skipped: list[str] = field(default_factory=list)  # recipes and entries, each with its reason
    refused_photos: list[str] = field(default_factory=list)  # names that are not 10 hexadecimal digits and .jpg

    def __str__(self) -> str:
        for_each = (f"{self.pairs[p]} + {self.text_only[p]} {p}" for p in PARTITIONS)
        lines = [f"recipes with photo + text only: {', '.join(for_each)}"]
        for name, value in vars(self).items():
            if isinstance(value, list) and value:
                lines.append(f"{len(value)} {name.replace('_', ' ')}: {'; '.join(value)}")
            elif isinstance(value, int) and value:
                lines.append(f"{value} {name.replace('_', ' ')}")
        return "\n".join(lines)


@dataclass
class Assembly:
    """Turns checked fields into recipes and counts them; both forms of the data go through it."""

    image_dir: Path
    report: Recipe1MReport

    def __post_init__(self) -> None:
        # A partition may be a link to another disk, made by the owner of the data; a photo in it may not lead out.
        self._roots = {name: (self.image_dir / name).resolve() for name in PARTITIONS}
        segments = self.image_dir / "segment"
        self._segments = segments.resolve() if segments.is_dir() else None

    def recipe(self, id: str, partition: str, title: str, lines: list[str], steps: list[str], photos: list[str],
               names: list[str | None] | None = None, description: str = "") -> Recipe:  # fmt: skip
        """From cleaned texts, empty ones dropped together with their name, and good names of photos.

        Where there is a folder `segment` beside the photos, each photo has a folder of its segments (DAR):
        segment/<partition>/0/1/2/3/0123456789/.

        Raises:
            Skip: neither an ingredient nor an instruction is left.
        """
        if names is not None:
            names = [name for name, line in zip(names, lines, strict=False) if line] + names[len(lines) :]
        lines, steps = [line for line in lines if line], [step for step in steps if step]
        if not lines and not steps:
            raise Skip("no ingredients and no instructions")
        (self.report.pairs if photos else self.report.text_only)[partition] += 1
        folder = self.image_dir / partition
        paths = [folder.joinpath(*name[:4], name) for name in photos]
        segments = segment_root = None
        if self._segments:
            segment_root = (self._segments / partition).resolve()
            segments = [Path(*name[:4], name.removesuffix(".jpg")) for name in photos]
        return Recipe(
            id, title, lines, steps, paths, partition, names, image_root=self._roots[partition],
            description=description, segments=segments, segment_root=segment_root,
        )  # fmt: skip

    def good_photos(self, where: str, photos: list[Any]) -> list[str]:
        """The names that can be a photo of Recipe1M; nothing else may ever become part of a path."""
        good: dict[str, None] = {}  # a set in order
        for name in photos:
            if isinstance(name, str) and _PHOTO.fullmatch(name):
                good[name] = None
            else:
                self.report.refused_photos.append(f"{where}: {shown(name)}")
        return list(good)


class Skip(Exception):
    """Why a recipe or an entry cannot be used."""


def check_folder(path: Path, advice: str) -> None:
    if not os.path.isdir(path):  # unlike Path.is_dir it is False, not an error, where nothing may be seen
        raise DataError(f"{path}: {'not a' if os.path.lexists(path) else 'no such'} folder; {advice}")
    if not os.access(path, os.R_OK | os.X_OK):
        raise DataError(f"{path}: may not be read and searched; correct its permissions")


def check_file(path: Path, advice: str) -> None:
    """DataError unless the path is a plain file, or a link to one, that may be read."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: {'not a' if os.path.lexists(path) else 'no such'} file; {advice}")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: may not be read; correct its permissions")


def entry_id(entry: Any) -> str:
    """The entry's id; Skip where there is none or it is not of Recipe1M's form."""
    if not isinstance(entry, dict):
        raise Skip(f"{shown(entry)} is not an object")
    id = entry.get("id")
    if not isinstance(id, str) or not ID.fullmatch(id):
        raise Skip(f"id is {shown(id)}, must be 10 hexadecimal digits")
    return id


def given_description(fields: dict) -> str:
    """What DAR's authors had a model say of the recipe, on one line; "" where they did not. Skip for another type."""
    text = fields.get("llama_13b_generation", "")
    if not isinstance(text, str):
        raise Skip(f"llama_13b_generation is {shown(text)}, must be text")
    return clean(text)


def shown(value: Any) -> str:
    """Short, printable and on one line; containers by type, for they may be huge."""
    return ascii(value[:60] if isinstance(value, str) else value if value is None else type(value).__name__)
