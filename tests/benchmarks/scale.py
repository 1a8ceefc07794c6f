"""The whole study at the size of Recipe1M's test split: kitchen dishes in its official layout, through five notebooks.

    python -m tests.benchmarks.scale [--train 50000] [--test 50000] [--folder DIR]

One epoch of the small default encoders; bags of 1,000 candidates up to the whole test split. Says seconds and highest
memory of each stage, the ranks by number of candidates, and what the same speeds would mean for Recipe1M; for GPUs, an
estimate from counted products and assumed shares of an H100's speed (`on_h100`), until `bench gpu` has measured one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pandas as pd
from torch.utils.flop_counter import FlopCounterMode

from recipe_lib.data.recipe import Recipe
from recipe_lib.kitchen.model import KitchenConfig, cook
from tests.benchmarks.gpu import Case, make_system, parameters, random_batch
from tests.layouts import write_recipe1m

H100 = 989.0  # TFLOP/s of its tensor cores in 16 bits, without sparsity (NVIDIA's data sheet, SXM)
RECIPE1M = {"train": 238_408, "val": 51_119, "test": 51_304}  # pairs


def dishes(train: int, val: int, test: int) -> Iterator[Recipe]:
    """Pairs of the confounded world: train, val and iid."""
    config = KitchenConfig(train=train, val=val, test=test, image_size=64, seed=1)
    return takewhile(lambda recipe: not recipe.split.startswith("do_"), cook(config))


def study(folder: Path, pairs: Path, bags: list[int]) -> Path:
    """Run the five notebooks on what `write_recipe1m` left; the study's folder."""
    options = {
        "study": "scale", "source": "recipe1m", "source_dir": str(pairs), "epochs": 1, "debias_epochs": 1,
        "variants": ["equal_compute", "debiased"], "candidates": bags, "bags": 3,
    }  # fmt: skip
    given = [
        part
        for key, value in options.items()
        for part in ("-p", key, value if isinstance(value, str) else json.dumps(value))
    ]
    command = [sys.executable, "-m", "recipe_lib.runner.run", "params/kitchen.yaml", *given]
    subprocess.run([*command, "--outputs", str(folder)], check=True)
    return folder / "scale"


def teraflops(case: Case, pairs: int = 8) -> float:
    """Products of one pair's step (or of a text-only step's share of it), forward and backward, in 1e12 operations.

    Counted by torch at the sizes of the parameter files, a multiplication and an addition being two. Left out are what
    is no convolution or matrix product, the pairs' similarities, and the optimizer.
    """
    values = parameters(case) | {"batch_size": pairs}
    system = make_system(case, values)
    batch = random_batch(case, system, values, seed=0)
    with FlopCounterMode(display=False) as counter:
        read = system.encode_recipes(batch.recipes).embedding.sum()
        if not case.text_only:
            read = read + system.encode_images(batch).embedding.sum()
        read.backward()
    return counter.get_total_flops() / pairs / 1e12


def on_h100(pairs: int, share: float, epochs: int = 200) -> None:
    """Print how long H-T's baseline and one variant take, 100 + 100 epochs, with the arithmetic.

    Args:
        pairs: of an epoch, each of which comes with two text-only recipes.
        share: of the peak that is reached: an assumption. Small products and the decoding of photos keep it low.
    """
    paired, texts = (teraflops(Case("H-T", text_only=text)) for text in (False, True))
    per_pair = paired + texts
    print(f"\nH-T as in params/recipe1m.yaml: {paired:.3f} TFLOP per pair + {texts:.3f} for two text-only recipes")
    print(
        f"one H100 at {share:.0%} of {H100:g} TFLOP/s: {H100 * share / per_pair:,.0f} pairs/s (assumed, not measured)"
    )
    for devices, kept in ((1, 1.0), (8, 0.9)):
        minutes = pairs * per_pair / (H100 * share * devices * kept) / 60
        print(
            f"{devices} H100, {kept:.0%} of linear: {pairs:,} x {per_pair:.3f} / ({H100:g} x {share:g} x {devices} x"
            f" {kept:g}) / 60 = {minutes:.2f} min per epoch; {epochs} epochs {minutes * epochs / 60:.1f} h"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--val", type=int, default=1_000)
    parser.add_argument("--test", type=int, default=50_000)
    parser.add_argument("--share", type=float, default=0.1, help="of an H100's peak, assumed; default %(default)s")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder, deleted at the end")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="scale-"))
    try:
        began, sizes = time.perf_counter(), (args.train, args.val, args.test)
        write_recipe1m(dishes(*sizes), folder / "recipe1m")
        print(f"{sum(sizes):,} pairs cooked and written in {time.perf_counter() - began:.0f} s", flush=True)
        bags = [size for size in (1000, 10_000, 20_000, 30_000, 40_000, 50_000) if size < args.test]
        done = study(folder, folder / "recipe1m", bags)
        stages = json.loads((done / "manifest.json").read_text(encoding="utf-8"))["stages"]
        print("\n| stage | seconds | peak memory, MB |\n|---|---|---|")
        for name, stage in stages.items():
            print(f"| {name} | {stage['seconds']:.0f} | {stage['peak_memory_mb']:,} |")
        epoch = pd.read_csv(done / "02_baseline_training/history.csv")["seconds"].median()
        results = pd.read_csv(done / "results.csv")
        rows = results[(results["variant"] == "baseline") & (results["direction"] == "i2r")]
        print("\n| candidates | MedR | R@1 | R@10 | ties |\n|---|---|---|---|---|")
        for row in rows.itertuples():
            print(f"| {row.candidates:,} | {row.medr:g} | {row.recall_1:.4f} | {row.recall_10:.4f} | {row.ties:g} |")
        pairs, all_pairs = sum(sizes), sum(RECIPE1M.values())
        prepared, trained = pairs / stages["01_data_preparation"]["seconds"], args.train / epoch
        minutes = all_pairs / prepared / 60
        print(f"\npreparation: {prepared:,.0f} pairs/s; {all_pairs:,} pairs of 64 pixels {minutes:.0f} min")
        print(f"an epoch of the small encoders: {trained:,.0f} pairs/s;", end=" ")
        print(f"{RECIPE1M['train']:,} pairs of the same size {RECIPE1M['train'] / trained / 60:.0f} min here")
        on_h100(RECIPE1M["train"], args.share)
        assert rows["medr"].is_monotonic_increasing, "among more candidates the median rank can only grow"
    finally:
        if not args.folder:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
