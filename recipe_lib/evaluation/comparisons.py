"""From the ranks of every query to claims: paired differences with intervals, of variants and of studies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from recipe_lib.data.store import Split, study_store
from recipe_lib.paths import study_dir
from recipe_lib.retrieval.intervals import SEEDS, Interval, mean_interval


def compare(
    ranks: pd.DataFrame,
    a: str,
    b: str,
    *,
    split: str,
    direction: str = "i2r",
    k: int = 1,
    against_split: str | None = None,
    own_queries: bool = False,
) -> dict:
    """R@k of variant `a` minus that of `b` over the same queries of the whole split, with a 95 % interval.

    Args:
        ranks: a row per query, as `evaluate_study` leaves them, of one seed or several.
        against_split: scores `b` on another split that holds the same recipes in the same order.
        own_queries: each seed may have test recipes of its own; else that is an error.

    Raises:
        ValueError: the seeds differ in their queries, or `a` and `b` in their seeds or queries.
    """
    against_split = against_split or split
    hits = _hits(ranks, a, split, direction, k), _hits(ranks, b, against_split, direction, k)
    interval = _mean(_minus(*hits), own_queries)
    return _row(a, b, split, against_split, direction, k, interval, len(hits[0]))


def compare_falls(
    ranks: pd.DataFrame,
    a: str,
    b: str,
    *,
    start: str,
    end: str,
    direction: str = "i2r",
    k: int = 1,
    own_queries: bool = False,
) -> dict:
    """The change of R@k from split `start` to `end` of variant `a` minus that of `b`; positive: `a` falls less.

    Both splits hold the same recipes in the same order, so each query is its own control. Else as `compare`.
    """
    changes = [
        _minus(_hits(ranks, variant, end, direction, k), _hits(ranks, variant, start, direction, k))
        for variant in (a, b)
    ]
    interval, split = _mean(_minus(*changes), own_queries), f"change from {start} to {end}"
    return _row(a, b, split, split, direction, k, interval, len(changes[0]))


def _row(a: str, b: str, split: str, against: str, direction: str, k: int, interval: Interval, seeds: int) -> dict:
    return {
        "a": a, "b": b, "split": split, "against_split": against, "direction": direction, "metric": f"recall_{k}",
        "difference": interval.value, "low": interval.low, "high": interval.high, "seeds": seeds,
    }  # fmt: skip


def labelled(ranks: pd.DataFrame, system: str) -> pd.DataFrame:
    """Ranks whose column `variant` tells products of distances apart: "baseline++" is DAR++ of the system DAR."""
    return ranks.assign(variant=ranks["variant"] + ranks["system"].str.removeprefix(system))


# Scores of a variant: by seed, a table of `score`, `cluster` and `test_set`, a row per query in the split's order.
_Scores = dict[int, pd.DataFrame]


def _hits(ranks: pd.DataFrame, variant: str, split: str, direction: str, k: int) -> _Scores:
    """1 where the true candidate is among the first k, else 0."""
    return _by_seed(ranks[(ranks.variant == variant) & (ranks.split == split) & (ranks.direction == direction)], k)


def _by_seed(ranks: pd.DataFrame, k: int) -> _Scores:
    scored = ranks.assign(score=(ranks["rank"] <= k).astype(float)).sort_values("query")
    return {
        int(seed): rows[["score", "cluster", "test_set"]].reset_index(drop=True)
        for seed, rows in scored.groupby("seed", sort=True)
    }


def _minus(a: _Scores, b: _Scores) -> _Scores:
    """Differences, query by query."""
    if a.keys() != b.keys():
        raise ValueError(f"seeds {sorted(a)} and {sorted(b)} cannot be paired; compare the seeds that both have")
    if any(not np.array_equal(a[seed]["cluster"], b[seed]["cluster"]) for seed in a):
        raise ValueError("the two sides hold different queries, so they cannot be paired")
    return {seed: rows.assign(score=rows["score"] - b[seed]["score"]) for seed, rows in a.items()}


def _shared(scores: _Scores) -> bool:
    """Whether all seeds have the same queries; a ValueError where some have and others have not."""
    test_sets = [rows["test_set"].iloc[0] for rows in scores.values()]
    if 1 < len(set(test_sets)) < len(test_sets):
        raise ValueError(f"of the seeds {sorted(scores)} some share their test recipes and others not; take them apart")
    return len(set(test_sets)) == 1


def _mean(scores: _Scores, own_queries: bool) -> Interval:
    if not (shared := _shared(scores)) and not own_queries:
        raise ValueError(f"the seeds {sorted(scores)} hold different test recipes; state own_queries=True if so meant")
    columns = ([rows[name].to_numpy() for rows in scores.values()] for name in ("score", "cluster"))
    return mean_interval(*columns, own_queries=not shared)


def standing(row: dict) -> str:
    """Where `a` stands by the interval: above, below or not apart from `b`."""
    return "above" if row["low"] > 0 else "below" if row["high"] < 0 else "not apart from"


def sentence(row: dict) -> str:
    """A comparison in words: gain, loss or neither, with its interval and what that covers."""
    where = row["split"] if row["split"] == row["against_split"] else f"{row['split']} against {row['against_split']}"
    names = row["a"] if row["a"] == row["b"] else f"{row['a']} {standing(row)} {row['b']}"
    seeds = f"{row['seeds']} seed{'s' * (row['seeds'] > 1)}"
    return (
        f"{names}: {row['direction']} {row['metric']} {row['difference']:+z.3f} "
        f"[{row['low']:+z.3f}, {row['high']:+z.3f}] on {where}, {seeds}"
        + (": another seed could differ" if row["seeds"] < SEEDS else "")
    )


def recall_intervals(ranks: pd.DataFrame, direction: str, k: int = 1, *, own_queries: bool = False) -> pd.DataFrame:
    """R@k of each variant in each whole split with a 95 % interval: variant, split, value, low, high."""
    rows = []
    for (variant, split), group in ranks[ranks.direction == direction].groupby(["variant", "split"], sort=False):
        rows.append({"variant": variant, "split": split} | _recall(_by_seed(group, k), own_queries))
    return pd.DataFrame(rows)


def _recall(hits: _Scores, own_queries: bool) -> dict[str, float]:
    value, low, high = _mean(hits, own_queries)
    return {"value": value, "low": max(0.0, low), "high": min(1.0, high)}


def compare_studies(ranks: pd.DataFrame, studies: Sequence[str], split: Split, *, k: int = 1) -> pd.DataFrame:
    """R@k of all systems of several studies, and how far each is from the baseline of `ranks`.

    Args:
        ranks: of this study, as `evaluate_study` leaves them; its first system's baseline is what others are held
            against.
        studies: names of other studies. Those of one system and several seeds are taken together; studies of one seed
            must hold the same recipes. The seeds may all share their test recipes, or each have its own.
        split: of this study.

    Returns:
        A row per system, variant and direction: seeds, recall_k, low, high, difference, its low and high, all over the
        whole split, and queries: whether the seeds share them ("shared", "own"). The difference is over the seeds that
        both have, empty where there are none.

    Raises:
        ValueError: another study is not finished, or of other recipes.
    """
    frames, ids = [ranks], {int(ranks["seed"].iloc[0]): split.ids}
    for study in studies:
        path = study_dir(study) / "ranks.parquet"
        if not path.is_file():
            raise ValueError(f"compare_with: {path} is not there; run the study {study} first")
        frames.append(pd.read_parquet(path))
        if missing := {"cluster", "test_set"} - set(frames[-1]):
            raise ValueError(f"compare_with: {path} has no {', '.join(sorted(missing))}; evaluate {study} again")
        theirs = study_store(study).split(split.name).ids
        if ids.setdefault(int(frames[-1]["seed"].iloc[0]), theirs) != theirs:
            raise ValueError(
                f"compare_with: {split.name} of the study {study} holds other recipes than others of its seed"
            )
    joined = pd.concat(frames, ignore_index=True)
    joined = joined[(joined["split"] == split.name) & ~joined["variant"].str.contains("@")]
    twice = joined.duplicated(["system", "variant", "seed", "direction", "query"])
    if twice.any():
        system, seed = joined.loc[twice.idxmax(), ["system", "seed"]]
        raise ValueError(f"compare_with: two studies call themselves {system}, seed {seed}; give one another `system`")
    scores = {key: _by_seed(group, k) for key, group in joined.groupby(["system", "variant", "direction"], sort=False)}
    rows = []
    for (system, variant, direction), hits in scores.items():
        recall = _recall(hits, own_queries=True)
        row = {"system": system, "variant": variant, "direction": direction, "seeds": len(hits)}
        row |= {f"recall_{k}": recall.pop("value")} | recall
        base = scores[ranks["system"].iloc[0], "baseline", direction]
        if both := sorted(hits.keys() & base.keys()):
            difference = _mean(_minus(*({seed: side[seed] for seed in both} for side in (hits, base))), True)
            row |= dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
        rows.append(row | {"queries": "shared" if _shared(hits) else "own"})
    return pd.DataFrame(rows)
