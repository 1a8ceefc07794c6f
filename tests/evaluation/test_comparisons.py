import numpy as np
import pandas as pd
import pytest

from recipe_lib.evaluation.comparisons import compare, compare_falls, compare_studies, recall_intervals, sentence
from recipe_lib.retrieval.intervals import mean_interval
from tests.evaluation.test_scores import KEY, Renamed


def frame(variant, split, hits, seed=1, test_set="same", cluster=None):
    """Ranks of one variant: i2r as given, r2i the opposite."""
    cluster = np.arange(len(hits)) if cluster is None else cluster
    ranks = [
        pd.DataFrame({**KEY, "variant": variant, "split": split, "seed": seed, "direction": way,
                      "query": np.arange(len(hits)), "rank": np.where(hits if way == "i2r" else ~hits, 1, 9),
                      "cluster": cluster, "test_set": test_set})
        for way in ("i2r", "r2i")
    ]  # fmt: skip
    return pd.concat(ranks, ignore_index=True)


def test_comparisons_name_direction_split_and_both_sides():
    rng = np.random.default_rng(0)
    weak, strong = rng.random(400) < 0.3, rng.random(400) < 0.6
    ranks = pd.concat([frame("a", "iid", strong), frame("b", "iid", weak), frame("a", "do_context", weak)])
    gain = compare(ranks, "a", "b", split="iid")
    assert gain["low"] > 0 and gain["difference"] == pytest.approx(strong.mean() - weak.mean())
    assert "a above b: i2r recall_1 +0." in sentence(gain)
    assert sentence(gain).endswith("on iid, 1 seed: another seed could differ")
    assert "below" in sentence(compare(ranks, "a", "b", split="iid", direction="r2i"))
    assert "not apart from" in sentence(compare(ranks, "b", "b", split="iid") | {"a": "c"})
    fall = compare(ranks, "a", "a", split="do_context", against_split="iid")
    ranks = pd.concat([ranks, frame("b", "do_context", weak)])
    falls = compare_falls(ranks, "a", "b", start="iid", end="do_context")
    assert falls["difference"] == pytest.approx(weak.mean() - strong.mean()) and falls["high"] < 0, "a falls more"
    assert fall["difference"] < 0 and "a: i2r" in sentence(fall) and "do_context against iid" in sentence(fall)
    table = recall_intervals(ranks, "i2r").set_index(["variant", "split"])
    assert table.loc[("a", "iid"), "value"] == strong.mean()
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()


def test_seeds_share_their_queries_or_say_that_they_do_not():
    rng = np.random.default_rng(0)
    hits = {(v, seed): rng.random(100) < p for v, p in (("a", 0.5), ("b", 0.4)) for seed in (1, 2, 3)}

    def ranks(test_sets):
        return pd.concat([frame(v, "iid", h, seed, test_sets[seed - 1]) for (v, seed), h in hits.items()])

    differences = [hits["a", seed].astype(int) - hits["b", seed] for seed in (1, 2, 3)]
    for test_sets, own in (("xxx", False), ("xyz", True)):
        row = compare(ranks(test_sets), "a", "b", split="iid", own_queries=own)
        assert tuple(row[key] for key in ("difference", "low", "high")) == mean_interval(differences, own_queries=own)
        assert row["seeds"] == 3 and sentence(row).endswith("on iid, 3 seeds")
    with pytest.raises(ValueError, match=r"seeds \[1, 2, 3\] hold different test recipes; state own_queries=True"):
        compare(ranks("xyz"), "a", "b", split="iid")
    with pytest.raises(ValueError, match="some share"):
        compare(ranks("xxy"), "a", "b", split="iid", own_queries=True)
    without = ranks("xxx").query("variant == 'a' or seed < 3")
    with pytest.raises(ValueError, match=r"seeds \[1, 2, 3\] and \[1, 2\] cannot be paired"):
        compare(without, "a", "b", split="iid")


def test_near_duplicates_count_as_one_cluster():
    hits = np.repeat(np.random.default_rng(0).random(60) < 0.5, 2)
    pairs, none = np.repeat(np.arange(60), 2), np.zeros(120, bool)
    wide, narrow = (
        compare(
            pd.concat([frame(v, "iid", h, cluster=c) for v, h in (("a", hits), ("b", none))]), "a", "b", split="iid"
        )
        for c in (pairs, None)
    )
    assert wide["high"] - wide["low"] > 1.2 * (narrow["high"] - narrow["low"])


def test_studies_compared(clip_store, tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(tmp_path))
    split, rng = clip_store.split("iid"), np.random.default_rng(0)

    def ranks(system, seed, hit, shared=True):
        frames = [
            pd.DataFrame({
                "system": system, "variant": variant, "seed": seed, "split": "iid", "direction": direction,
                "query": np.arange(30), "rank": np.where(rng.random(30) < hit, 1, 9),
                "cluster": np.arange(30), "test_set": "shared" if shared else f"of seed {seed}",
            })
            for direction in ("i2r", "r2i")
            for variant in ("baseline", "baseline@no_z")
        ]  # fmt: skip
        return pd.concat(frames)

    own, frames = ranks("DAR", 1, 0.5), {}
    for study, system, seed, hit in (("one", "H-T", 1, 0.1), ("two", "H-T", 2, 0.1), ("dar2", "DAR", 2, 0.5)):
        (tmp_path / study / "01_data_preparation").mkdir(parents=True)
        (tmp_path / study / "01_data_preparation/data").symlink_to(clip_store.folder)
        frames[study] = ranks(system, seed, hit)
        frames[study].to_parquet(tmp_path / study / "ranks.parquet")
    table = compare_studies(own, list(frames), split).set_index(["system", "direction"])
    assert set(table["variant"]) == {"baseline"} and (table["seeds"] == 2).all()
    assert (table.loc["DAR", ["difference", "difference_low", "difference_high"]] == 0).all(axis=None)
    row, base = table.loc[("H-T", "i2r")], table.loc[("DAR", "i2r")]
    hits = [f[(f.variant == "baseline") & (f.direction == "i2r")]["rank"].eq(1).mean() for f in frames.values()]
    assert row["recall_1"] == pytest.approx((hits[0] + hits[1]) / 2)
    assert row["difference"] == pytest.approx(row["recall_1"] - base["recall_1"])
    assert row["difference_low"] < row["difference"] < row["difference_high"] < 0
    assert (table["queries"] == "shared").all()
    frames["dar2"].drop(columns="cluster").to_parquet(tmp_path / "dar2" / "ranks.parquet")
    with pytest.raises(ValueError, match="has no cluster; evaluate dar2 again"):
        compare_studies(own, ["dar2"], split)
    ranks("DAR", 2, 0.5, shared=False).to_parquet(tmp_path / "dar2" / "ranks.parquet")
    table = compare_studies(own, ["dar2"], split)
    assert (table["queries"] == "own").all() and (table["seeds"] == 2).all()
    with pytest.raises(ValueError, match=r"none/ranks\.parquet is not there; run the study none first"):
        compare_studies(own, ["none"], split)
    with pytest.raises(ValueError, match="two studies call themselves H-T, seed 1"):
        compare_studies(own, ["one", "one"], split)
    with pytest.raises(ValueError, match="iid of the study one holds other recipes"):
        compare_studies(own, ["one"], Renamed(clip_store.split("val"), "iid"))
