from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from recipe_lib.causal import ingredient_dictionary
from recipe_lib.comparisons import beside, compare, compare_falls, intervals, sentence
from recipe_lib.data.images import decode_jpeg
from recipe_lib.data.loading import recipe_batch, segment_pixels
from recipe_lib.evaluation import (
    COLUMNS,
    classifier_metrics,
    distances,
    encode,
    encode_beside,
    encode_recipes,
    ingredient_lines,
    queries,
    score,
    twin_accuracy,
    write_results,
)
from recipe_lib.models import VARIANTS, RetrievalSystem, attach, bare_towers
from recipe_lib.retrieval import cross_modal_ranks
from recipe_lib.saving import save_system

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


# ---- products of distances ----


def test_descriptions_and_segments_of_a_split(dar, clip_store, tmp_path):
    split = clip_store.split("iid")
    found, small = (encode(dar, split, crop=56, kept=tmp_path, batch_size=size) for size in (30, 7))
    for name in ("recipes", "descriptions", "segments"):
        torch.testing.assert_close(getattr(found, name), getattr(small, name), rtol=1e-4, atol=1e-5)
    tokens = torch.from_numpy(split.description_tokens(np.array([4])))
    torch.testing.assert_close(found.descriptions[4:5], dar.encode_descriptions(tokens), rtol=1e-4, atol=1e-5)
    jpegs = split.segments(4)
    pixels = torch.from_numpy(np.stack([np.asarray(decode_jpeg(jpeg)) for jpeg in jpegs])).permute(0, 3, 1, 2)
    features = dar.segment_encoder.features(pixels)[None]
    expected = dar.encode_segments(features, torch.ones(1, len(jpegs), dtype=torch.bool))
    torch.testing.assert_close(found.segments[4:5], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.recipes, dar.encode_recipes(recipe_batch(split, np.arange(30))).embedding)


def test_adapted_segments_of_a_split(clip_config, clip_store, tmp_path):
    torch.manual_seed(0)
    system = RetrievalSystem(replace(clip_config, segment_encoder="adapted", segments=2)).eval()
    split = clip_store.split("iid")
    photos = split.photo_start[:-1]
    pixels, mask = segment_pixels(split, photos, 2)
    with torch.no_grad():
        expected = system.encode_segments(pixels, mask)
    found = encode(system, split, crop=56, kept=tmp_path)
    torch.testing.assert_close(found.segments, expected, rtol=1e-4, atol=1e-5)
    system.segment_encoder.adapters.up[0].bias.data[0] += 1  # all channels alike: LayerNorm would not see it
    assert not torch.allclose(encode(system, split, crop=56, kept=tmp_path).segments, expected, atol=1e-3)


def test_photos_without_segments_are_ranked(dar, clip_store, tmp_path, monkeypatch):
    split = clip_store.split("iid")
    counts = split.segment_counts.copy()
    counts[split.photo_start[3]] = 0
    monkeypatch.setitem(vars(split), "segment_counts", counts)
    found = encode(dar, split, crop=56, kept=tmp_path)
    assert (found.segments[3] == 1).all() and not (found.segments[2] == 1).any()
    cross_modal_ranks(*distances(found.embedding, found.recipes, found)["++"])


@pytest.mark.parametrize("encoders", ["captions", "zero_shot"])
def test_bare_towers_of_a_split(dar, clip_store, encoders):
    bare, split = bare_towers(dar, encoders).eval(), clip_store.split("iid")
    expected = bare.encode_recipes(recipe_batch(split, np.arange(30))).embedding
    torch.testing.assert_close(encode_recipes(bare, split), expected, rtol=1e-4, atol=1e-5)


