"""The prepared data: text, photos (resized JPEG bytes), token ids and ingredient labels, in shards.

    <folder>/card.json classes.csv tokenizer.json left_out.txt
    <folder>/<split>/00000.recipes.parquet   what the source gave, and the size of each photo
    <folder>/<split>/00000.jpegs             the photos, one after the other
    <folder>/<split>/00000.given.parquet     description and folders of segments that the source has, where it has any
    <folder>/<split>/00000.tokens.parquet    token ids and labels, row for row
    <folder>/shards/                         what each shard was made from

`prepare` writes it; `derived` adds descriptions and segments, `categories` kinds of dishes, `word_vectors` vectors of
words, each where a system wants them. Nothing is tokenised or resized
again in training. Token ids of a split live in memory as flat arrays (Recipe1M: about 250 MB); a photo is one read of a
file at a known place.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from recipe_lib.data.ingredients import IngredientClasses
from recipe_lib.data.recipe import DataError
from recipe_lib.paths import study_dir

TEXT_ONLY = "text_only"  # training recipes without a photo: they train the self-supervised loss alone


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
        extras = {kind: self.card[kind] for kind in ("descriptions", "segments", "categories") if kind in self.card}
        return Split(self.folder / name, len(self.classes.names), extras, self.card.get("sha256", ""))


def study_store(study: str) -> Store:
    """What notebook 1 of a study prepared."""
    return Store(study_dir(study) / "01_data_preparation" / "data")


class Split:
    """The recipes of one split, by row number."""

    def __init__(self, folder: Path, num_classes: int, extras: Mapping[str, dict], sha256: str = ""):
        self.name = folder.name
        self.num_classes = num_classes
        self.sha256 = sha256  # of the store
        self.extras = extras  # what the card says of "descriptions", "segments" and "categories", where there are any
        self._folder, self._shards = folder, sorted(folder.glob("*.recipes.parquet"))
        shards = [pq.ParquetFile(path).read() for path in sorted(folder.glob("*.tokens.parquet"))]
        self._first_row = np.cumsum([0, *(len(shard) for shard in shards[:-1])])
        tokens = pa.concat_tables(shards).combine_chunks()
        sentences = _list(tokens["sentences"])
        words = sentences.values
        # Flat arrays: no Python object per sentence, and forked workers share the pages.
        self.words = _flat(words.values)
        self.sentence_start = _flat(words.offsets)  # (sentences + 1,)
        self.recipe_start = _flat(sentences.offsets)  # (recipes + 1,)
        self.ingredient_lines = _flat(tokens["ingredient_lines"].combine_chunks())
        labels = _list(tokens["labels"])
        self.labels, self.label_start = _flat(labels.values), _flat(labels.offsets)
        self.positions = _flat(_list(tokens["positions"]).values)

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
        shard, row = self._place(row)
        columns = ["id", "title", "ingredients", "instructions", "names"]
        with pq.ParquetFile(self._shards[shard]) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row < rows:
                    return file.read_row_group(group, columns=columns).slice(row, 1).to_pylist()[0]
                row -= rows
        raise IndexError(f"{self._shards[shard]}: shorter than its token ids; prepare the data again")

    def photo_count(self, row: int) -> int:
        """Photos of a recipe."""
        return int(self.photo_start[row + 1] - self.photo_start[row])

    def photo(self, row: int, which: int = 0) -> bytes:
        """JPEG bytes of one of the recipe's photos."""
        return self._read("jpegs", row, self._photo_bounds, int(self.photo_start[row]) + which, 1)[0]

    @cached_property
    def photo_start(self) -> np.ndarray:
        """(recipes + 1,) photos before each recipe."""
        return _flat(self._photo_sizes.offsets)

    @cached_property
    def categories(self) -> np.ndarray:
        """(N,) int64, the kind of dish of each recipe, -1 for none; see `categories`."""
        return np.array(self._column("category", "categories"), np.int64)

    @property
    def descriptions(self) -> list[str]:
        """What each dish looks like, as imagined from the recipe."""
        return self._column("text", "descriptions")

    def description_tokens(self, rows: np.ndarray) -> np.ndarray:
        """(rows, L) int64 ids of CLIP, padded with 0."""
        values, start = self._description_ids
        return padded(values, start[rows], np.diff(start)[rows], 0)

    def segments(self, row: int, which: int = 0) -> list[bytes]:
        """JPEG bytes of the segments of one of the recipe's photos, best first; there may be none."""
        start, bounds = self._segment_start, self._segment_bounds
        photo = int(self.photo_start[row]) + which
        return self._read("segments.jpegs", row, bounds, int(start[photo]), int(start[photo + 1] - start[photo]))

    @cached_property
    def segment_counts(self) -> np.ndarray:
        """(photos,) segments of each photo."""
        return np.diff(self._segment_start)

    @cached_property
    def foreground(self) -> np.ndarray | None:
        """(photos, bytes) uint8: where the dish of each photo lies, bits of a square mask; None without segments."""
        if "segments" not in self.extras:
            return None
        masks = self._table("foreground", "segments").to_pylist()
        cells = max(map(len, masks), default=0)
        return np.frombuffer(b"".join(mask.ljust(cells, b"\0") for mask in masks), np.uint8).reshape(len(masks), cells)

    def label_matrix(self, rows: np.ndarray | None = None) -> np.ndarray:
        """(rows, K) bool: which ingredient classes each recipe holds."""
        rows = np.arange(len(self)) if rows is None else rows
        matrix = np.zeros((len(rows), self.num_classes), bool)
        for i, row in enumerate(rows):
            matrix[i, self.labels[self.label_start[row] : self.label_start[row + 1]]] = True
        return matrix

    @property
    def knows_visible(self) -> bool:
        """Whether it is known which ingredients show in each photo: the kitchen knows."""
        return bool(len(self)) and "visible" in self.truth[0]

    def visible_matrix(self, rows: np.ndarray) -> np.ndarray:
        """(rows, K) bool: those of the labels whose ingredient shows in the photo."""
        matrix = np.zeros((len(rows), self.num_classes), bool)
        for i, row in enumerate(rows):
            own = slice(self.label_start[row], self.label_start[row + 1])
            matrix[i, self.labels[own]] = np.array(self.truth[row]["visible"])[self.positions[own]]
        return matrix

    def _column(self, name: str, kind: str = "recipes") -> list:
        return self._table(name, kind).to_pylist()

    def _table(self, name: str, kind: str) -> pa.ChunkedArray:
        """A column of one kind of the shards' Parquet files."""
        if kind != "recipes" and kind not in self.extras:
            raise DataError(
                f"{self._folder}: no {kind} here; prepare the data with them (notebook 01_data_preparation)"
            )
        paths = [path.with_name(f"{path.name[:5]}.{kind}.parquet") for path in self._shards]
        return pa.chunked_array([chunk for path in paths for chunk in pq.ParquetFile(path).read([name])[name].chunks])

    def _place(self, row: int) -> tuple[int, int]:
        """Shard of a row, and its row in there."""
        shard = int(np.searchsorted(self._first_row, row, "right")) - 1
        return shard, row - int(self._first_row[shard])

    def _read(self, kind: str, row: int, bounds: np.ndarray, first: int, count: int) -> list[bytes]:
        """Some pictures that lie together in the shard of a row; bounds (pictures + 1,): bytes before each."""
        shard, _ = self._place(row)
        photo = self.photo_start[self._first_row[shard]]
        begin = bounds[photo if kind == "jpegs" else self._segment_start[photo]]
        ends = bounds[first : first + count + 1]
        # Opened each time: a few microseconds, and no number of shards runs out of file handles.
        with open(self._shards[shard].with_name(f"{self._shards[shard].name[:5]}.{kind}"), "rb", buffering=0) as file:
            data = os.pread(file.fileno(), int(ends[-1] - ends[0]), int(ends[0] - begin))
        return [data[a:b] for a, b in itertools.pairwise((ends - ends[0]).tolist())]

    @cached_property
    def _photo_sizes(self) -> pa.ListArray:
        return _list(self._table("photo_bytes", "recipes"))

    @cached_property
    def _photo_bounds(self) -> np.ndarray:
        """(photos + 1,) bytes of photos before each photo, over all shards."""
        return np.concatenate([[0], np.cumsum(_flat(self._photo_sizes.values))])

    @cached_property
    def _description_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids one after the other; (recipes + 1,) where each description begins."""
        tokens = _list(self._table("tokens", "descriptions"))
        return _flat(tokens.values), _flat(tokens.offsets)

    @cached_property
    def _segment_sizes(self) -> pa.ListArray:
        return _list(self._table("segment_bytes", "segments"))

    @cached_property
    def _segment_start(self) -> np.ndarray:
        """(photos + 1,) segments before each photo."""
        return _flat(self._segment_sizes.offsets)

    @cached_property
    def _segment_bounds(self) -> np.ndarray:
        """(segments + 1,) bytes of segments before each segment, over all shards."""
        return np.concatenate([[0], np.cumsum(_flat(self._segment_sizes.values))])


def _flat(array: pa.Array) -> np.ndarray:
    """Numbers where they lie. `to_numpy`, like `read_table`, would import pandas, for which a search has to wait."""
    return np.from_dlpack(array)


def padded(values: np.ndarray, start: np.ndarray, length: np.ndarray, fill: int) -> np.ndarray:
    """(rows, L) int64: of a flat array what begins at start (rows,), length (rows,) of it, then `fill`."""
    column = np.arange(length.max())
    inside = column < length[:, None]
    out = np.full(inside.shape, fill, np.int64)
    out[inside] = values[(start[:, None] + column)[inside]]
    return out


def _list(column: pa.ChunkedArray) -> pa.ListArray:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
