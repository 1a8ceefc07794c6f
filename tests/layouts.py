"""Recipes written in the layouts that importers read, for their tests and for drills at scale."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from recipe_lib.data.ingredients import ingredient_name
from recipe_lib.data.recipe import Recipe


def write_recipe1m(recipes: Iterable[Recipe], folder: Path, *, det_ingrs: bool = True) -> None:
    """Stream recipes into Recipe1M's official layout.

    Ids that are not 10 hexadecimal digits become some, and every split but train and val becomes test.

    Args:
        recipes: with photos as (H, W, 3) uint8 arrays or files, or none.
        folder: is made where it is missing.
        det_ingrs: write det_ingrs.json too, with the recipes' own names or else those by rules.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = ["layer1.json", "layer2.json", *["det_ingrs.json"] * det_ingrs]
    with ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("w", encoding="utf-8")) for name in names]
        before = dict.fromkeys(files, "[")
        for recipe in recipes:
            id = recipe.id if re.fullmatch(r"[0-9a-f]{10}", recipe.id) else _hex(recipe.id)
            partition = recipe.split if recipe.split in ("train", "val") else "test"
            photos = [f"{_hex(f'{id} {i}')}.jpg" for i in range(len(recipe.images))]
            for name, image in zip(photos, recipe.images, strict=True):
                path = folder.joinpath(partition, *name[:4], name)
                path.parent.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(image)
                picture.convert("RGB").save(path, "JPEG", quality=90)
            texts = {key: [{"text": text} for text in getattr(recipe, key)] for key in ("ingredients", "instructions")}
            names = recipe.names or [ingredient_name(line) for line in recipe.ingredients]
            names = [name or "" for name in names[: len(recipe.ingredients)]]
            entries = [
                {"id": id, "title": recipe.title, "partition": partition, "url": "", **texts},
                {"id": id, "images": [{"id": name, "url": ""} for name in photos]} if photos else None,
                {"id": id, "valid": [bool(name) for name in names], "ingredients": [{"text": name} for name in names]},
            ]
            for file, entry in zip(files, entries, strict=False):
                if entry:
                    file.write(f"{before[file]}{json.dumps(entry)}")
                    before[file] = ",\n"
        for file in files:
            file.write("[]" if before[file] == "[" else "]")


def _hex(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()[:10]
