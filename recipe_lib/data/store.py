"""The prepared data: Parquet shards of text, photos (resized JPEG bytes), token ids and ingredient labels.

    <folder>/card.json classes.csv tokenizer.json
    <folder>/<split>/00000.recipes.parquet   what the source gave, photos as JPEG bytes
    <folder>/<split>/00000.tokens.parquet    token ids and labels, row for row

Nothing is tokenised or resized again in training. Token ids of a split live in memory as flat arrays (Recipe1M: about
250 MB); photos are read from small row groups when they are needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from recipe_lib.data.images import ImageError, read_image, to_jpeg
from recipe_lib.data.ingredients import IngredientClasses, ingredient_name
from recipe_lib.data.recipe import DataError, Recipe
from recipe_lib.data.text import encode_sentences, train_tokenizer

SHARD = 2048  # recipes a file
ROW_GROUP = 32  # recipes read together when one photo is asked for
TEXT_ONLY = "text_only"  # training recipes without a photo: they train the self-supervised loss alone


@dataclass(frozen=True)
class StoreConfig:
    """How recipes are prepared.

    Args:
        image_size: shorter side of the stored photos, pixels.
        min_word_count: a word enters the vocabulary when the paired training recipes hold it this often.
        ingredient_classes: K, the most frequent ingredients of the paired training recipes.
        max_sentences: ingredient lines, and instruction steps, kept of each recipe.
        max_tokens: words kept of each sentence.
    """

    image_size: int = 256
    min_word_count: int = 10
    ingredient_classes: int = 500
    max_sentences: int = 20
    max_tokens: int = 15


def prepare(recipes: Iterable[Recipe], folder: Path, config: StoreConfig) -> dict:
    """Write the store in one pass over the source and one over its text; return the data card.

    The store appears under its name only when it is whole; an older store there is replaced.

    Raises:
        DataError: a duplicate id, a split without pairs (train, val, test), or fewer ingredients than classes.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        card = _write_store(recipes, partial, config)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    # A notebook that prepares twice must not see the photos of the first store.
    _open.cache_clear()
    _read_row_group.cache_clear()
    return card


def _write_store(recipes: Iterable[Recipe], partial: Path, config: StoreConfig) -> dict:
    counts, skipped = _write_recipes(recipes, partial, config)
    if not counts.get("train"):
        raise DataError("no training recipe has a photo that can be read; nothing to learn retrieval from")
    if not counts.get("val") or not set(counts) - {"train", "val", TEXT_ONLY}:
        raise DataError("no pair fell into the validation or into a test split; add recipes or raise the shares")

    tokenizer = train_tokenizer(_texts(partial / "train"), config.min_word_count)
    names = (row for batch in _columns(partial / "train", ["names"]) for row in batch["names"])
    classes = IngredientClasses.from_recipes(names, config.ingredient_classes)
    for split in counts:
        for path in sorted((partial / split).glob("*.recipes.parquet")):
            _write_tokens(path, tokenizer, classes, config)

    tokenizer.save(str(partial / "tokenizer.json"))
    classes.save(partial / "classes.csv")
    card = {
        "recipes": counts,
        "vocabulary": tokenizer.get_vocab_size(),
        "ingredient_classes": dict(zip(classes.names, classes.counts, strict=True)),
        "examples": next(_columns(partial / "train", ["id", "title", "ingredients", "instructions"]))["title"][:5],
        "skipped": skipped,
        "config": vars(config),
        "sha256": _digest(partial),
    }
    (partial / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False), encoding="utf-8")
    return card


