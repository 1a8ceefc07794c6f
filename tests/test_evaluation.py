from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from recipe_lib.causal import ingredient_dictionary
from recipe_lib.data.loading import recipe_batch
from recipe_lib.evaluation import (
    COLUMNS,
    classifier_metrics,
    compare,
    compare_falls,
    encode,
    encode_recipes,
    ingredient_lines,
    intervals,
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


def sentences(split, row):
    """Token ids of a recipe: title, ingredient lines, steps."""
    bounds = split.sentence_start[split.recipe_start[row] : split.recipe_start[row + 1] + 1]
    found = [tuple(split.words[a:b].tolist()) for a, b in pairwise(bounds)]
    lines = 1 + split.ingredient_lines[row]
    return {"title": found[:1], "ingredients": found[1:lines], "instructions": found[lines:]}


def spied(encoder, monkeypatch):
    """What is asked of the first level, sentence by sentence: {component: [token ids without padding]}."""
    asked, inner = {}, encoder.encode_sentences

    def spy(name, tokens):
        asked.setdefault(name, []).extend(tuple(x for x in row if x) for row in tokens.tolist())
        return inner(name, tokens)

    monkeypatch.setattr(encoder, "encode_sentences", spy)
    return asked


def test_a_whole_split_equals_its_batches_and_each_distinct_sentence_is_encoded_once(baseline, tiny_store, monkeypatch):
    split = tiny_store.split("train")
    asked = spied(baseline.recipe_encoder, monkeypatch)
    found = encode_recipes(baseline, split, batch_tokens=100)
    every = [sentences(split, row) for row in range(len(split))]
    for name, own in asked.items():
        expected = [s for recipe in every for s in recipe[name]]
        assert sorted(own) == sorted(set(expected)), name
        assert name == "title" or len(own) < len(expected), "nothing is there twice: the test shows nothing"
    assert list(asked) == ["title", "ingredients", "instructions"]
    rows = np.array_split(np.arange(len(split)), 7)
    with torch.no_grad():
        batches = torch.cat([baseline.encode_recipes(recipe_batch(split, part)).embedding for part in rows])
    torch.testing.assert_close(found, batches, rtol=1e-5, atol=1e-5)


def test_each_distinct_ingredient_line_is_encoded_once(baseline, tiny_store, monkeypatch):
    split = tiny_store.split("train")
    asked = spied(baseline.recipe_encoder, monkeypatch)
    found = [len(features) for features, _ in ingredient_lines(baseline, split, batch_tokens=100)]
    assert len(found) > 2 and sum(found) == (split.positions >= 0).sum()
    assert len(asked["ingredients"]) == len(set(asked["ingredients"])) < sum(found)
    split.positions = np.full_like(split.positions, -1)
    assert list(ingredient_lines(baseline, split)) == [], "no line that mentions a class was kept"


def test_dictionary_lines_equal_loops(baseline, tiny_store):
    split = tiny_store.split("train")
    dictionary = ingredient_dictionary(ingredient_lines(baseline, split, batch_tokens=100), tiny_store.classes.names)
    encoder, k = baseline.recipe_encoder.eval(), 3
    vectors = []
    for row in range(len(split)):
        own = range(split.label_start[row], split.label_start[row + 1])
        for i in own:
            if split.labels[i] == k and split.positions[i] >= 0:
                tokens = torch.tensor([sentences(split, row)["ingredients"][split.positions[i]]])
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


def test_twins():
    recipes = torch.eye(3)
    images = torch.tensor([[1.0, 0.2, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    assert twin_accuracy(images, recipes, ["a", "b", "c"], ["b", "a", ""]) == 0.5
    assert twin_accuracy(images, recipes, ["a", "b", "c"], ["", "", "gone"]) is None


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
