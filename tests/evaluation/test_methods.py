from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recipe_lib.evaluation.methods import agreement, findings, gains, published

PAPERS = Path(__file__).parents[2] / "params/published.csv"


class Studies:
    """Two methods of two seeds each, ranks made by hand."""

    worlds = ("good", "bad")

    def ranks(self, method: str) -> pd.DataFrame:
        first = {"good": 30, "bad": 10}[method]  # of 40 queries, how many find their own at rank 1
        frames = []
        for seed in (1, 2):
            for variant, more in (("baseline", 0), ("equal_compute", 2), ("debiased", 2 + (method == "good") * 5)):
                for direction in ("i2r", "r2i"):
                    ranks = np.where(np.arange(40) < first + more, 1, 7)
                    frame = pd.DataFrame({"rank": ranks, "query": np.arange(40), "cluster": np.arange(40)})
                    frames.append(
                        frame.assign(variant=variant, direction=direction, split="iid", seed=seed, test_set=seed)
                    )
        frames += [frames[0].assign(variant="debiased@no_z"), frames[0].assign(variant="debiased+")]
        frames.append(frames[0].assign(variant="zero_shot"))
        return pd.concat(frames, ignore_index=True)


def test_findings_hold_recall_and_median_rank_of_every_trained_variant():
    table = findings(Studies())
    table = table[~table["variant"].isin(["debiased+", "zero_shot"])].set_index(["method", "variant", "direction"])
    assert len(table) == 2 * 3 * 2 and (table["seeds"] == 2).all()
    good, bad = table.loc["good", "baseline", "i2r"], table.loc["bad", "debiased", "r2i"]
    assert good["recall_1"] == 30 / 40 and good["recall_5"] == 30 / 40 and good["recall_10"] == 1
    assert (good["medr"], bad["medr"]) == (1, 7) and bad["recall_1"] == 12 / 40
    assert (table["recall_1_low"] <= table["recall_1"]).all() and (table["recall_1"] <= table["recall_1_high"]).all()


def test_gains_are_over_the_control_on_the_same_queries():
    table = gains(Studies())
    assert set(table["a"]) == {"debiased"} and set(table["split"]) == {"iid"} and len(table) == 2 * 2
    table = table.set_index(["method", "direction"])
    assert np.allclose(table.loc["good", "difference"], 5 / 40) and (table.loc["bad", "difference"] == 0).all()
    assert set(table["b"]) == {"equal_compute"}


def test_agreement_is_of_the_methods_that_both_surely_have():
    papers = pd.DataFrame(
        {
            "method": ["a", "b", "c", "", "a", "d"],
            "candidates": [1000, 1000, 1000, 1000, 10_000, 1000],
            "direction": "i2r",
            "recall_1": [10.0, 20.0, 30.0, 90.0, 1.0, 50.0],
            "certainty": ["read"] * 5 + ["low"],
        }
    )
    here = pd.DataFrame(
        {"method": list("abcd"), "variant": "baseline", "direction": "i2r", "recall_1": [0.3, 0.2, 0.1, 1]}
    )
    same = agreement(here, papers)
    assert same["rho"] == pytest.approx(-1) and list(same["methods"].index) == ["a", "b", "c"]
    assert np.isnan(agreement(here[:2], papers)["rho"])


def test_every_published_number_says_where_it_is_from_and_how_sure_it_is():
    table = published(PAPERS)
    assert (table["source"].str.len() > 3).all() and (table["where"].str.len() > 3).all()
    assert set(table["certainty"]) == {"read", "low"} and set(table["direction"]) <= {"i2r", "r2i"}
    assert not table.duplicated(["system", "candidates", "direction"]).any()
    assert table["recall_1"].between(1, 100).all() and (table["recall_1"] <= table["recall_10"].fillna(100)).all()
    named = table[table["method"] != ""]
    assert not named.duplicated(["method", "candidates", "direction"]).any()