def _digest(folder: Path) -> str:
    """Of all shards: photos too, which may change while every count stays."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.parquet")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _write_recipes(recipes: Iterable[Recipe], folder: Path, config: StoreConfig) -> tuple[dict[str, int], list[str]]:
    """Stream the source into one open shard a split; memory holds at most a shard of each."""
    buffers: dict[str, list[dict]] = {}
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    skipped: list[str] = []

    def flush(split: str) -> None:
        rows = buffers.pop(split, [])
        if rows:
            (folder / split).mkdir(exist_ok=True)
            shard = (counts[split] - 1) // SHARD
            # JPEG bytes do not compress: spending time on them would slow every later read.
            pq.write_table(
                pa.Table.from_pylist(rows, schema=_schema()),
                folder / split / f"{shard:05d}.recipes.parquet",
                row_group_size=ROW_GROUP,
                compression={"images": "none"} | {name: "zstd" for name in ("id", "title")},
            )

    for recipe in tqdm(recipes, desc="recipes", unit="", mininterval=5, maxinterval=30, disable=None):
        if recipe.id in seen:
            raise DataError(f"recipe {recipe.id}: the id is there twice; ids must be unique over all splits")
        seen.add(recipe.id)
        photos = _photos(recipe, config.image_size, skipped)
        split = recipe.split if photos else TEXT_ONLY
        if not photos and recipe.split != "train":
            skipped.append(f"recipe {recipe.id}: no photo in split {recipe.split}; cannot be a candidate")
            continue
        counts[split] += 1
        buffers.setdefault(split, []).append(
            {
                "id": recipe.id,
                "title": recipe.title,
                "ingredients": recipe.ingredients,
                "instructions": recipe.instructions,
                "names": recipe.names or [ingredient_name(line) for line in recipe.ingredients],
                "images": photos,
                "truth": json.dumps(recipe.truth, ensure_ascii=False),
            }
        )
        if counts[split] % SHARD == 0:
            flush(split)
    for split in list(buffers):
        flush(split)
    return dict(sorted(counts.items())), skipped


def _photos(recipe: Recipe, size: int, skipped: list[str]) -> list[bytes]:
    photos = []
    for image in recipe.images:
        try:
            photos.append(to_jpeg(read_image(image) if isinstance(image, Path) else image, size))
        except ImageError as error:
            skipped.append(f"recipe {recipe.id}: {error}")
    return photos


def _schema() -> pa.Schema:
    strings = pa.list_(pa.string())
    return pa.schema(
        [
            ("id", pa.string()),
            ("title", pa.string()),
            ("ingredients", strings),
            ("instructions", strings),
            ("names", strings),
            ("images", pa.list_(pa.binary())),
            ("truth", pa.string()),
        ]
    )


def _columns(folder: Path, columns: list[str]) -> Iterator[dict[str, list]]:
    for path in sorted(folder.glob("*.recipes.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(columns=columns):
            yield batch.to_pydict()


def _texts(folder: Path) -> Iterator[str]:
    for batch in _columns(folder, ["title", "ingredients", "instructions"]):
        yield from batch["title"]
        for lines in batch["ingredients"] + batch["instructions"]:
            yield from lines


def _write_tokens(path: Path, tokenizer: Tokenizer, classes: IngredientClasses, config: StoreConfig) -> None:
    """Token ids beside a recipe shard. Sentence 0 is the title, then come the ingredient lines, then the steps."""
    rows = []
    table = pq.read_table(path, columns=["title", "ingredients", "instructions", "names"])
    for title, ingredients, instructions, names in zip(*(column.to_pylist() for column in table), strict=True):
        kept = [i for i, line in enumerate(ingredients) if line.split()][: config.max_sentences]
        lines = encode_sentences(tokenizer, [ingredients[i] for i in kept], config.max_tokens)
        steps = [step for step in instructions if step.split()][: config.max_sentences]
        labels = [(kept.index(i) if i in kept else -1, label) for i, label in classes.label(names)]
        rows.append(
            {
                "sentences": [
                    encode_sentences(tokenizer, [title], config.max_tokens)[0],
                    *lines,
                    *encode_sentences(tokenizer, steps, config.max_tokens),
                ],
                "ingredient_lines": len(lines),
                "labels": [label for _, label in labels],
                "positions": [position for position, _ in labels],
            }
        )
    schema = pa.schema(
        [
            ("sentences", pa.list_(pa.list_(pa.int32()))),
            ("ingredient_lines", pa.int32()),
            ("labels", pa.list_(pa.int32())),
            ("positions", pa.list_(pa.int32())),
        ]
    )
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema),
        path.with_name(path.name.replace("recipes", "tokens")),
        compression="zstd",
    )


class Store:
    """A prepared data set on disk."""

    def __init__(self, folder: Path):
        if not (folder / "card.json").is_file():
            raise DataError(f"{folder}: no prepared data here; run notebook 01_data_preparation first")
        self.folder = folder
        self.card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        self.classes = IngredientClasses.load(folder / "classes.csv")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    @property
    def test_splits(self) -> list[str]:
        """Every split that is neither for training nor for choosing a checkpoint; the plainest first."""
        order = {"iid": 0, "test": 0, "do_context": 1, "do_ingredients": 2}
        names = set(self.card["recipes"]) - {"train", "val", TEXT_ONLY}
        return sorted(names, key=lambda name: (order.get(name, 3), name))

    def split(self, name: str) -> Split:
        if name not in self.card["recipes"]:
            raise DataError(f"{self.folder}: no split {name!r}; it has {', '.join(self.card['recipes'])}")
        return Split(self.folder / name, len(self.classes.names))


class Split:
    """The recipes of one split, by row number."""

    def __init__(self, folder: Path, num_classes: int):
        self.name = folder.name
        self.num_classes = num_classes
        self._shards = sorted(folder.glob("*.recipes.parquet"))
        tokens = pa.concat_tables([pq.read_table(p) for p in sorted(folder.glob("*.tokens.parquet"))]).combine_chunks()
        sentences = _list(tokens["sentences"])
        words = sentences.values
        # Flat arrays: no Python object a sentence, and forked workers share the pages.
        self.words = words.values.to_numpy()
        self.sentence_start = words.offsets.to_numpy()  # (sentences + 1,)
        self.recipe_start = sentences.offsets.to_numpy()  # (recipes + 1,)
        self.ingredient_lines = tokens["ingredient_lines"].to_numpy()
        labels = _list(tokens["labels"])
        self.labels, self.label_start = labels.values.to_numpy(), labels.offsets.to_numpy()
        self.positions = _list(tokens["positions"]).values.to_numpy()

    def __len__(self) -> int:
        return len(self.ingredient_lines)

    @cached_property
    def ids(self) -> list[str]:
        return self._column("id")

    @cached_property
    def titles(self) -> list[str]:
        return self._column("title")

    @cached_property
    def truth(self) -> list[dict]:
        """Causal variables of each synthetic dish; empty dicts for real recipes."""
        return [json.loads(text) for text in self._column("truth")]

    def recipe(self, row: int) -> dict:
        """Text fields of one recipe."""
        table = self._row_group(row, ("id", "title", "ingredients", "instructions", "names"))
        return table.slice(row % SHARD % ROW_GROUP, 1).to_pylist()[0]

    def photos(self, row: int) -> list[bytes]:
        """JPEG bytes of the recipe's photos."""
        return self._row_group(row, ("images",))["images"][row % SHARD % ROW_GROUP].as_py()

    def label_matrix(self, rows: np.ndarray | None = None) -> np.ndarray:
        """(rows, K) bool: which ingredient classes each recipe holds."""
        rows = np.arange(len(self)) if rows is None else rows
        matrix = np.zeros((len(rows), self.num_classes), bool)
        for i, row in enumerate(rows):
            matrix[i, self.labels[self.label_start[row] : self.label_start[row + 1]]] = True
        return matrix

    def _column(self, name: str) -> list:
        return [value for path in self._shards for value in pq.read_table(path, columns=[name])[name].to_pylist()]

    def _row_group(self, row: int, columns: tuple[str, ...]) -> pa.Table:
        return _read_row_group(self._shards[row // SHARD], row % SHARD // ROW_GROUP, columns)


def _list(column: pa.ChunkedArray) -> pa.ListArray:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


@lru_cache(maxsize=64)
def _open(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, memory_map=True)


@lru_cache(maxsize=256)  # 8,192 recipes: a small study stays in memory, a large one stays bounded
def _read_row_group(path: Path, group: int, columns: tuple[str, ...]) -> pa.Table:
    return _open(path).read_row_group(group, columns=list(columns), use_threads=False)
