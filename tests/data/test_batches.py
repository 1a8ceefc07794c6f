import itertools

import numpy as np

from recipe_lib.data.batches import half_of_a_kind, neighbours, of_one_stratum, strata, with_neighbours
from recipe_lib.data.loading import PairedBatches


def test_strata_are_the_cuisines_of_a_kitchen_and_clusters_of_words_elsewhere(tiny_store):
    split = tiny_store.split("train")
    cuisines = [truth["cuisine"] for truth in split.truth]
    known = strata(split, 1)
    assert len(set(zip(known.tolist(), cuisines, strict=True))) == len(set(cuisines)) == known.max() + 1
    split.__dict__["truth"] = [{}] * len(split)
    clusters = strata(split, 1)
    assert len(clusters) == len(split) and 2 <= len(set(clusters.tolist())) <= 10
    assert (clusters == strata(split, 1)).all()


def test_neighbours_are_the_nearest_by_weighted_labels(tiny_store):
    split = tiny_store.split("train")
    labels = split.label_matrix().astype(float)
    weight = np.log((1 + len(split)) / (1 + labels.sum(0))) + 1
    vectors = labels * weight
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-9)
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -1)
    nearest = neighbours(split)
    assert nearest.shape == (len(split), 8) and (nearest != np.arange(len(split))[:, None]).all()
    best = -np.sort(-cosine, 1)[:, :8]
    np.testing.assert_allclose(np.take_along_axis(cosine, nearest, 1), best, atol=1e-5)


def test_orders_hold_each_row_once():
    rng = np.random.default_rng(0)
    rows = rng.permutation(100)
    of, nearest = rng.integers(5, size=100), rng.integers(100, size=(100, 8))
    ordered = of_one_stratum(rows, of, rng)
    assert sorted(ordered.tolist()) == list(range(100)) and (np.diff(of[ordered]) != 0).sum() == 4
    paired = with_neighbours(rows, nearest)
    assert sorted(paired.tolist()) == list(range(100))
    assert sum(b in nearest[a] for a, b in itertools.pairwise(paired)) > 45
    assert with_neighbours(np.array([3]), nearest).tolist() == [3]


def test_a_share_of_the_batches_is_arranged_and_every_pair_stands_in_one():
    of, nearest = np.arange(200) % 4, (np.arange(200)[:, None] ^ 1) + np.zeros((1, 8), int)
    plain = [d.rows for d in PairedBatches(200, 10, seed=3)]
    for options, special in (
        ({"strata": of, "stratified": 0.5}, lambda rows: len(set(of[rows].tolist())) == 1),
        ({"nearest": nearest, "hard": 0.5}, lambda rows: all(row ^ 1 in rows for row in rows.tolist())),
    ):
        sampler = PairedBatches(200, 10, seed=3, **options)
        batches = [draw.rows for draw in sampler]
        assert sorted(np.concatenate(batches).tolist()) == list(range(200)) and len(batches) == len(plain)
        assert 6 <= sum(map(special, batches)) <= 10 and sum(map(special, plain)) == 0
        assert all((a.rows == b).all() for a, b in zip(sampler, batches, strict=True)), "of one epoch the same again"
        sampler.set_epoch(1)
        assert any((a.rows != b).any() for a, b in zip(sampler, batches, strict=True))
    off = PairedBatches(200, 10, seed=3, strata=of, stratified=0.0)
    assert all((a.rows == b).all() for a, b in zip(off, plain, strict=True))


def test_half_of_a_batch_are_two_of_a_kind():
    """Half of the recipes have a category, as in Recipe1M: of each batch a half are pairs, the others have none."""
    rng = np.random.default_rng(0)
    category = np.where(np.arange(400) < 200, np.arange(400) // 20, -1)
    sampler = PairedBatches(400, 20, seed=3, category=category)
    batches = [draw.rows for draw in sampler]
    assert sorted(np.concatenate(batches).tolist()) == list(range(400))
    for rows in batches[:-1]:
        kinds = category[rows]
        assert (kinds < 0).sum() == 10
        assert all((kinds == kind).sum() >= 2 for kind in kinds[kinds >= 0])
    assert all((a.rows == b).all() for a, b in zip(sampler, batches, strict=True)), "of one epoch the same again"
    for category in (np.arange(400) % 7, np.full(400, -1), np.arange(400), np.where(np.arange(400) < 30, 3, -1)):
        rows = rng.permutation(400)[:333]
        ordered = half_of_a_kind(rows, category, 20)
        assert sorted(ordered.tolist()) == sorted(rows.tolist())
    # All have one: half of a batch are pairs, the other half any.
    ordered = half_of_a_kind(rng.permutation(400), np.arange(400) % 40, 20).reshape(-1, 20)[:, :10]
    assert (ordered[:, ::2] % 40 == ordered[:, 1::2] % 40).all()
    hard = PairedBatches(400, 20, seed=3, category=category, nearest=np.arange(400)[:, None] ^ 1, hard=0.5)
    batches = [draw.rows for draw in hard]
    assert sorted(np.concatenate(batches).tolist()) == list(range(400))
    assert 8 <= sum(all(row ^ 1 in rows for row in rows.tolist()) for rows in batches) <= 12
