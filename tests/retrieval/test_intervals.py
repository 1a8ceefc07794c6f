"""Intervals hold the truth as often as they say, in simulated studies; variances and draws equal naive loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ks_2samp, norm
from scipy.stats import t as student

from recipe_lib.retrieval.intervals import Interval, _blocks, bootstrap_means, mean_interval

TRIALS = 3000
MONTE_CARLO = np.sqrt(0.95 * 0.05 / TRIALS)  # 0.004


def clusters_of(queries, share):
    """This share of the queries in pairs of near-duplicates."""
    pairs = int(queries * share / 2)
    return np.concatenate([np.repeat(np.arange(pairs), 2), np.arange(pairs, queries - pairs)])


def studies(seeds, spread, *, own, cluster, queries=240, trials=TRIALS, weights=(0.3, 0.25, 0.1)):
    """Differences (trials, seeds, queries) in {-1, 0, 1} of the hits of two systems; the true difference is 0.

    A system hits a query where a normal variable falls below the quantile of its R@1, 0.25, moved by `spread` (standard
    deviation) from seed to seed. `weights`: shares of its variance that come from how hard a cluster is for both, how
    hard it is for this system, and how hard the query is for this system; all seeds share these where they share
    queries.
    """
    rng = np.random.default_rng([seeds, int(1000 * spread), own])
    own_or_shared, groups = (trials, seeds if own else 1), cluster.max() + 1

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    both, hits = normal(*own_or_shared, groups)[..., cluster], []
    for moved in (spread, 0):
        hard = [both, normal(*own_or_shared, groups)[..., cluster], normal(*own_or_shared, queries)]
        rest = normal(trials, seeds, queries) * np.sqrt(1 - sum(weights))
        latent = sum(np.sqrt(weight) * part for weight, part in zip(weights, hard, strict=True)) + rest
        hits.append(latent < norm.ppf(0.25 + moved * normal(trials, seeds, 1)))
    return hits[0].astype(np.int8) - hits[1]


def coverage(differences, cluster, **options):
    """Share of the studies whose interval holds 0."""
    intervals = [mean_interval(rows, [cluster] * len(rows), **options) for rows in differences]
    return np.mean([low <= 0 <= high for _, low, high in intervals])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.04])
def test_over_seeds_and_queries_it_covers_what_it_says(spread, seeds, own):
    cluster = clusters_of(240, 0.4)
    differences = studies(seeds, spread, own=own, cluster=cluster)
    assert 0.95 - 2.5 * MONTE_CARLO <= coverage(differences, cluster, own_queries=own) <= 0.993
    if spread == 0.04:  # the studies can tell: an interval that knows nothing of seeds does not pass
        column = differences.mean(1)
        half = 1.96 * column.std(1, ddof=1) / np.sqrt(240 * (seeds if own else 1))
        assert np.mean(np.abs(column.mean(1)) <= half) < 0.9


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("own", [False, True])
def test_over_queries_alone_it_covers_what_it_says_and_clusters_matter(seeds, own):
    cluster = clusters_of(240, 0.9)
    differences = studies(seeds, 0, own=own, cluster=cluster, trials=1000, weights=(0.1, 0.7, 0.0))
    assert 0.93 <= coverage(differences, cluster, own_queries=own, draws=500) <= 0.97
    if not own:
        assert coverage(differences, np.arange(240), draws=500) < 0.93, "as if pairs were independent"


def test_equals_the_two_way_random_model_by_loops():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 1)) * 0.2 + rng.normal(size=50) + rng.normal(size=(4, 50))
    seeds, queries, grand = 4, 50, scores.mean()
    row, column = scores.mean(1), scores.mean(0)
    between_queries = seeds * sum((c - grand) ** 2 for c in column) / (queries - 1)
    rest = sum((scores[s, q] - row[s] - column[q] + grand) ** 2 for s in range(4) for q in range(50)) / (3 * 49)
    between_seeds = sum((r - grand) ** 2 for r in row) / (seeds - 1)
    shared = (between_queries - rest) / seeds / queries
    t_seeds, t_queries = student.ppf(0.975, 3), student.ppf(0.975, 49)
    half = np.sqrt(t_seeds**2 * between_seeds / seeds + t_queries**2 * shared)
    half = max(half, t_queries * np.sqrt(between_queries / seeds / queries))
    assert mean_interval(scores) == pytest.approx((grand, grand - half, grand + half))
    # Each seed with its own queries: Student's t over the seeds' means and no more.
    low, high = student.interval(0.95, 3, row.mean(), row.std(ddof=1) / 2)
    assert mean_interval(scores + rng.normal(size=(4, 1)), own_queries=True).low < low
    far = scores + 10 * np.arange(4)[:, None]
    low, high = student.interval(0.95, 3, far.mean(), far.mean(1).std(ddof=1) / 2)
    assert mean_interval(far, own_queries=True) == pytest.approx((far.mean(), low, high))


def test_two_copies_of_every_query_tell_no_more_than_one():
    rng = np.random.default_rng(0)
    for seeds in (1, 3):
        scores = rng.normal(size=40) + 0.1 * rng.normal(size=(seeds, 40))
        twice, cluster = np.repeat(scores, 2, 1), [np.repeat(np.arange(40), 2)] * seeds
        assert mean_interval(twice, cluster) == pytest.approx(mean_interval(scores))
        wide, narrow = mean_interval(scores), mean_interval(twice)
        assert narrow.high - narrow.low < 0.95 * (wide.high - wide.low)


def test_seeds_that_agree_by_chance_leave_the_doubt_of_their_queries():
    rows = np.tile(np.repeat([1, -1], 20), (3, 1))
    for own in (False, True):
        value, low, high = mean_interval(rows, own_queries=own)
        assert value == 0 and high > 0.15 and low == -high
    assert mean_interval(np.zeros((3, 40))) == Interval(0, 0, 0), "a system against itself"


@pytest.mark.parametrize("clustered", [False, True])
def test_draws_over_distinct_columns_are_distributed_as_draws_of_queries(clustered):
    rng = np.random.default_rng(0)
    scores = rng.choice([-1, 0, 1], p=[0.2, 0.5, 0.3], size=(2, 60))
    cluster = clusters_of(60, 0.5) if clustered else np.arange(60)
    members = [np.flatnonzero(cluster == c) for c in range(cluster.max() + 1)]
    naive = []
    for _ in range(4000):
        drawn = np.concatenate([members[c] for c in rng.integers(len(members), size=len(members))])
        naive.append(scores[:, drawn].mean())
    blocks = _blocks(list(scores), [cluster] * 2, False)
    fast = bootstrap_means(blocks, 4000, 0)
    assert ks_2samp(naive, fast).pvalue > 0.01
    assert np.std(fast) == pytest.approx(np.std(naive), rel=0.05)
    assert (
        len(np.unique(fast)) > 50
        and (fast == bootstrap_means(_blocks(list(scores), [cluster] * 2, False), 4000, 0)).all()
    )


def test_what_both_systems_share_cancels():
    rng = np.random.default_rng(0)
    hard = rng.random(500) < 0.5
    better = hard | (rng.random(500) < 0.05)
    value, low, high = mean_interval([better.astype(int) - hard])
    assert 0 < low < value < high and high - low < 0.05


def test_seeds_of_different_queries_must_be_stated():
    with pytest.raises(ValueError, match="own_queries=True"):
        mean_interval([np.ones(3), np.ones(4)])
    with pytest.raises(ValueError, match="own_queries=True"):
        mean_interval(np.ones((2, 3)), [np.arange(3), np.zeros(3)])
    assert mean_interval([np.ones(3), np.zeros(4)], own_queries=True).value == 0.5, "the mean of the seeds' means"
    with pytest.raises(ValueError, match="no query"):
        mean_interval([np.ones(0)])
