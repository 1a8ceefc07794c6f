from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from recipe_lib.causal import ingredient_dictionary
from recipe_lib.evaluation import (
    COLUMNS,
    classifier_metrics,
    compare,
    compare_falls,
    encode,
    ingredient_lines,
    intervals,
    nearest,
    queries,
    score,
    sentence,
    twin_accuracy,
    write_results,
)
from recipe_lib.models import VARIANTS, RetrievalSystem, attach

KEY = {"system": "H-T", "variant": "v", "seed": 1, "split": "iid"}


@pytest.fixture
def baseline(tiny_config):
    torch.manual_seed(0)
    return RetrievalSystem(tiny_config)


@pytest.mark.parametrize("name", VARIANTS)
def test_encoding_does_not_depend_on_the_batch(baseline, tiny_store, name):
    split = tiny_store.split("iid")
    small = {"classifier_dim": 16, "classifier_heads": 2, "classifier_feedforward": 32}
    system = attach(baseline, replace(VARIANTS[name], **small), torch.randn(20, 16), torch.ones(20))
    one, other = (encode(system, split, crop=48, batch_size=size) for size in (7, 30))
    for field in ("embedding", "z", "recipes"):
        torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=1e-3, atol=1e-5)
    assert len(one.labels) == 30


def test_a_batch_without_labelled_lines_is_passed_over(baseline, tiny_store):
    split = tiny_store.split("train")
    whole = sum(len(classes) for _, classes in ingredient_lines(baseline, split, batch_size=8))
    split.positions = np.where(np.arange(len(split.positions)) < split.label_start[8], -1, split.positions)
    assert 0 < sum(len(classes) for _, classes in ingredient_lines(baseline, split, batch_size=8)) < whole


def test_dictionary_lines_equal_loops(baseline, tiny_store):
    split = tiny_store.split("train")
    dictionary = ingredient_dictionary(ingredient_lines(baseline, split, batch_size=17), tiny_store.classes.names)
    encoder, k = baseline.recipe_encoder.eval(), 3
    vectors = []
    for row in range(len(split)):
        own = range(split.label_start[row], split.label_start[row + 1])
        for i in own:
            if split.labels[i] == k and split.positions[i] >= 0:
                s = split.recipe_start[row] + 1 + split.positions[i]
                tokens = torch.tensor(split.words[split.sentence_start[s] : split.sentence_start[s + 1]])[None].long()
                vectors.append(encoder.encode_sentences("ingredients", tokens)[0].detach())
    assert len(vectors) == tiny_store.classes.counts[k], "every training recipe that mentions it, once each"
    torch.testing.assert_close(dictionary[k], torch.stack(vectors).mean(0), rtol=1e-4, atol=1e-5)


def test_controls_change_what_they_say(baseline, tiny_store):
    small = {"classifier_dim": 16, "classifier_heads": 2, "classifier_feedforward": 32}
    dictionary = torch.randn(20, 16)
    debiased = attach(baseline, replace(VARIANTS["debiased"], **small), dictionary)
    found = encode(debiased, tiny_store.split("iid"), crop=48)
    images = queries("debiased", debiased, found, seed=1)
    assert set(images) == {"debiased", "debiased@no_z", "debiased@soft", "debiased@true_labels"}
    assert torch.equal(images["debiased@no_z"], found.embedding)
    oracle = attach(baseline, VARIANTS["oracle"], dictionary)
    found = encode(oracle, tiny_store.split("iid"), crop=48)
    images = queries("oracle", oracle, found, seed=1)
    torch.testing.assert_close(images["oracle"], found.embedding + found.z)
    for name in ("permuted_labels", "labels_only", "corrupted_0.1", "corrupted_0.9", "no_z"):
        assert not torch.allclose(images[f"oracle@{name}"], images["oracle"]), name
    labels_only = images["oracle@labels_only"]
    assert torch.equal(labels_only[found.z.norm(dim=1) > 0], found.z[found.z.norm(dim=1) > 0]), "no trace of the photo"
    far = [float((images[f"oracle@corrupted_{r}"] - images["oracle"]).norm()) for r in (0.1, 0.5, 0.9)]
    assert far == sorted(far)
    assert set(queries("baseline", baseline, encode(baseline, tiny_store.split("iid"), crop=48), 1)) == {"baseline"}


