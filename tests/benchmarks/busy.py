"""A training step on an idle machine and beside other processes that never wait, by how OpenMP's threads wait.

    python -m tests.benchmarks.busy [--steps 12] [--rounds 3] [--loops 0 1 2]

The kitchen's system and batch. Each number is the median of the rounds, in which the ways to wait take turns, so that
a machine that is busy with other things is so for all; each round is a process, for OpenMP reads its settings once.
The study sets none of them: what a user sets holds, and libgomp's own way was the best beside one busy process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from statistics import median
from types import SimpleNamespace

import torch

from recipe_lib.losses import triplet_loss
from recipe_lib.systems.base import SystemConfig
from recipe_lib.systems.registry import build
from tests.benchmarks import finish, in_child, table

OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
WAYS = {
    "libgomp's own": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
    "100,000 spins": {"GOMP_SPINCOUNT": "100000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def step_seconds(steps: int) -> float:
    """Median seconds of a training step after two."""
    torch.manual_seed(0)
    config = SystemConfig(
        500, 40, image_model="test_resnet", image_model_args=("output_stride: 16",), embed_dim=256, recipe_dim=128,
        recipe_layers=1, recipe_feedforward=256,
    )  # fmt: skip
    system = build(config)
    optimizer = torch.optim.AdamW(system.parameters(), 2e-3, fused=True)
    photos, recipes = torch.randint(0, 256, (64, 3, 56, 56), dtype=torch.uint8), torch.randn(64, 256)
    recipes = torch.nn.functional.normalize(recipes, dim=1)
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            embedding = system.encode_images(SimpleNamespace(images=photos, labels=None)).embedding
        triplet_loss(torch.nn.functional.normalize(embedding.float(), dim=1), recipes, margin=0.3).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return median(times[2:])


def measure(way: str, steps: int, loops: int) -> float:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    kept = {name: os.environ.pop(name) for name in OPENMP if name in os.environ}
    os.environ.update(WAYS[way])
    try:
        return in_child("tests.benchmarks.busy", "--child", "--steps", steps)["seconds"]
    finally:
        for name in WAYS[way]:
            del os.environ[name]
        os.environ.update(kept)
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        finish(seconds=step_seconds(args.steps))
        return
    rows = []
    times = {(way, loops): [] for loops in args.loops for way in WAYS}
    for _ in range(args.rounds):
        for way, loops in times:
            times[way, loops].append(measure(way, args.steps, loops))
    for way in WAYS:
        ms = {loops: 1000 * median(times[way, loops]) for loops in args.loops}
        row = {"threads wait": way} | {f"ms beside {loops}": value for loops, value in ms.items()}
        rows.append(row | {f"x own at {loops}": value / ms[args.loops[0]] for loops, value in ms.items()})
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
