import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from recipe_lib.evaluation.evidence import Grid, against_control, claims, falls, goals, measured, over_seeds
from tests.evaluation.test_comparisons import frame


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """Three seeds of hits made by hand: `better` finds more on do_context, `same` what the control finds."""
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(tmp_path))
    rng = np.random.default_rng(0)
    studies = [{"study": f"e-seed{s}", "world": "", "seed": s, "overrides": {}} for s in (1, 2, 3)]
    (tmp_path / "e").mkdir()
    (tmp_path / "e/grid.json").write_text(json.dumps(studies))
    for study in studies:
        folder, seed = tmp_path / study["study"], study["seed"]
        folder.mkdir()
        hits = {"iid": rng.random(400) < 0.5, "do_context": rng.random(400) < 0.2}
        more = hits["do_context"] | (rng.random(400) < 0.2)
        ranks = [frame(v, s, h, seed, f"set {seed}") for s, h in hits.items() for v in ("equal_compute", "same")]
        ranks += [frame("better", "iid", hits["iid"], seed, f"set {seed}")]
        ranks += [frame("better", "do_context", more, seed, f"set {seed}")]
        pd.concat(ranks, ignore_index=True).to_parquet(folder / "ranks.parquet")
        ways = [(v, d) for v in ("equal_compute", "better") for d in ("i2r", "r2i")]
        near = [{"variant": v, "split": "iid", "direction": d, "accuracy": 0.5 + 0.01 * seed} for v, d in ways]
        pull = {"equal_compute": 0.3 + 0.01 * seed, "better": 0.1 + 0.01 * seed}
        bias = [{"variant": v, "measure": "context_pull", "value": x} for v, x in pull.items()]
        metrics = {"near_duplicates": near, "bias": bias, "classifier": {}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return Grid("e")


def test_differences_are_from_the_control_over_all_seeds(grid):
    ranks = grid.ranks()
    table = against_control(ranks, ["better", "same"], ["iid", "do_context"]).query("direction == 'i2r'")
    table = table.set_index(["a", "split"])
    assert (table["seeds"] == 3).all() and (table["b"] == "equal_compute").all()
    assert (table.loc["same", ["difference", "low", "high"]] == 0).all(axis=None)
    row = table.loc["better", "do_context"]
    hit = ranks[(ranks["direction"] == "i2r") & (ranks["split"] == "do_context")]
    recall = hit.assign(hit=hit["rank"] == 1).groupby("variant")["hit"].mean()
    assert row["difference"] == pytest.approx(recall["better"] - recall["equal_compute"]) and row["low"] > 0
    assert row["relative"] == pytest.approx(recall["better"] / recall["equal_compute"] - 1)
    fallen = falls(ranks, ["better", "same"]).query("direction == 'i2r'").set_index("variant")
    assert fallen.loc["same", "fall"] > fallen.loc["better", "fall"] > 0 and fallen.loc["better", "less_low"] > 0
    text = claims(table.reset_index(), ["better"])
    assert text.startswith("better: iid +0.000 [+0.000, +0.000] (+0%); do_context +0.") and text.count("\n") == 0


def test_measures_are_paired_by_seed(grid):
    summary = measured(grid.measures(), ["better"]).set_index("measure")
    pull = summary.loc["context_pull"]
    assert pull["value"] == pytest.approx(0.12) and pull["difference_value"] == pytest.approx(-0.2)
    assert pull["difference_low"] == pytest.approx(-0.2) and pull["low"] < 0.12 < pull["high"]
    assert summary.loc["near_duplicates_iid", "difference_value"] == 0
    assert summary.loc["near_duplicates_iid_r2i", "value"] == pytest.approx(0.52)


def test_an_interval_over_seeds_is_students(grid):
    values = [0.1, 0.3, 0.2, 0.4]
    interval = over_seeds(values)
    low, high = t.interval(0.95, 3, np.mean(values), np.std(values, ddof=1) / 2)
    assert (interval["low"], interval["high"]) == pytest.approx((low, high))
    assert np.isnan(over_seeds([0.1])["low"])


def test_what_is_not_finished_is_named(grid, tmp_path):
    (tmp_path / "e-seed2/ranks.parquet").unlink()
    with pytest.raises(ValueError, match="grid e: e-seed2 not finished"):
        Grid("e")
    with pytest.raises(ValueError, match="no such grid"):
        Grid("other")


def test_goals_are_reached_or_missed_each_for_itself():
    """One variant reaches all, one misses each part by a little; oracles and r2i have no say."""
    better = {"do_context": (0.06, 0.01, 0.61), "do_ingredients": (0.06, 0.01, 0.61), "iid": (-0.009, -0.02, -0.02)}
    worse = {"do_context": (0.06, -0.01, 0.61), "do_ingredients": (0.05, 0.01, 0.59), "iid": (-0.011, -0.02, -0.02)}
    rows = [
        {"a": a, "split": split, "metric": m, "direction": d, "difference": x[0], "low": x[1], "relative": x[2]}
        for a, of in (("better", better), ("worse", worse))
        for split, x in of.items()
        for m, d in (("recall_1", "i2r"), ("recall_10", "i2r"), ("recall_1", "r2i"))
    ]
    fall = {"equal_compute": 0.2, "better": 0.1, "worse": 0.101}
    fallen = pd.DataFrame([{"variant": v, "direction": "i2r", "fall": x} for v, x in fall.items()])
    near = pd.DataFrame({"variant": list(fall), "measure": "near_duplicates_iid", "value": [0.9, 0.651, 0.65]})
    reached = goals(pd.DataFrame(rows), fallen, near, ["better", "worse"]).set_index("variant")
    assert reached.shape == (2, 5) and reached.loc["better"].all() and not reached.loc["worse"].any()
    assert goals(pd.DataFrame(rows), fallen, pd.DataFrame(), ["better"]).shape == (1, 5)


def test_an_interval_over_five_seeds_holds_the_mean_in_95_of_100():
    rng = np.random.default_rng(0)
    intervals = [over_seeds(rng.normal(0.3, 0.05, 5)) for _ in range(4000)]
    covered = np.mean([i["low"] <= 0.3 <= i["high"] for i in intervals])
    assert abs(covered - 0.95) < 0.012
