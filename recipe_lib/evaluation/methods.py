"""The systems of a grid of methods side by side: what they find, what they cost, and how papers rank them."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from recipe_lib.data.store import study_store
from recipe_lib.evaluation.comparisons import compare, recall_intervals
from recipe_lib.evaluation.evidence import CONTROL, Grid, over_seeds
from recipe_lib.evaluation.study import ZERO_SHOT
from recipe_lib.paths import study_dir
from recipe_lib.systems.base import parameter_table
from recipe_lib.systems.saving import load_system
from recipe_lib.training.fit import load_training

BASELINE = "02_baseline_training"


def findings(grid: Grid, split: str = "iid") -> pd.DataFrame:
    """R@1, 5, 10 and MedR on the whole split, with 95 % intervals over seeds and queries (MedR: over seeds).

    Returns:
        A row per method, variant and direction: seeds, recall_k, recall_k_low, recall_k_high, medr, its low and high.
    """
    rows = []
    for method in grid.worlds:
        ranks = grid.ranks(method)
        ranks = ranks[(ranks["split"] == split) & ~ranks["variant"].str.contains("@")]
        for direction, own in ranks.groupby("direction", sort=False):
            recalls = {k: recall_intervals(own, direction, k, own_queries=True) for k in (1, 5, 10)}
            for variant, queries in own.groupby("variant", sort=False):
                row = {"method": method, "variant": variant, "direction": direction, "seeds": queries["seed"].nunique()}
                for k, table in recalls.items():
                    recall = table.set_index("variant").loc[variant]
                    row |= {f"recall_{k}": recall["value"]} | {
                        f"recall_{k}_{end}": recall[end] for end in ("low", "high")
                    }
                medians = over_seeds(queries.groupby("seed")["rank"].median())
                rows.append(row | {"medr": medians["value"], "medr_low": medians["low"], "medr_high": medians["high"]})
    return pd.DataFrame(rows)


def gains(grid: Grid, splits: tuple[str, ...] = ("iid", "do_context"), k: int = 1) -> pd.DataFrame:
    """Each variant - equal_compute of each method on the same queries, as `comparisons.compare` gives it, and `method`.

    On those of the splits that the data has, of the photo-recipe distance alone (no `+`), of variants that were trained
    (no `@`: changed at test time).
    """
    rows = []
    for method in grid.worlds:
        ranks = grid.ranks(method)
        trained = [
            v for v in ranks["variant"].unique() if v not in ("baseline", CONTROL, ZERO_SHOT) and not set("@+") & set(v)
        ]
        present = [split for split in splits if (ranks["split"] == split).any()]
        for variant, split, direction in product(trained, present, ("i2r", "r2i")):
            row = compare(ranks, variant, CONTROL, split=split, direction=direction, k=k, own_queries=True)
            rows.append({"method": method} | row)
    return pd.DataFrame(rows)


def costs(grid: Grid) -> pd.DataFrame:
    """What each method's baseline takes, means over the seeds, indexed by method.

    `trained` and `frozen` parameters of the saved system; `seconds_per_step`: the median epoch over its steps of pairs
    (text-only steps and validation included); `memory_mb`: highest resident memory of the training notebook; `minutes`:
    of all stages. Times hold for the machine that the grid ran on, with what else ran on it.
    """
    rows = []
    for method in grid.worlds:
        studies = grid.studies.loc[grid.studies["world"] == method, "study"]
        rows.append({"method": method} | pd.DataFrame([_cost(study_dir(study)) for study in studies]).mean().to_dict())
    return pd.DataFrame(rows).set_index("method")


def _cost(study: Path) -> dict[str, float]:
    folder, stages = study / BASELINE, json.loads((study / "manifest.json").read_text(encoding="utf-8"))["stages"]
    history = pd.read_csv(folder / "history.csv")
    steps = len(study_store(study.name).split("train")) // load_training(folder).batch_size
    parameters = parameter_table(load_system(folder)).loc["total"]
    return {
        "trained": parameters["trainable"],
        "frozen": parameters["frozen"],
        "seconds_per_step": history["seconds"].median() / steps if len(history) else np.nan,
        "memory_mb": stages[BASELINE]["peak_memory_mb"],
        "minutes": sum(stage["seconds"] for stage in stages.values()) / 60,
    }


def published(path: Path) -> pd.DataFrame:
    """Numbers of papers on Recipe1M, in percent: system, method (here), candidates, direction, medr, recall_k, source,
    where, certainty ("read", or "low" where it is from memory)."""
    return pd.read_csv(path, keep_default_na=True).fillna({"method": ""})


def agreement(table: pd.DataFrame, papers: pd.DataFrame, *, candidates: int = 1000, direction: str = "i2r") -> dict:
    """Spearman's rho between R@1 of the baselines here and the published R@1 of the same methods.

    Numbers of low certainty stay out.

    Args:
        table: of `findings`.
        papers: of `published`.

    Returns:
        rho, p (NaN below three methods), methods: those that both have, and their two recalls.
    """
    here = table[(table["variant"] == "baseline") & (table["direction"] == direction)].set_index("method")["recall_1"]
    there = papers[(papers["candidates"] == candidates) & (papers["direction"] == direction) & (papers["method"] != "")]
    there = there[there["certainty"] != "low"]
    both = pd.DataFrame({"here": here, "published": there.set_index("method")["recall_1"]}).dropna()
    rho, p = spearmanr(both["here"], both["published"]) if len(both) > 2 else (np.nan, np.nan)
    return {"rho": float(rho), "p": float(p), "methods": both}
