import numpy as np
import pytest
import torch

from recipe_lib.retrieval.metrics import cross_modal_ranks, evaluate, mean_cosine, rank_bags, rank_metrics
from tests.retrieval.test_exact_ranks import nasty


def test_metrics():
    metrics = rank_metrics(torch.tensor([1, 2, 5, 11]))
    assert metrics == {"medr": 3.5, "recall_1": 0.25, "recall_5": 0.75, "recall_10": 0.75}


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


@pytest.mark.parametrize("kind", ["random", "trained", "duplicates", "few values"])
def test_bags_at_once_score_as_bags_apart(kind):
    images, recipes = nasty(kind, 200, 12)
    sizes = [10, 77, 199, 200]
    rows = evaluate(images, recipes, candidates=sizes, bags=3, seed=5)
    assert rows == [row for size in sizes for row in evaluate(images, recipes, candidates=size, bags=3, seed=5)]
    for size in sizes:
        rng = np.random.default_rng([5, size])
        draws = [rng.permutation(200)[:size] for _ in range(3)] if size < 200 else [np.arange(200)]
        apart = [cross_modal_ranks(images[draw], recipes[draw], ties=True) for draw in draws]
        for way, row in enumerate(row for row in rows if row["candidates"] == size):
            assert row["direction"] == ("i2r", "r2i")[way]
            assert row["medr"] == np.mean([rank_metrics(bag[way])["medr"] for bag in apart])
            assert row["recall_5"] == np.mean([rank_metrics(bag[way])["recall_5"] for bag in apart])
            assert row["ties"] == np.mean([(bag[2 + way] > 0).sum() for bag in apart])


def test_ranks_of_bags_are_those_of_each_bag_apart():
    images, recipes = nasty("trained", 60, 8)
    (small, whole) = rank_bags(images, recipes, candidates=[7, 60], bags=2, seed=1).values()
    i2r, r2i = cross_modal_ranks(images, recipes)
    assert torch.equal(whole[0].i2r, i2r) and torch.equal(whole[0].r2i, r2i) and len(whole) == 1
    rng = np.random.default_rng([1, 7])
    for bag in small:
        draw = rng.permutation(60)[:7]
        apart = cross_modal_ranks(images[draw], recipes[draw], ties=True)
        assert all(torch.equal(a, b) for a, b in zip(bag, apart, strict=True))


def test_mean_cosine_equals_loops_and_tells_a_collapse():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    cosines = [float(torch.cosine_similarity(x[i], x[j], dim=0)) for i in range(7) for j in range(7) if i != j]
    assert mean_cosine(x) == pytest.approx(np.mean(cosines), abs=1e-6)
    assert mean_cosine(torch.ones(9, 3)) == pytest.approx(1) and mean_cosine(torch.ones(1, 3)) == 0
