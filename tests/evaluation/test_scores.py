from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from recipe_lib.causal.adjustment import ingredient_dictionary
from recipe_lib.causal.debiasing import VARIANTS
from recipe_lib.data.images import decode_jpeg
from recipe_lib.data.loading import recipe_batch, segment_pixels
from recipe_lib.evaluation import scores  # pytest would take a bare test_time_embeddings for a test
from recipe_lib.evaluation.scores import (
    COLUMNS,
    classifier_metrics,
    distances,
    encode,
    encode_recipes,
    encode_with_study,
    ingredient_lines,
    near_duplicate_accuracy,
    near_duplicate_pairs,
    score,
    write_results,
)
from recipe_lib.losses import posterior
from recipe_lib.retrieval import metrics
from recipe_lib.retrieval.metrics import cross_modal_ranks, rank_metrics
from recipe_lib.systems.attach import attach
from recipe_lib.systems.captions import bare_towers
from recipe_lib.systems.registry import build
from recipe_lib.systems.saving import save_system

KEY = {"system": "H-T", "variant": "v", "seed": 1, "split": "iid"}


@pytest.fixture
def baseline(tiny_config):
    torch.manual_seed(0)
    return build(tiny_config)


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
    own = [tuple(split.words[a:b].tolist()) for a, b in pairwise(bounds)]
    lines = 1 + split.ingredient_lines[row]
    return {"title": own[:1], "ingredients": own[1:lines], "instructions": own[lines:]}


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
    encoded = encode_recipes(baseline, split, batch_tokens=100)
    every = [sentences(split, row) for row in range(len(split))]
    for name, own in asked.items():
        expected = [s for recipe in every for s in recipe[name]]
        assert sorted(own) == sorted(set(expected)), name
        assert name == "title" or len(own) < len(expected), "nothing is there twice: the test shows nothing"
    assert list(asked) == ["title", "ingredients", "instructions"]
    rows = np.array_split(np.arange(len(split)), 7)
    with torch.no_grad():
        batches = torch.cat([baseline.encode_recipes(recipe_batch(split, part)).embedding for part in rows])
    torch.testing.assert_close(encoded, batches, rtol=1e-5, atol=1e-5)


def test_each_distinct_ingredient_line_is_encoded_once(baseline, tiny_store, monkeypatch):
    split = tiny_store.split("train")
    asked = spied(baseline.recipe_encoder, monkeypatch)
    lines = [len(features) for features, _ in ingredient_lines(baseline, split, batch_tokens=100)]
    assert len(lines) > 2 and sum(lines) == (split.positions >= 0).sum()
    assert len(asked["ingredients"]) == len(set(asked["ingredients"])) < sum(lines)
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
    encoded = encode(debiased, tiny_store.split("iid"), crop=48)
    images = scores.test_time_embeddings("debiased", debiased, encoded, seed=1)
    assert set(images) == {"debiased", "debiased@no_z", "debiased@soft", "debiased@true_labels"}
    assert torch.equal(images["debiased@no_z"], encoded.embedding)
    oracle = attach(baseline, VARIANTS["oracle"], dictionary)
    encoded = encode(oracle, tiny_store.split("iid"), crop=48)
    images = scores.test_time_embeddings("oracle", oracle, encoded, seed=1)
    torch.testing.assert_close(images["oracle"], encoded.embedding + encoded.z)
    for name in ("permuted_labels", "labels_only", "corrupted_0.1", "corrupted_0.9", "no_z"):
        assert not torch.allclose(images[f"oracle@{name}"], images["oracle"]), name
    labels_only = images["oracle@labels_only"]
    has_z = encoded.z.norm(dim=1) > 0
    assert torch.equal(labels_only[has_z], encoded.z[has_z]), "no trace of the photo"
    far = [float((images[f"oracle@corrupted_{r}"] - images["oracle"]).norm()) for r in (0.1, 0.5, 0.9)]
    assert far == sorted(far)
    assert set(
        scores.test_time_embeddings("baseline", baseline, encode(baseline, tiny_store.split("iid"), crop=48), 1)
    ) == {"baseline"}


def test_score_is_tidy_and_leaves_out_bags_that_do_not_fit():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    rows, ranks = score(KEY, x, x, candidates=[10, 40, 1000], bags=2, seed=0)
    frame = pd.DataFrame(rows)
    assert list(frame[COLUMNS].columns) == COLUMNS and list(frame["candidates"]) == [10, 10, 40, 40]
    assert (frame["recall_1"] == 1).all() and len(ranks) == 80 and (ranks["rank"] == 1).all()


def test_score_ranks_the_split_once(monkeypatch):
    images, recipes = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    ranked, bag_ranks = [], metrics.bag_ranks
    monkeypatch.setattr(metrics, "bag_ranks", lambda *a: (ranked.append(1), bag_ranks(*a))[1])
    rows, ranks = score(KEY, images, recipes, candidates=[10], bags=2, seed=0)
    assert len(ranked) == 1
    expected = cross_modal_ranks(images, recipes)
    for way, rank in zip(("i2r", "r2i"), expected, strict=True):
        assert ranks[ranks["direction"] == way]["rank"].tolist() == rank.tolist()
    assert [row["medr"] for row in rows if row["candidates"] == 40] == [rank_metrics(r)["medr"] for r in expected]


