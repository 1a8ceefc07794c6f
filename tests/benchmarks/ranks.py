"""Exact ranks against the bare float32 product, against released evaluation code, of bags, and by size.

Embeddings: other pairs have cosines around 0 with deviation 0.1, true pairs around 0.6 ("trained") or 0.37 ("middling",
MedR about 5 of 50,000); in "weak" true pairs stand in the middle of the crowd, the worst for screening. Times are
medians, side by side in one process; memory is the peak of a process of its own, with interpreter and embeddings.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipe_lib.retrieval.metrics import cross_modal_ranks, evaluate
from tests.benchmarks import finish, in_child, side_by_side, table

SIZES = (1000, 10_000, 20_000, 30_000, 40_000, 50_000)


def world(kind: str, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Images and recipes (n, d)."""
    generator = torch.Generator().manual_seed(0)
    if kind == "weak":
        return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)
    directions = torch.randn(100, d, generator=generator)  # 100 independent factors: cosines deviate by 1 / sqrt(100)
    shared = torch.randn(n, 100, generator=generator)
    noise = {"trained": 0.8, "middling": 1.3}[kind]
    images, recipes = (
        (shared + noise * torch.randn(n, 100, generator=generator)) @ directions for _ in ("images", "recipes")
    )
    return images, recipes


def bare(a: Tensor, b: Tensor) -> None:
    """The float32 product alone."""
    for rows in a.split(1024):
        rows @ b.T


def released(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What released code does: the whole matrix of distances, then a query at a time, its ten nearest and its rank."""
    from sklearn.metrics import pairwise_distances

    distances = pairwise_distances(a.numpy(), b.numpy(), metric="cosine")
    ranks = []
    for matrix in (distances, distances.T):
        own = np.empty(len(matrix), np.int64)
        for i, row in enumerate(matrix):
            np.argpartition(row, 10)[:10]
            own[i] = (row <= row[i]).sum()
        ranks.append(own)
    return ranks[0], ranks[1]


def separate(images: Tensor, recipes: Tensor, sizes: list[int], bags: int) -> list[dict]:
    """Bags one after another."""
    rows = []
    for size in sizes:
        rng = np.random.default_rng([0, size])
        for _ in range(bags):
            draw = rng.permutation(len(images))[:size]
            rows.append(cross_modal_ranks(images[draw], recipes[draw], ties=True))
    return rows


WORKS: dict[str, Callable] = {
    "ranks": lambda a, b: cross_modal_ranks(a, b),
    "released": released,
    "bare": bare,
    "bags": lambda a, b: evaluate(a, b, candidates=[s for s in SIZES if s < len(a)]),
}


def measure(work: str, kind: str, n: int, d: int) -> None:
    """One piece of work in this process; with one thread (OMP_NUM_THREADS=1), CPU time."""
    pair = world(kind, n, d)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    WORKS[work](*pair)
    finish(seconds=clock() - start)


def child(*given: object) -> dict:
    return in_child("tests.benchmarks.ranks", "--child", *given)


def growth(kind: str, d: int, sizes: list[int], plot: Path | None) -> list[dict]:
    """Time and memory by number of pairs, and a picture of them."""
    measured = [child("ranks", kind, n, d) for n in sizes]
    if plot:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        _, panes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
        for pane, key, label in zip(panes, ("seconds", "gb"), ("seconds", "peak memory, GB"), strict=True):
            pane.loglog(sizes, [row[key] for row in measured], "o-")
            pane.set(xlabel="pairs N", ylabel=label)
            pane.grid(alpha=0.3, which="both")
        panes[0].loglog(sizes, [measured[-1]["seconds"] * (n / sizes[-1]) ** 2 for n in sizes], ":", label="N²")
        panes[0].legend()
        plt.savefig(plot, dpi=120)
    return [{"N": n, "seconds": row["seconds"], "peak GB": row["gb"]} for n, row in zip(sizes, measured, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--released", type=int, default=20_000, metavar="N", help="pairs for the comparison with it")
    parser.add_argument("--growth", type=int, nargs="*", default=[1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000])
    parser.add_argument("--plot", type=Path, help="PNG of the growth")
    parser.add_argument("--only", nargs="*", default=["product", "released", "bags", "growth"])
    parser.add_argument("--child", nargs=4, metavar=("WORK", "KIND", "N", "D"), help=argparse.SUPPRESS)
    parser.add_argument("--busy", action="store_true", help="one thread's CPU time, on a machine with other work")
    given = parser.parse_args()
    if given.busy:
        torch.set_num_threads(1)
    clock = time.process_time if given.busy else time.perf_counter
    if given.child:
        measure(*given.child[:2], *map(int, given.child[2:]))
        raise SystemExit
    if "product" in given.only:
        rows = []
        for kind in ("trained", "middling", "weak"):
            a, b = world(kind, given.n, given.d)
            works = {"bare": partial(bare, a, b), "ranks": partial(cross_modal_ranks, a, b)}
            seconds = side_by_side(works, given.runs, clock)
            row = {"embeddings": kind, "N": given.n, "product s": seconds["bare"], "ranks s": seconds["ranks"]}
            memory = child("ranks", kind, given.n, given.d)["gb"]
            rows.append(row | {"ratio": seconds["ranks"] / seconds["bare"], "peak GB": memory})
        print(f"Both directions against the bare float32 product\n\n{table(rows)}\n", flush=True)
    if "released" in given.only:
        a, b = world("trained", given.released, given.d)
        assert all((x == y.numpy()).all() for x, y in zip(released(a, b), cross_modal_ranks(a, b), strict=True))
        works = {"released": lambda: released(a, b), "ranks": lambda: cross_modal_ranks(a, b)}
        seconds = side_by_side(works, given.runs, clock)
        memory = {work: child(work, "trained", given.released, given.d)["gb"] for work in works}
        rows = [{"code": work, "N": given.released, "s": seconds[work], "peak GB": memory[work]} for work in works]
        rows.append({"code": "released / ranks", "N": ""} | {k: rows[0][k] / rows[1][k] for k in ("s", "peak GB")})
        print(f"Against released code, same ranks\n\n{table(rows)}\n", flush=True)
    if "bags" in given.only:
        a, b = world("trained", given.n, given.d)
        sizes = [size for size in SIZES if size < given.n]
        works = {
            "one set": lambda: cross_modal_ranks(a, b),
            f"{10 * len(sizes)} bags at once": lambda: evaluate(a, b, candidates=sizes),
            f"one of ten bags of {sizes}, apart": lambda: separate(a, b, sizes, 1),
        }
        rows = [{"work": work, "s": s} for work, s in side_by_side(works, max(1, given.runs // 2), clock).items()]
        print(f"Bags of {given.n:,} pairs\n\n{table(rows)}\n", flush=True)
    if "growth" in given.only:
        print(f"Growth\n\n{table(growth('trained', given.d, given.growth, given.plot))}")
