"""Top-10 recipes of one photo among a million: time, memory and recall of the exact and the approximate index.

Synthetic embeddings: recipes lie around `clusters` dishes (cosine about 0.7 to the centre), and a photo is a recipe
with noise (cosine about 0.7 to it). "whole" is all that an answer takes besides encoding: the ten nearest recipes, each
text once, read with their ingredients and steps from shards of a prepared kitchen that is linked until it is as large.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.store import Store
from recipe_lib.kitchen.model import KitchenConfig, cook
from recipe_lib.retrieval.search import SearchIndex
from recipe_lib.search.engine import Part, RecipeSearch
from tests.benchmarks import finish, in_child, table


def world(n: int, d: int, clusters: int, photos: int) -> tuple[np.ndarray, np.ndarray]:
    """Recipes (n, d) and photos (photos, d), float32, in pieces that keep the peak near the recipes' own size."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((clusters, d), np.float32)
    recipes = np.empty((n, d), np.float32)
    for start in range(0, n, 1 << 15):
        piece = recipes[start : start + (1 << 15)]
        piece[:] = centres[rng.integers(clusters, size=len(piece))] + rng.standard_normal(piece.shape, np.float32)
    queries = recipes[rng.integers(n, size=photos)]
    return recipes, queries + 1.4 * rng.standard_normal(queries.shape, np.float32)


def answers(index: SearchIndex, folder: Path) -> Callable[[np.ndarray], list]:
    """What the search page does with a query embedding, over an index and as many recipes on disk."""
    kitchen = KitchenConfig(train=2048 - 2, val=1, test=1, image_size=64)
    recipes = (recipe for recipe in cook(kitchen) if recipe.split in ("train", "val", "iid"))
    prepare(recipes, folder / "kitchen", StoreConfig(64, ingredient_classes=60))
    split, shard = folder / "kitchen/train", [*(folder / "kitchen/train").iterdir()]
    rows = len(Store(folder / "kitchen").split("train"))
    for number in range(1, -(-len(index.ids) // rows)):
        for file in shard:
            os.link(file, split / f"{number:05d}{file.name[5:]}")
    part = Part("all", Store(folder / "kitchen").split("train"), "all", "")
    search = RecipeSearch.__new__(RecipeSearch)
    search.parts, search._kept = [part], {"recipes": [index]}
    return lambda query: [hit.recipe for hit in search._nearest("recipes", query, 10, None)]


def measure(kind: str, n: int, d: int, clusters: int, photos: int, folder: Path) -> None:
    """Build, save, load and search one photo at a time."""
    recipes, queries = world(n, d, clusters, photos)
    names = [f"{i:010x}" for i in range(n)]
    start = time.perf_counter()
    SearchIndex.build(recipes, names, names, kind).save(folder)
    built = time.perf_counter() - start
    del recipes
    start = time.perf_counter()
    index = SearchIndex.load(folder)
    loaded = time.perf_counter() - start
    times, hits = [], []
    for query in queries:
        start = time.perf_counter()
        hits.append(index.search(query[None])[0][0].tolist())
        times.append(1e3 * (time.perf_counter() - start))
    whole, answer = [], answers(index, folder)
    for query in queries:
        start = time.perf_counter()
        assert len(answer(query[None])) == 10
        whole.append(1e3 * (time.perf_counter() - start))
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e9
    finish(
        build=built,
        load=loaded,
        file=size,
        median=float(np.median(times)),
        slow=float(np.quantile(times, 0.95)),
        whole=float(np.median(whole)),
        whole_slow=float(np.quantile(whole, 0.95)),
        hits=hits,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--clusters", type=int, default=10_000)
    parser.add_argument("--photos", type=int, default=100)
    parser.add_argument("--child", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = (given.n, given.d, given.clusters, given.photos)
    if given.child:
        measure(given.child[0], *sizes, Path(given.child[1]))
        raise SystemExit
    rows, hits = [], {}
    for kind in ("exact", "approximate"):
        with tempfile.TemporaryDirectory() as folder:
            options = [f"--{name}={value}" for name, value in zip(("n", "d", "clusters", "photos"), sizes, strict=True)]
            row = in_child("tests.benchmarks.search", *options, "--child", kind, folder)
        hits[kind] = row.pop("hits")
        shares = [len(set(a) & set(b)) / len(a) for a, b in zip(hits["exact"], hits[kind], strict=True)]
        rows.append(
            {
                "index": kind,
                "build s": row["build"],
                "load s": row["load"],
                "file GB": row["file"],
                "one photo ms": row["median"],
                "95 % ms": row["slow"],
                "whole ms": row["whole"],
                "whole 95 % ms": row["whole_slow"],
                "recall@10": float(np.mean(shares)),
                "peak GB": row["gb"],
            }
        )
    print(
        f"{given.n:,} recipes around {given.clusters:,} dishes, D = {given.d}, {given.photos} photos\n\n{table(rows)}"
    )
