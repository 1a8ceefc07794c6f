import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe_lib.retrieval import cross_modal_ranks, evaluate, paired_bootstrap, rank_metrics


def reference(images, recipes):
    """Sort-free float64 loops: 1 + the number of other candidates at least as similar."""
    a = images.double() / images.double().norm(dim=1, keepdim=True)
    b = recipes.double() / recipes.double().norm(dim=1, keepdim=True)
    s = np.array([[float((x * y).sum()) for y in b] for x in a])
    n = len(s)
    i2r = [1 + sum(s[i, j] >= s[i, i] for j in range(n) if j != i) for i in range(n)]
    r2i = [1 + sum(s[j, i] >= s[i, i] for j in range(n) if j != i) for i in range(n)]
    return i2r, r2i


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 6), st.integers(1, 13), st.booleans())
def test_ranks_equal_loops(seed, n, d, block, copies):
    generator = torch.Generator().manual_seed(seed)
    images, recipes = torch.randn(2, n, d, generator=generator)
    if copies:  # exact duplicates: real ties
        recipes[n // 2 :] = recipes[: n - n // 2].clone()
        images[n // 2 :] = images[: n - n // 2].clone()
    i2r, r2i = cross_modal_ranks(images, recipes, block=block)
    assert (i2r.tolist(), r2i.tolist()) == reference(images, recipes)


def test_directions_are_not_swapped():
    images = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    recipes = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    i2r, r2i = cross_modal_ranks(images, recipes)
    assert i2r.tolist() == [1, 2, 1], "photo 1 finds recipe 0 first"
    assert r2i.tolist() == [1, 1, 1]
    assert torch.equal(cross_modal_ranks(recipes, images)[0], r2i)


def test_collapsed_model_ranks_last():
    ones = torch.ones(50, 8)
    i2r, r2i, ties, _ = cross_modal_ranks(ones, ones, ties=True)
    assert i2r.tolist() == r2i.tolist() == [50] * 50 and ties.tolist() == [49] * 50
    assert rank_metrics(i2r)["recall_10"] == 0


def test_float32_near_ties_are_decided_exactly():
    """Similarities closer than float32 can tell apart: the float64 order counts."""
    base = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    recipes = base.repeat(40, 1) + 1e-6 * torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    i2r, r2i = cross_modal_ranks(recipes, recipes + 1e-6, block=7)
    assert (i2r.tolist(), r2i.tolist()) == reference(recipes, recipes + 1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_broken_embedding_is_refused(bad):
    images = torch.ones(3, 2)
    images[1] = bad
    with pytest.raises(ValueError, match="image embedding 1"):
        cross_modal_ranks(images, torch.ones(3, 2))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="must both be"):
        cross_modal_ranks(torch.ones(3, 2), torch.ones(4, 2))


def test_metrics():
    found = rank_metrics(torch.tensor([1, 2, 5, 11]))
    assert found == {"medr": 3.5, "recall_1": 0.25, "recall_5": 0.75, "recall_10": 0.75}


def test_whole_set_is_one_bag_and_small_bags_are_easier():
    generator = torch.Generator().manual_seed(0)
    recipes = torch.randn(300, 16, generator=generator)
    images = recipes + 1.5 * torch.randn(300, 16, generator=generator)
    whole = evaluate(images, recipes, candidates=300)
    i2r, r2i = cross_modal_ranks(images, recipes)
    assert [row["recall_1"] for row in whole] == [rank_metrics(i2r)["recall_1"], rank_metrics(r2i)["recall_1"]]
    small = evaluate(images, recipes, candidates=30, bags=20, seed=1)
    assert small[0]["recall_1"] > whole[0]["recall_1"] and small == evaluate(
        images, recipes, candidates=30, bags=20, seed=1
    )
    with pytest.raises(ValueError, match="301 candidates"):
        evaluate(images, recipes, candidates=301)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(120):
        a, b = rng.random(200) < 0.55, rng.random(200) < 0.45
        _, low, high = paired_bootstrap(a, b, draws=400, seed=trial)
        inside += low <= 0.10 <= high
    assert 0.88 <= inside / 120 <= 1.0


def test_bootstrap_is_paired_seeded_and_widens_with_seeds_that_disagree():
    rng = np.random.default_rng(0)
    hard = rng.random(500) < 0.5
    better = hard | (rng.random(500) < 0.05)
    difference, low, high = paired_bootstrap(better, hard)
    assert 0 < low < difference < high and high - low < 0.05, "what both share cancels"
    assert paired_bootstrap(better, hard) == (difference, low, high)
    far = hard | (rng.random(500) < 0.15)  # about the same mean gain, owed to one seed of three
    same = paired_bootstrap(np.tile(better, (3, 1)), np.tile(hard, (3, 1)))
    apart = paired_bootstrap(np.stack([far, hard, hard]), np.tile(hard, (3, 1)))
    assert apart[2] - apart[1] > 2 * (same[2] - same[1])
