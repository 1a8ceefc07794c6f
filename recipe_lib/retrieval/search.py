"""Nearest recipes of a photo: a search index over recipe embeddings, exact or approximate, saved with its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

Array = np.ndarray | Tensor
FILES = ("index.faiss", "recipes.parquet")


@dataclass
class SearchIndex:
    """Recipes by cosine similarity.

    Kind "exact" keeps float32 vectors and scans all; "approximate" keeps a byte per number, in sqrt(N) clusters of
    which it scans the nearest eighth: a quarter of the memory, similarities good to about 0.001.
    """

    index: faiss.Index
    ids: np.ndarray  # (N,) str
    titles: np.ndarray  # (N,) str

    @classmethod
    def build(cls, embeddings: Array, ids: Sequence[str], titles: Sequence[str], kind: str = "exact") -> SearchIndex:
        """Index (N, D) embeddings; a ValueError says what is wrong with sizes, kind or an embedding."""
        n, d = embeddings.shape
        if not 0 < n == len(ids) == len(titles):
            raise ValueError(f"{n} embeddings, {len(ids)} ids and {len(titles)} titles must be equally many")
        lists = max(1, min(isqrt(n), n // 39))  # k-means wants 39 vectors per cluster
        if kind not in (kinds := {"exact": "Flat", "approximate": f"IVF{lists},SQ8"}):
            raise ValueError(f"kind of index {kind!r}; one of {', '.join(kinds)}")
        index = faiss.index_factory(d, kinds[kind], faiss.METRIC_INNER_PRODUCT)
        if kind == "approximate":
            index.nprobe = -(-lists // 8)
            index.train(_unit(embeddings, np.random.default_rng(0).permutation(n)[: 64 * lists + 1000]))
        for rows in np.split(np.arange(n), range(1 << 14, n, 1 << 14)):
            index.add(_unit(embeddings, rows))
        return cls(index, np.asarray(ids, object), np.asarray(titles, object))

    def search(self, queries: Array, k: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, titles, similarities, (Q, k) each, best first, of the k recipes (at most N) nearest to (Q, D).

        A ValueError as `nearest`.
        """
        rows, similarity = self.nearest(queries, k)
        return self.ids[rows], self.titles[rows], similarity

    def nearest(self, queries: Array, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """Rows and similarities, (Q, k) each, best first, of the k embeddings (at most N) nearest to (Q, D).

        A ValueError for queries of another width, zero or not finite.
        """
        if queries.ndim != 2 or queries.shape[1] != self.index.d:
            raise ValueError(f"queries {tuple(queries.shape)} must be (Q, {self.index.d})")
        queries, k = _unit(queries, np.arange(len(queries)), "query"), min(k, self.index.ntotal)
        similarity, rows = self.index.search(queries, k)
        if (rows < 0).any():  # too few in the clusters looked into
            every = faiss.SearchParametersIVF(nprobe=self.index.nlist)
            similarity, rows = self.index.search(queries, k, params=every)
        return rows, similarity

    def save(self, folder: Path) -> None:
        """Write index.faiss and recipes.parquet; each appears under its name only when complete."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = [folder / f"{name}.partial" for name in FILES]
        faiss.write_index(self.index, str(partial[0]))
        pq.write_table(pa.table({"id": self.ids, "title": self.titles}), partial[1])
        for path, name in zip(partial, FILES, strict=True):
            path.replace(folder / name)

    @classmethod
    def load(cls, folder: Path) -> SearchIndex:
        """What `save` wrote, if you trust its folder: faiss is not safe against forged files.

        A ValueError names the file that is missing or broken, or not of the same index as the other.
        """
        read_parts = []
        for name, read in zip(
            FILES, (lambda path: faiss.read_index(str(path)), lambda path: pq.ParquetFile(path).read()), strict=True
        ):
            try:
                read_parts.append(read(folder / name))
            except Exception as error:  # faiss and pyarrow raise many kinds
                raise ValueError(f"{folder / name}: not there, or broken") from error
        index, recipes = read_parts
        if recipes.column_names != ["id", "title"] or len(recipes) != index.ntotal:
            raise ValueError(f"{folder / FILES[1]}: not the ids and titles of the {index.ntotal} recipes in {FILES[0]}")
        return cls(index, *(np.array(recipes[name].to_pylist(), object) for name in ("id", "title")))


def _unit(x: Array, rows: np.ndarray, name: str = "embedding") -> np.ndarray:
    """Some rows of (N, D) as float32 unit vectors; an error names the row of x."""
    x = x[rows]
    x = np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    if (bad := ~(np.isfinite(norm) & (norm > 0))[:, 0]).any():
        raise ValueError(f"{name} {rows[bad.argmax()]} is zero or not finite")
    return (x / norm).astype(np.float32)
