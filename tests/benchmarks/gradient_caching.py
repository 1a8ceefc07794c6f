"""Large batches in the memory of a small one: a training step of TNLBT with and without gradient caching.

    python -m tests.benchmarks.gradient_caching [--batches 64 256 1024 4096] [--chunk 64] [--method tnlbt] [--runs 1]

At the kitchen's size on its photos of 56 pixels: forward, backward and the moves of all players, each row in a process
of its own. Memory is what its peak is above that of a step of two pairs, which holds weights and libraries. Where the
batch is larger than the kitchen here, pairs are in it several times: the arithmetic is the same.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from recipe_lib.data.loading import Batch, Draw, StudyDataset
from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.store import Store
from recipe_lib.kitchen.model import KitchenConfig, cook
from recipe_lib.losses import triplet_loss
from recipe_lib.systems.base import Step, System, SystemConfig
from recipe_lib.systems.registry import build
from tests.benchmarks import finish, in_child, table

GAME = ("picture: 32", "channels: 16", "code: 32", "noise: 16", "hidden: [64]")


def step(system: System, batch: Batch, chunk: int) -> None:
    """One step of every player."""
    shared: dict = {}
    for player, own in system.players().items():
        optimizer = torch.optim.Adam(own, 1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            who = {"player": player, "chunk": chunk, "shared": shared}
            hardest = partial(triplet_loss, mining="hardest")
            losses = system.losses(Step(batch, hardest, lambda _: 1.0, lambda *parts: parts, lambda _: None, **who))
        torch.stack([*losses.values()]).sum().backward()
        optimizer.step()
        system.zero_grad()


def child(folder: str, method: str, rows: int, chunk: int, runs: int) -> None:
    """Seconds and memory of one row, as JSON."""
    store = Store(Path(folder))
    split = store.split("train")
    batch = StudyDataset(split, 56)[Draw(np.resize(np.arange(len(split)), rows), True, 0)]
    config = SystemConfig(
        store.card["vocabulary"], len(store.classes.names), method=method, image_model="test_resnet",
        image_model_args=("output_stride: 16",), embed_dim=256, recipe_dim=128, recipe_layers=1, recipe_feedforward=256,
        dropout=0.0, system_args=GAME if method == "tnlbt" else (),
    )  # fmt: skip
    torch.manual_seed(0)
    system = build(config).train()
    times = []
    for _ in range(runs):
        start = time.process_time()
        step(system, batch, chunk)
        times.append(time.process_time() - start)
    finish(seconds=min(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--method", default="tnlbt", choices=["ht", "tnlbt"])
    parser.add_argument("--runs", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        kitchen = KitchenConfig(train=1024, val=64, test=64, seed=1)
        prepare(cook(kitchen), data, StoreConfig(64, ingredient_classes=100), workers=1)
        bare = in_child(__spec__.name, "--child", data, args.method, 2, 0, 1)["gb"]
        rows = []
        for batch in args.batches:
            for chunk in dict.fromkeys((0, args.chunk if args.chunk < batch else 0)):
                found = in_child(__spec__.name, "--child", data, args.method, batch, chunk, args.runs)
                rows.append(
                    {
                        "batch": batch,
                        "encoded at a time": chunk or batch,
                        "CPU s per step": found["seconds"],
                        "ms per pair": 1000 * found["seconds"] / batch,
                        "GB above a batch of 2": found["gb"] - bare,
                    }
                )
                print(rows[-1], file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4], *map(int, sys.argv[4:]))
    else:
        main()