def test_distances_are_products_of_one_minus_cosine(dar, clip_store, tmp_path):
    found = encode(dar, clip_store.split("iid"), crop=56, kept=tmp_path)
    levels = distances(found.embedding, found.recipes, found)

    def d(a, b):
        a, b = (torch.nn.functional.normalize(x.double(), dim=1) for x in (a, b))
        return 1 - a @ b.T

    ir, id_ = d(found.embedding, found.recipes), d(found.embedding, found.descriptions)
    sr = d(found.segments, found.recipes)
    for suffix, expected in {"": ir, "+": ir * id_, "++": ir * id_ * sr}.items():
        ranks = cross_modal_ranks(*levels.pop(suffix))
        for rank, matrix in zip(ranks, (expected, expected.T), strict=True):
            assert rank.tolist() == (matrix <= matrix.diagonal()[:, None]).sum(1).tolist(), suffix
    assert not levels
    found.descriptions = None
    assert set(distances(found.embedding, found.recipes, found)) == {"", "+s"}
    assert set(distances(found.embedding, found.recipes, None)) == {""}


def test_distances_of_another_study_multiply_those_of_any_system(
    dar, clip_store, baseline, tiny_store, tmp_path, monkeypatch
):
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(tmp_path))
    other = tmp_path / "dar"
    (other / "02_baseline_training").mkdir(parents=True)
    save_system(dar, other / "02_baseline_training")
    (other / "01_data_preparation").mkdir()
    (other / "01_data_preparation/data").symlink_to(clip_store.folder)
    own = encode(baseline, tiny_store.split("iid"), crop=48)
    theirs = encode_beside("dar", tiny_store.split("iid"), tmp_path)
    direct = encode(dar, clip_store.split("iid"), crop=56, kept=tmp_path)
    assert torch.equal(theirs.segments, direct.segments)
    images, recipes = distances(own.embedding, own.recipes, theirs)["++"]
    assert images[0] is own.embedding and torch.equal(images[1], direct.embedding) and images[2] is theirs.segments
    assert recipes[0] is own.recipes and recipes[1] is theirs.descriptions and torch.equal(recipes[2], direct.recipes)
    with pytest.raises(ValueError, match="val of the study dar holds other recipes"):
        encode_beside("dar", Renamed(tiny_store.split("iid"), "val"), tmp_path)
    plain = tmp_path / "plain"
    (plain / "02_baseline_training").mkdir(parents=True)
    save_system(baseline, plain / "02_baseline_training")
    with pytest.raises(ValueError, match="reads neither"):
        encode_beside("plain", tiny_store.split("iid"), tmp_path)


class Renamed:
    """A split of one name with the recipes of another."""

    def __init__(self, split, name):
        self.ids, self.name = split.ids, name


def test_studies_beside_each_other(clip_store, tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(tmp_path))
    split, rng = clip_store.split("iid"), np.random.default_rng(0)

    def ranks(system, seed, hit):
        frames = [
            pd.DataFrame({
                "system": system, "variant": variant, "seed": seed, "split": "iid", "direction": direction,
                "query": np.arange(30), "rank": np.where(rng.random(30) < hit, 1, 9),
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
    table = beside(own, list(frames), split).set_index(["system", "direction"])
    assert set(table["variant"]) == {"baseline"} and (table["seeds"] == 2).all()
    assert (table.loc["DAR", ["difference", "difference_low", "difference_high"]] == 0).all(axis=None)
    row, base = table.loc[("H-T", "i2r")], table.loc[("DAR", "i2r")]
    hits = [f[(f.variant == "baseline") & (f.direction == "i2r")]["rank"].eq(1).mean() for f in frames.values()]
    assert row["recall_1"] == pytest.approx((hits[0] + hits[1]) / 2)
    assert row["difference"] == pytest.approx(row["recall_1"] - base["recall_1"])
    assert row["difference_low"] < row["difference"] < row["difference_high"] < 0
    with pytest.raises(ValueError, match=r"none/ranks\.parquet is not there; run the study none first"):
        beside(own, ["none"], split)
    with pytest.raises(ValueError, match="two studies call themselves H-T, seed 1"):
        beside(own, ["one", "one"], split)
    with pytest.raises(ValueError, match="iid of the study one holds other recipes"):
        beside(own, ["one"], Renamed(clip_store.split("val"), "iid"))
