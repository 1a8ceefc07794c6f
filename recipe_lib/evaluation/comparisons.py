"""From the ranks of every query to claims: differences with bootstrap intervals, of variants and studies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from recipe_lib.data.store import Split, study_store
from recipe_lib.paths import study_dir
from recipe_lib.retrieval.metrics import paired_bootstrap


def compare(
    ranks: pd.DataFrame,
    a: str,
    b: str,
    *,
    split: str,
    direction: str = "i2r",
    k: int = 1,
    against_split: str | None = None,
) -> dict:
    """R@k of variant `a` minus that of `b` over the same queries, whole split, with a 95 % paired bootstrap interval.

    Seeds, where `ranks` holds several, are drawn again too. `against_split` scores `b` on another split that holds the
    same recipes in the same order.
    """
    difference, low, high = paired_bootstrap(
        _hits(ranks, a, split, direction, k), _hits(ranks, b, against_split or split, direction, k)
    )
    return {
        "a": a, "b": b, "split": split, "against_split": against_split or split, "direction": direction,
        "metric": f"recall_{k}", "difference": difference, "low": low, "high": high, "seeds": int(ranks.seed.nunique()),
    }  # fmt: skip


def labelled(ranks: pd.DataFrame, system: str) -> pd.DataFrame:
    """Ranks whose column `variant` tells products of distances apart: "baseline++" is DAR++ of the system DAR."""
    return ranks.assign(variant=ranks["variant"] + ranks["system"].str.removeprefix(system))


def _hits(ranks: pd.DataFrame, variant: str, split: str, direction: str, k: int) -> np.ndarray:
    """(seeds, queries) bool: the true candidate is among the first k."""
    rows = ranks[(ranks.variant == variant) & (ranks.split == split) & (ranks.direction == direction)]
    return _by_seed(rows, k).to_numpy()


def _by_seed(ranks: pd.DataFrame, k: int) -> pd.DataFrame:
    """The true candidate is among the first k: bool, a row a seed, a column a query."""
    return ranks.pivot(index="seed", columns="query", values="rank") <= k


def compare_falls(
    ranks: pd.DataFrame, a: str, b: str, *, start: str, end: str, direction: str = "i2r", k: int = 1
) -> dict:
    """The change of R@k from split `start` to `end` of variant `a` minus that of `b`; positive: `a` falls less.

    Both splits hold the same recipes in the same order, so each query is its own control.
    """
    change = [
        _hits(ranks, variant, end, direction, k) - _hits(ranks, variant, start, direction, k).astype(float)
        for variant in (a, b)
    ]
    difference, low, high = paired_bootstrap(*change)
    return {
        "a": a, "b": b, "split": f"change from {start} to {end}", "against_split": f"change from {start} to {end}",
        "direction": direction, "metric": f"recall_{k}", "difference": difference, "low": low, "high": high,
        "seeds": int(ranks.seed.nunique()),
    }  # fmt: skip


def sentence(row: dict) -> str:
    """A comparison in words: gain, loss or neither, with its interval."""
    word = "above" if row["low"] > 0 else "below" if row["high"] < 0 else "not apart from"
    where = row["split"] if row["split"] == row["against_split"] else f"{row['split']} against {row['against_split']}"
    names = row["a"] if row["a"] == row["b"] else f"{row['a']} {word} {row['b']}"
    return (
        f"{names}: {row['direction']} {row['metric']} {row['difference']:+.3f} "
        f"[{row['low']:+.3f}, {row['high']:+.3f}] on {where}, {row['seeds']} seed{'s' * (row['seeds'] > 1)}"
    )


def intervals(ranks: pd.DataFrame, direction: str, k: int = 1) -> pd.DataFrame:
    """R@k of each variant in each whole split with a 95 % bootstrap interval: variant, split, value, low, high."""
    rows = []
    for (variant, split), group in ranks[ranks.direction == direction].groupby(["variant", "split"], sort=False):
        hits = _by_seed(group, k).to_numpy()
        value, low, high = paired_bootstrap(hits, np.zeros_like(hits))
        rows.append({"variant": variant, "split": split, "value": value, "low": low, "high": high})
    return pd.DataFrame(rows)


def beside(ranks: pd.DataFrame, studies: Sequence[str], split: Split, *, k: int = 1) -> pd.DataFrame:
    """R@k of all systems of several studies, and how far each is from the baseline of `ranks`.

    Args:
        ranks: of this study, as `score` gives them; its first system's baseline is what others are held against.
        studies: names of other studies. Those of one system and several seeds are taken together; studies of one seed
            must hold the same recipes.
        split: of this study.

    Returns:
        A row a system, variant and direction: seeds, value, low, high, difference, its low and high, all over the whole
        split; the difference is over the seeds that both have, empty where there are none.

    Raises:
        ValueError: another study is not finished, or of other recipes.
    """
    frames, ids = [ranks], {int(ranks["seed"].iloc[0]): split.ids}
    for study in studies:
        path = study_dir(study) / "ranks.parquet"
        if not path.is_file():
            raise ValueError(f"compare_with: {path} is not there; run the study {study} first")
        frames.append(pd.read_parquet(path))
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
    hits = {key: _by_seed(group, k) for key, group in joined.groupby(["system", "variant", "direction"], sort=False)}
    rows = []
    for (system, variant, direction), found in hits.items():
        value, low, high = paired_bootstrap(found.to_numpy(), np.zeros(found.shape))
        row = {"system": system, "variant": variant, "direction": direction, "seeds": len(found)}
        row |= {f"recall_{k}": value, "low": low, "high": high}
        base = hits[ranks["system"].iloc[0], "baseline", direction]
        if len(both := found.index.intersection(base.index)):
            difference = paired_bootstrap(found.loc[both].to_numpy(), base.loc[both].to_numpy())
            row |= dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)
