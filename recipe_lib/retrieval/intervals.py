"""Confidence intervals of a mean over training seeds and test queries, with the coverage that they claim.

Three seeds and more: the seeds' means spread by what another seed changes, and by what the queries that a seed does not
share leave in it: Student's t with S - 1 degrees of freedom. What queries shared by all seeds leave is in every mean
alike, and no spread between seeds shows it: in score = mean + seed + query + rest it is the query's component, by the
mean squares of the two-way random model. Half the width is the root of the sum of both squared half-widths, which holds
the truth at least as often as it says (Banerjee, 1961, Sankhya 23: t-quantiles under the root, no degrees of freedom
to be estimated), and never less than what another draw of queries alone would ask for.

One seed or two tell next to nothing of a third: the interval is then a bootstrap over the queries, for these seeds.

Queries that are near-duplicates of each other are no independent evidence: they are drawn, and counted, as one cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

SEEDS = 3  # fewer do not show how far another seed could be


class Interval(NamedTuple):
    """A mean with its interval."""

    value: float
    low: float
    high: float


class _Block(NamedTuple):
    """Scores of seeds that share their queries, summed within clusters."""

    sums: np.ndarray  # (S, C)
    sizes: np.ndarray  # (C,) queries of each cluster


def mean_interval(
    scores: Sequence[np.ndarray],
    clusters: Sequence[np.ndarray] | None = None,
    *,
    own_queries: bool = False,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of the seeds' means, with an interval over seeds (three or more) and queries.

    Args:
        scores: (queries,) per seed, such as 1 where the rank is 1; for a paired comparison the differences of two
            systems on the same queries, so that what makes a query hard for both cancels.
        clusters: (queries,) integers per seed, equal for near-duplicates; default: every query is a cluster.
        own_queries: each seed has test queries of its own, as in a kitchen cooked anew; else all share them, in order.
        level: share of such intervals that hold the true mean.
        draws, seed: of the bootstrap.

    Raises:
        ValueError: no query, or seeds that differ in their queries without `own_queries`.
    """
    blocks = _blocks([np.asarray(row, np.float64) for row in scores], clusters, own_queries)
    means = np.concatenate([block.sums.sum(1) / block.sizes.sum() for block in blocks])
    seeds, value = len(means), float(means.mean())
    if seeds < SEEDS:
        low, high = np.quantile(bootstrap_means(blocks, draws, seed), [(1 - level) / 2, (1 + level) / 2])
        return Interval(value, float(low), float(high))
    queries, shared = _query_variances(blocks, seeds)
    between = means.var(ddof=1) / seeds
    t_seeds = stdtrit(seeds - 1, (1 + level) / 2)
    t_queries = stdtrit(max(1, sum(len(block.sizes) - 1 for block in blocks)), (1 + level) / 2)
    half = max(np.sqrt(t_seeds**2 * between + t_queries**2 * shared), t_queries * np.sqrt(queries))
    return Interval(value, value - float(half), value + float(half))


def _blocks(scores: list[np.ndarray], clusters: Sequence[np.ndarray] | None, own_queries: bool) -> list[_Block]:
    """One block of all seeds, or one per seed where each has its own queries."""
    if clusters is None:
        clusters = [np.arange(len(row)) for row in scores]
    if not scores or not all(len(row) for row in scores):
        raise ValueError("no query to take a mean of")
    groups = [[i] for i in range(len(scores))] if own_queries else [list(range(len(scores)))]
    blocks = []
    for group in groups:
        first = np.asarray(clusters[group[0]])
        if any(len(scores[i]) != len(first) or not np.array_equal(clusters[i], first) for i in group):
            raise ValueError("the seeds hold different queries; state own_queries=True if each has its own")
        _, cluster = np.unique(first, return_inverse=True)
        blocks.append(_Block(np.stack([np.bincount(cluster, scores[i]) for i in group]), np.bincount(cluster)))
    return blocks


def _query_variances(blocks: list[_Block], seeds: int) -> tuple[float, float]:
    """Variance that the draw of queries leaves in the mean over all seeds, and the part of it that the seeds share."""
    queries = shared = 0.0
    for sums, sizes in blocks:
        count, clusters = sums.shape
        residuals = (sums - sums.sum(1, keepdims=True) / sizes.sum() * sizes) / sizes.sum()  # (S, C), rows sum to 0
        scale = clusters / max(1, clusters - 1)
        mean = residuals.mean(0)
        queries += scale * float((mean**2).sum()) * (count / seeds) ** 2
        if count > 1:
            rest = scale * float(((residuals - mean) ** 2).sum()) / (count * (count - 1))
            shared += max(0.0, queries - rest)
    return queries, shared


def bootstrap_means(blocks: list[_Block], draws: int, seed: int) -> np.ndarray:
    """(draws,) means over resampled clusters of queries, the same for all seeds that share them.

    Scores of hits take few values, so that most clusters are alike: how often each distinct kind is drawn is one
    multinomial number, which makes a draw as cheap as there are kinds, with the distribution of drawing one by one.
    """
    rng = np.random.default_rng(seed)
    total, seeds = np.zeros(draws), sum(len(block.sums) for block in blocks)
    for sums, sizes in blocks:
        kinds, counts = np.unique(np.vstack([sums, sizes]), axis=1, return_counts=True)
        step = max(1, (1 << 24) // len(counts))
        for start in range(0, draws, step):
            drawn = rng.multinomial(len(sizes), counts / len(sizes), size=min(step, draws - start)) @ kinds.T
            total[start : start + step] += drawn[:, :-1].sum(1) / drawn[:, -1]
    return total / seeds