def test_score_is_tidy_and_leaves_out_bags_that_do_not_fit():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    rows, ranks = score(KEY, x, x, candidates=[10, 40, 1000], bags=2, seed=0)
    frame = pd.DataFrame(rows)
    assert list(frame[COLUMNS].columns) == COLUMNS and list(frame["candidates"]) == [10, 10, 40, 40]
    assert (frame["recall_1"] == 1).all() and len(ranks) == 80 and (ranks["rank"] == 1).all()


def test_classifier_metrics_equal_counting():
    logits = torch.tensor([[3.0, -3.0, 3.0], [3.0, 3.0, -3.0], [-3.0, -3.0, -3.0]])
    labels = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    table = classifier_metrics(logits, labels, 2.0, 0.0).set_index(["probability", "average"])
    # The third class never occurs and is left out of all means: 2 + 1 right, none wrong, 1 missed.
    micro = table.loc[("sigmoid", "micro")]
    assert (micro["precision"], micro["recall"]) == (1.0, 0.75)
    assert table.loc[("sigmoid", "macro"), "recall"] == pytest.approx((2 / 3 + 1) / 2)
    logits = torch.full((4, 1), 0.1)  # sigmoid .52, posterior .25
    labels = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    table = classifier_metrics(logits, labels, 2.0, 0.0).set_index(["probability", "average"])
    assert table.loc[("sigmoid", "micro"), "precision"] == 0.25
    assert table.loc[("calibrated", "micro"), "recall"] == 0


def test_twins_and_nearest():
    recipes = torch.eye(3)
    images = torch.tensor([[1.0, 0.2, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    assert twin_accuracy(images, recipes, ["a", "b", "c"], ["b", "a", ""]) == 0.5
    assert twin_accuracy(images, recipes, ["a", "b", "c"], ["", "", "gone"]) is None
    assert nearest(images, recipes, [2, 0], k=2)[1] == [0, 1]


def test_comparisons_name_direction_split_and_both_sides():
    def frame(variant, split, hits):
        rows = [
            {**KEY, "variant": variant, "split": split, "direction": way, "query": q, "rank": 1 if hit else 9}
            for way in ("i2r", "r2i")
            for q, hit in enumerate(hits if way == "i2r" else ~hits)
        ]
        return pd.DataFrame(rows)

    rng = np.random.default_rng(0)
    weak, strong = rng.random(400) < 0.3, rng.random(400) < 0.6
    ranks = pd.concat([frame("a", "iid", strong), frame("b", "iid", weak), frame("a", "do_context", weak)])
    gain = compare(ranks, "a", "b", split="iid")
    assert gain["low"] > 0 and gain["difference"] == pytest.approx(strong.mean() - weak.mean())
    assert "a above b: i2r recall_1 +0." in sentence(gain) and "on iid, 1 seed" in sentence(gain)
    assert "below" in sentence(compare(ranks, "a", "b", split="iid", direction="r2i"))
    assert "not apart from" in sentence(compare(ranks, "b", "b", split="iid") | {"a": "c"})
    fall = compare(ranks, "a", "a", split="do_context", against_split="iid")
    ranks = pd.concat([ranks, frame("b", "do_context", weak)])
    falls = compare_falls(ranks, "a", "b", start="iid", end="do_context")
    assert falls["difference"] == pytest.approx(weak.mean() - strong.mean()) and falls["high"] < 0, "a falls more"
    assert fall["difference"] < 0 and "a: i2r" in sentence(fall) and "do_context against iid" in sentence(fall)
    table = intervals(ranks, "i2r").set_index(["variant", "split"])
    assert table.loc[("a", "iid"), "value"] == strong.mean()
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()


def test_results_are_written_whole(tmp_path):
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    rows, ranks = score(KEY, x, x, candidates=[], bags=1, seed=0)
    write_results(tmp_path, pd.DataFrame(rows)[COLUMNS], ranks, {"verdict": "none"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "ranks.parquet", "results.csv"]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "ranks.parquet"), ranks)