def test_classifier_metrics_equal_counting():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(60, 7)).astype(np.float32))
    labels = torch.from_numpy((rng.random((60, 7)) < 0.3).astype(np.float32))
    labels[:, 2] = 0  # never there: left out of all means
    logits[:, 4] = -9  # never named: its precision and F1 are 0
    table = classifier_metrics(logits, labels, 2.0, 0.0).set_index("probability")
    for reading, bar in (("sigmoid", 0.0), ("calibrated", None)):
        precision, recall, f1, all_hits, all_named, all_there = [], [], [], 0, 0, 0
        for k in (0, 1, 3, 4, 5, 6):
            named = [x > bar if bar is not None else float(posterior(x, 2.0, 0.0)) >= 0.5 for x in logits[:, k]]
            hits = sum(bool(n and t) for n, t in zip(named, labels[:, k], strict=True))
            named, there = sum(map(bool, named)), int(labels[:, k].sum())
            precision.append(hits / named if named else 0)
            recall.append(hits / there)
            f1.append(2 * precision[-1] * recall[-1] / (precision[-1] + recall[-1]) if hits else 0)
            all_hits, all_named, all_there = all_hits + hits, all_named + named, all_there + there
        p, r, row = np.mean(precision), np.mean(recall), table.loc[reading]
        assert (row["macro_precision"], row["macro_recall"]) == pytest.approx((p, r))
        assert row["macro_f1"] == pytest.approx(np.mean(f1))
        assert row["macro_f1_of_means"] == pytest.approx(2 * p * r / (p + r)) and row["macro_f1"] < 2 * p * r / (p + r)
        p, r = all_hits / all_named, all_hits / all_there
        assert (row["micro_precision"], row["micro_recall"]) == pytest.approx((p, r))
        assert row["micro_f1"] == pytest.approx(2 * p * r / (p + r))
    assert table.loc["calibrated", "micro_recall"] < table.loc["sigmoid", "micro_recall"]


def test_a_classifier_that_names_nothing_scores_zero():
    table = classifier_metrics(torch.full((3, 2), -9.0), torch.eye(3, 2), 2.0, 0.0)
    assert (table.filter(regex="precision$|recall$|f1").drop(columns="macro_average_precision") == 0).all(axis=None)


def test_near_duplicates_of_a_perfect_a_blind_and_a_system_that_sees_the_table_alone():
    twin = np.repeat(np.arange(300), 2)  # recipes 2i and 2i + 1 differ in one ingredient
    pairs = np.stack([np.arange(600), np.arange(600) ^ 1], 1)
    dish = torch.nn.functional.one_hot(torch.from_numpy(twin)).float()
    differs = torch.tensor([1.0, -1.0]).repeat(300)[:, None]
    recipes = torch.cat([dish, 0.1 * differs], 1)
    random = torch.Generator().manual_seed(0)
    blind, table = torch.randn(600, 301, generator=random), torch.randn(10, 301, generator=random)
    tables = table[torch.randint(10, (600,), generator=random)]
    for queries, low, high in ((recipes, 1.0, 1.0), (blind, 0.44, 0.56), (tables, 0.44, 0.56)):
        assert low <= near_duplicate_accuracy(queries, recipes, pairs) <= high
    alike = torch.cat([dish, torch.zeros(600, 1)], 1)
    assert near_duplicate_accuracy(alike, recipes, pairs) == 0, "a tie counts against the system"


