"""Preparation at the size of Recipe1M: a million made-up recipes in the official layout, imported, labelled, tokenised.

    python -m tests.benchmarks.preparation [--recipes 1000000] [--pairs 20000] [--folder DIR]

Texts are random but as long and as varied as real ones (about 9 ingredient lines and 9 steps, 150 words, hardly a line
twice). Photos are 64 pixels wide: what is measured is text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from recipe_lib.data.images import to_jpeg
from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.sources.recipe1m import read_recipe1m

UNITS = ["cup", "cups", "teaspoon", "tablespoons", "ounces", "g", "pound", "large", "small", "tbsp", "tsp", "ml"]
CUTS = ["chopped", "finely diced", "sliced", "peeled and grated", "divided", "melted", "at room temperature", "drained"]


def write_layers(folder: Path, recipes: int, pairs: int, seed: int = 0) -> None:
    """layer1.json, layer2.json and photos; every 51st of the pairs is for validation, every 52nd for test."""
    rng = np.random.default_rng(seed)
    words = np.array([f"{a}{b}{c}" for a in "bcdfghklmnprstvw" for b in ("a", "e", "ilo", "oru", "u") for c in _ends()])
    names = np.array([" ".join(rng.choice(words, n)) for n in rng.integers(1, 4, 8000)])
    folder.mkdir(parents=True)
    jpegs = [to_jpeg(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), 64) for _ in range(16)]
    for number, jpeg in enumerate(jpegs):
        (folder / f".{number}.jpg").write_bytes(jpeg)
    with open(folder / "layer1.json", "w") as one, open(folder / "layer2.json", "w") as two:
        one.write("[")
        two.write("[")
        for start in range(0, recipes, 5000):
            block = _block(rng, min(5000, recipes - start), words, names)
            for number, (title, lines, steps) in enumerate(block, start):
                id_, pair = f"{number * 2654435761 % 2**40:010x}", number * pairs // recipes
                partition = {0: "val", 1: "test"}.get(pair % 51, "train")
                entry = {
                    "id": id_,
                    "title": title,
                    "partition": partition,
                    "url": "",
                    "ingredients": [{"text": line} for line in lines],
                    "instructions": [{"text": step} for step in steps],
                }
                one.write(", " * bool(number) + json.dumps(entry))
                if pair < (number + 1) * pairs // recipes:
                    photo = folder / partition / id_[0] / id_[1] / id_[2] / id_[3] / f"{id_}.jpg"
                    photo.parent.mkdir(parents=True, exist_ok=True)
                    os.link(folder / f".{number % 16}.jpg", photo)
                    two.write(", " * bool(pair) + json.dumps({"id": id_, "images": [{"id": photo.name, "url": ""}]}))
        one.write("]")
        two.write("]")


def _ends() -> list[str]:
    return [f"{a}{b}{c}" for a in "bdklmnrst" for b in "aeiou" for c in ("", "l", "n", "r", "s", "t", "nd", "sh", "ck")]


def _block(rng: np.random.Generator, size: int, words: np.ndarray, names: np.ndarray):
    zipf = words[np.minimum(rng.zipf(1.25, size * 140) - 1, len(words) - 1)]
    named = names[np.minimum(rng.zipf(1.4, size * 9) - 1, len(names) - 1)]
    amounts, units, cuts = rng.integers(1, 16, size * 9), rng.choice(UNITS, size * 9), rng.choice(CUTS, size * 9)
    for i in range(size):
        own = zipf[i * 140 : (i + 1) * 140].tolist()
        lines = [f"{amounts[j]} {units[j]} {named[j]}, {cuts[j]}" for j in range(i * 9, i * 9 + 9)]
        cut = sorted({5, *rng.integers(6, 139, 9).tolist(), 140})
        yield " ".join(own[:5]), lines, [" ".join(own[a:b]) + "." for a, b in itertools.pairwise(cut)]


class PeakMemory(threading.Thread):
    """Highest sum of the memory of this process and its children; pages that they share count once."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.done = 0, threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.done.wait(0.5):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder, deleted at the end")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="preparation-"))
    try:
        began = time.perf_counter()
        write_layers(folder / "recipe1m", args.recipes, args.pairs)
        size = sum((folder / "recipe1m" / name).stat().st_size for name in ("layer1.json", "layer2.json"))
        print(f"{args.recipes:,} recipes, {args.pairs:,} pairs, {size / 1e6:,.0f} MB of JSON,", end=" ")
        print(f"written in {time.perf_counter() - began:.0f} s", flush=True)

        print("| | seconds | recipes/s | peak memory, MB |\n|---|---|---|---|")
        for what in ("import, label and tokenise", "the same again: every shard is taken over"):
            memory = PeakMemory()
            memory.start()
            began = time.perf_counter()
            recipes, report = read_recipe1m(folder / "recipe1m")
            card = prepare(recipes, folder / "data", StoreConfig(64, 10, 500))
            seconds = time.perf_counter() - began
            memory.done.set()
            memory.join()
            print(f"| {what} | {seconds:.0f} | {args.recipes / seconds:,.0f} | {memory.peak / 1e6:,.0f} |", flush=True)
        stored = sum(card["recipes"].values())
        print(f"stored {stored:,}: {card['recipes']}; without photo, not stored: {card['without_photo']}")
        print(f"vocabulary {card['vocabulary']:,}; {str(report).splitlines()[0]}")
        assert stored + sum(card["without_photo"].values()) == args.recipes and not card["left_out"]
    finally:
        if not args.folder:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
