"""Exact ranks of the true pairs, MedR / R@K, bags of candidates, paired bootstrap intervals."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RECALL_AT = (1, 5, 10)


def cross_modal_ranks(
    images: Tensor, recipes: Tensor, *, block: int = 1024, device: str | torch.device | None = None, ties: bool = False
) -> tuple[Tensor, ...]:
    """Exact pessimistic ranks of the true pairs by cosine similarity, both directions, in one pass.

    The rank of a query is 1 + the number of other candidates at least as similar as the true one: a tie counts
    against the model. The similarities are screened in float32; the few that lie within its rounding error of the
    true pair are decided in float64. Memory O(block x N).

    Args:
        images, recipes: (N, D); row i of one belongs to row i of the other.
        block: images a step.
        device: where to compute; default: where `images` lies.
        ties: also return, for each query, how many other candidates are exactly as similar as the true one.

    Returns:
        (i2r, r2i), each (N,) int64 on the CPU; with ties, (i2r, r2i, i2r_ties, r2i_ties).

    Raises:
        ValueError: shapes differ, or an embedding is not finite or zero: a NaN would rank first, not last.
    """
    if images.shape != recipes.shape or images.ndim != 2:
        raise ValueError(f"images {tuple(images.shape)} and recipes {tuple(recipes.shape)} must both be (N, D)")
    exact = [F.normalize(x.to(device or images.device).double(), dim=1) for x in (images, recipes)]
    for name, x in zip(("image", "recipe"), exact, strict=True):
        bad = ~(x.norm(dim=1) > 0.5)  # NaN fails every comparison
        if bad.any():
            raise ValueError(f"{name} embedding {int(bad.nonzero()[0])} is zero or not finite; it cannot be ranked")
    a, b = (x.float() for x in exact)
    true = (exact[0] * exact[1]).sum(1)
    n, d = a.shape
    # Rounding error of a float32 dot product of unit vectors of length d, their own rounding included (Higham, 3.5).
    near = (d + 8) * 2.0**-24
    ranks = torch.ones(2, n, dtype=torch.int64, device=a.device)
    equal = torch.zeros_like(ranks)
    bound = true.float()
    for start in range(0, n, block):
        rows = slice(start, min(start + block, n))
        gap_i2r = a[rows] @ b.T  # (block, N)
        gap_r2i = gap_i2r - bound
        gap_i2r -= bound[rows, None]
        for way, gap in enumerate((gap_i2r, gap_r2i)):
            gap[:, rows].fill_diagonal_(-torch.inf)  # the true pair itself
            above = gap > near
            i, j = (gap.abs() <= near).nonzero(as_tuple=True)
            i += start
            query = i if way == 0 else j
            if way == 0:
                ranks[0, rows] += above.sum(1)
            else:
                ranks[1] += above.sum(0)
            # A collapsed model leaves every pair undecided: in pieces, so that memory stays bounded.
            for piece in torch.arange(len(i), device=i.device).split(1 << 16):
                similarity = (exact[0][i[piece]] * exact[1][j[piece]]).sum(1)
                q = query[piece]
                ranks[way].index_add_(0, q, (similarity >= true[q]).long())
                equal[way].index_add_(0, q, (similarity == true[q]).long())
    ranks, equal = ranks.cpu(), equal.cpu()
    return (ranks[0], ranks[1], equal[0], equal[1]) if ties else (ranks[0], ranks[1])


def rank_metrics(ranks: Tensor) -> dict[str, float]:
    """MedR and R@1, R@5, R@10 (shares, not percentages) of ranks (N,)."""
    ranks = ranks.double()
    recalls = {f"recall_{k}": float((ranks <= k).double().mean()) for k in RECALL_AT}
    return {"medr": float(ranks.quantile(0.5))} | recalls


def evaluate(images: Tensor, recipes: Tensor, *, candidates: int, bags: int = 10, seed: int = 0) -> list[dict]:
    """Metrics in both directions on bags of `candidates` pairs, averaged over the bags; the whole set is one bag.

    Bags of a set not much larger overlap: their spread is no confidence interval, so none is given.

    Raises:
        ValueError: more candidates than pairs.
    """
    n = len(images)
    if candidates > n:
        raise ValueError(f"{candidates} candidates asked for, but there are {n} pairs")
    rng = np.random.default_rng([seed, candidates])
    draws = [np.arange(n)] if candidates == n else [rng.permutation(n)[:candidates] for _ in range(bags)]
    rows: dict[str, list[dict]] = {"i2r": [], "r2i": []}
    for draw in draws:
        i2r, r2i, i2r_ties, r2i_ties = cross_modal_ranks(images[draw], recipes[draw], ties=True)
        rows["i2r"].append(rank_metrics(i2r) | {"ties": int((i2r_ties > 0).sum())})
        rows["r2i"].append(rank_metrics(r2i) | {"ties": int((r2i_ties > 0).sum())})
    return [
        {"direction": direction, "candidates": candidates}
        | {key: float(np.mean([bag[key] for bag in found])) for key in found[0]}
        for direction, found in rows.items()
    ]


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a - b over the same queries, with a percentile interval.

    Queries are drawn with replacement, and seeds too where there are several; both systems are scored on each draw,
    so what makes a query hard for both cancels.

    Args:
        a, b: (queries,) or (seeds, queries) scores, such as 1 where the rank is 1.

    Returns:
        difference, low, high.
    """
    difference = np.atleast_2d(np.asarray(a, np.float64) - np.asarray(b, np.float64))  # (S, N)
    seeds, queries = difference.shape
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    step = max(1, (1 << 24) // queries)
    for start in range(0, draws, step):
        size = min(step, draws - start)
        drawn = rng.multinomial(queries, np.full(queries, 1 / queries), size=size)  # (size, N)
        by_seed = drawn @ difference.T / queries  # (size, S)
        weight = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
        means[start : start + size] = (by_seed * weight).sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(difference.mean()), float(low), float(high)