def test_near_duplicates():
    recipes = torch.eye(3)
    images = torch.tensor([[1.0, 0.2, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    pairs = near_duplicate_pairs(["a", "b", "c"], ["b", "a", ""])
    assert pairs.tolist() == [[0, 1], [1, 0]] and near_duplicate_accuracy(images, recipes, pairs) == 0.5
    recipes, images = (
        torch.tensor([[np.cos(a), np.sin(a)] for a in angles]) for angles in ([0, 0.7, 2], [0.3, 0.34, 2])
    )
    # Both photos lean to the first recipe; each recipe stands nearer to its own photo.
    assert near_duplicate_accuracy(images, recipes, pairs) == 0.5
    assert near_duplicate_accuracy(recipes, images, pairs) == 1.0
    none = near_duplicate_pairs(["a", "b", "c"], ["", "", "gone"])
    assert none.shape == (0, 2) and near_duplicate_accuracy(images, recipes, none) is None


def test_results_are_written_whole(tmp_path):
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    rows, ranks = score(KEY, x, x, candidates=[], bags=1, seed=0)
    write_results(tmp_path, pd.DataFrame(rows)[COLUMNS], ranks, {"verdict": "none"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "ranks.parquet", "results.csv"]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "ranks.parquet"), ranks)


# ---- products of distances ----


def test_descriptions_and_segments_of_a_split(dar, clip_store, tmp_path):
    split = clip_store.split("iid")
    encoded, in_small_batches = (encode(dar, split, crop=56, kept=tmp_path, batch_size=size) for size in (30, 7))
    for name in ("recipes", "descriptions", "segments"):
        torch.testing.assert_close(getattr(encoded, name), getattr(in_small_batches, name), rtol=1e-4, atol=1e-5)
    tokens = torch.from_numpy(split.description_tokens(np.array([4])))
    torch.testing.assert_close(encoded.descriptions[4:5], dar.encode_descriptions(tokens), rtol=1e-4, atol=1e-5)
    jpegs = split.segments(4)
    pixels = torch.from_numpy(np.stack([np.asarray(decode_jpeg(jpeg)) for jpeg in jpegs])).permute(0, 3, 1, 2)
    features = dar.segment_encoder.features(pixels)[None]
    expected = dar.encode_segments(features, torch.ones(1, len(jpegs), dtype=torch.bool))
    torch.testing.assert_close(encoded.segments[4:5], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoded.recipes, dar.encode_recipes(recipe_batch(split, np.arange(30))).embedding)


def test_adapted_segments_of_a_split(clip_config, clip_store, tmp_path):
    torch.manual_seed(0)
    system = build(replace(clip_config, segment_encoder="adapted", segments=2)).eval()
    split = clip_store.split("iid")
    photos = split.photo_start[:-1]
    pixels, mask = segment_pixels(split, photos, 2)
    with torch.no_grad():
        expected = system.encode_segments(pixels, mask)
    encoded = encode(system, split, crop=56, kept=tmp_path)
    torch.testing.assert_close(encoded.segments, expected, rtol=1e-4, atol=1e-5)
    system.segment_encoder.adapters.up[0].bias.data[0] += 1  # all channels alike: LayerNorm would not see it
    assert not torch.allclose(encode(system, split, crop=56, kept=tmp_path).segments, expected, atol=1e-3)


def test_photos_without_segments_are_ranked(dar, clip_store, tmp_path, monkeypatch):
    split = clip_store.split("iid")
    counts = split.segment_counts.copy()
    counts[split.photo_start[3]] = 0
    monkeypatch.setitem(vars(split), "segment_counts", counts)
    encoded = encode(dar, split, crop=56, kept=tmp_path)
    assert (encoded.segments[3] == 1).all() and not (encoded.segments[2] == 1).any()
    cross_modal_ranks(*distances(encoded.embedding, encoded.recipes, encoded)["++"])


@pytest.mark.parametrize("encoders", ["captions", "zero_shot"])
def test_bare_towers_of_a_split(dar, clip_store, encoders):
    bare, split = bare_towers(dar, encoders).eval(), clip_store.split("iid")
    expected = bare.encode_recipes(recipe_batch(split, np.arange(30))).embedding
    torch.testing.assert_close(encode_recipes(bare, split), expected, rtol=1e-4, atol=1e-5)


def test_distances_are_products_of_one_minus_cosine(dar, clip_store, tmp_path):
    encoded = encode(dar, clip_store.split("iid"), crop=56, kept=tmp_path)
    levels = distances(encoded.embedding, encoded.recipes, encoded)

    def d(a, b):
        a, b = (torch.nn.functional.normalize(x.double(), dim=1) for x in (a, b))
        return 1 - a @ b.T

    ir, id_ = d(encoded.embedding, encoded.recipes), d(encoded.embedding, encoded.descriptions)
    sr = d(encoded.segments, encoded.recipes)
    for suffix, expected in {"": ir, "+": ir * id_, "++": ir * id_ * sr}.items():
        ranks = cross_modal_ranks(*levels.pop(suffix))
        for rank, matrix in zip(ranks, (expected, expected.T), strict=True):
            assert rank.tolist() == (matrix <= matrix.diagonal()[:, None]).sum(1).tolist(), suffix
    assert not levels
    encoded.descriptions = None
    assert set(distances(encoded.embedding, encoded.recipes, encoded)) == {"", "+s"}
    assert set(distances(encoded.embedding, encoded.recipes, None)) == {""}


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
    theirs = encode_with_study("dar", tiny_store.split("iid"), tmp_path)
    direct = encode(dar, clip_store.split("iid"), crop=56, kept=tmp_path)
    assert torch.equal(theirs.segments, direct.segments)
    images, recipes = distances(own.embedding, own.recipes, theirs)["++"]
    assert images[0] is own.embedding and torch.equal(images[1], direct.embedding) and images[2] is theirs.segments
    assert recipes[0] is own.recipes and recipes[1] is theirs.descriptions and torch.equal(recipes[2], direct.recipes)
    with pytest.raises(ValueError, match="val of the study dar holds other recipes"):
        encode_with_study("dar", Renamed(tiny_store.split("iid"), "val"), tmp_path)
    plain = tmp_path / "plain"
    (plain / "02_baseline_training").mkdir(parents=True)
    save_system(baseline, plain / "02_baseline_training")
    with pytest.raises(ValueError, match="reads neither"):
        encode_with_study("plain", tiny_store.split("iid"), tmp_path)


class Renamed:
    """A split of one name with the recipes of another."""

    def __init__(self, split, name):
        self.ids, self.name = split.ids, name
