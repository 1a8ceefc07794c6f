import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe_lib.retrieval import exact_ranks
from recipe_lib.retrieval.metrics import cross_modal_ranks, rank_metrics


def cosines(images, recipes):
    """float64, (N, N), a pair at a time."""
    a = images.double() / images.double().norm(dim=1, keepdim=True)
    b = recipes.double() / recipes.double().norm(dim=1, keepdim=True)
    return np.stack([(x * b).sum(1).numpy() for x in a])


def counted(s):
    """Sort-free loops over similarities (N, N): 1 + the number of other candidates at least as similar."""
    n = len(s)
    i2r = [1 + sum(s[i, j] >= s[i, i] for j in range(n) if j != i) for i in range(n)]
    r2i = [1 + sum(s[j, i] >= s[i, i] for j in range(n) if j != i) for i in range(n)]
    return i2r, r2i


def reference(images, recipes):
    return counted(cosines(images, recipes))


def ranks(*given, **options):
    return tuple(x.tolist() for x in cross_modal_ranks(*given, **options))


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


def nasty(kind, n, d, seed=0):
    """Embeddings (n, d) on which a rounding error changes ranks."""
    generator = torch.Generator().manual_seed(seed)
    images, recipes = torch.randn(2, n, d, generator=generator)
    if kind == "trained":
        recipes = images + 1.5 * recipes
    if kind == "some trained":  # tiles of one matrix need different levels
        recipes[: n // 2] = images[: n // 2] + 0.5 * recipes[: n // 2]
    if kind == "duplicates":
        recipes = images + recipes
        images[n // 3 :], recipes[n // 3 :] = images[: n - n // 3].clone(), recipes[: n - n // 3].clone()
    if kind == "collapsed":
        images, recipes = torch.ones(2, n, d)
    if kind == "nearly collapsed":
        images, recipes = 1 + 1e-4 * images, 1 + 1e-4 * recipes
    if kind == "near duplicates":  # in float32 no two differ
        images, recipes = images[:1] + 1e-6 * images, images[:1] + 1e-6 * recipes
    if kind == "few values":
        images, recipes = images.sign() + (images > 1), recipes.sign() + (recipes > 1)
    if kind == "spikes":  # one coordinate holds nearly everything, others are subnormal in float32
        images, recipes = images * 1e-39, recipes * 1e-39
        images[:, 0] = recipes[:, 0] = 1
        images[::2, -1] = 1e-4
    if kind == "tiny and huge":
        images, recipes = images * 1e-6, recipes * 1e18
    return images, recipes


KINDS = (
    *("random", "trained", "some trained", "duplicates", "collapsed", "nearly collapsed", "near duplicates"),
    *("few values", "spikes", "tiny and huge"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d", "block"), [(130, 64, 16), (97, 3, 24), (60, 1, 5), (150, 700, None)])
@pytest.mark.parametrize("fast", [True, False])
def test_nasty_embeddings_have_the_ranks_of_float64(monkeypatch, kind, n, d, block, fast):
    # The screening holds on every processor.
    monkeypatch.setattr(exact_ranks.devices, "fast_bfloat16", lambda device: fast)
    images, recipes = nasty(kind, n, d)
    s = cosines(images, recipes)
    assert ranks(images, recipes, block=block, ties=True) == (
        *counted(s),
        [sum(s[i, j] == s[i, i] for j in range(n) if j != i) for i in range(n)],
        [sum(s[j, i] == s[i, i] for j in range(n) if j != i) for i in range(n)],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("embeddings", [1, 2, 3])
def test_scores_stay_within_their_bounds(monkeypatch, kind, embeddings):
    """Each tile and dot product against float64; an error near the bound would be luck, one above it a lie."""
    monkeypatch.setattr(exact_ranks.devices, "fast_bfloat16", lambda device: True)
    drawn = [nasty(kind, 120, d, seed) for seed, d in enumerate((512, 33, 100)[:embeddings])]
    pairs = exact_ranks.Pairs(*zip(*drawn, strict=True))
    i, j = (x.flatten() for x in torch.meshgrid(torch.arange(120), torch.arange(120), indexing="ij"))
    exact = pairs.dots(i, j)
    true = [exact.view(120, 120).diagonal()[q] for q in (i, j)]
    for level in (0, 1, 2, "pairwise"):
        score = (
            pairs.dots(i, j, exact=False) if level == "pairwise" else pairs.tile(level, *[slice(0, 120)] * 2).flatten()
        )
        near = pairs.near(1, pairwise=True) if level == "pairwise" else pairs.near(level)
        for q, aim in zip((i, j), true, strict=True):
            assert (exact >= aim)[score > aim + near[q]].all() and (exact < aim)[score < aim - near[q]].all()
        if embeddings > 1 or level:
            assert ((score - exact).abs() <= near.max()).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 30), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 9)
)
def test_products_of_distances_equal_loops(seed, n, widths, block):
    drawn = [nasty(KINDS[(seed + k) % len(KINDS)], n, d, seed + k) for k, d in enumerate(widths)]
    images, recipes = zip(*drawn, strict=True)
    s = functools.reduce(np.multiply, [1 - cosines(*pair) for pair in drawn])
    expected = counted(-s) if len(drawn) > 1 else reference(*drawn[0])
    assert ranks(images, list(recipes), block=block) == expected


def test_augmented_distances_of_dar():
    """DAR++ shares embeddings between its distances: d_ir * d_id * d_sr."""
    image, recipe, description, segments = torch.randn(4, 90, 16, generator=torch.Generator().manual_seed(0))
    d = [1 - cosines(*pair) for pair in ((image, recipe), (image, description), (segments, recipe))]
    of_products = ranks((image, image, segments), (recipe, description, recipe), block=20)
    assert of_products == counted(-(d[0] * d[1] * d[2]))
    assert ranks((image, image), (recipe, description)) == counted(-(d[0] * d[1]))
    assert ranks((image,), (recipe,)) == ranks(image, recipe) == reference(image, recipe)


def test_collapsed_tile_computes_each_distinct_pair_once(monkeypatch):
    images, recipes = (torch.randn(3, 8, generator=torch.Generator().manual_seed(k)).repeat(100, 1) for k in (0, 1))
    computed, dots = [], exact_ranks.Pairs.dots
    monkeypatch.setattr(exact_ranks.Pairs, "dots", lambda *a, **k: (computed.append(len(a[1])), dots(*a, **k))[1])
    s = cosines(images[:3], recipes[:3])
    expected = [int(100 * (s[i % 3] >= s[i % 3, i % 3]).sum()) for i in range(300)]
    assert ranks(images, recipes)[0] == expected, "the 99 copies of the true recipe tie with it"
    assert sum(computed) < 2000, "of 90,000 pairs, 9 are distinct"


def test_precision_that_the_program_chose_changes_nothing_and_comes_back():
    images, recipes = nasty("nearly collapsed", 150, 256)
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16 inside float32 products on some CPUs, TF32 on GPUs
        assert ranks(images, recipes) == reference(images, recipes)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_embeddings_may_require_gradients_and_stay_as_they_are():
    images, recipes = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    before = images.clone(), recipes.clone()
    assert ranks(images.requires_grad_(), recipes) == reference(before[0], before[1])
    assert torch.equal(images, before[0]) and torch.equal(recipes, before[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_ranks_are_the_same(kind):
    images, recipes = nasty(kind, 3000, 256)
    if kind != "few values":  # its ties depend on the order of float64 sums
        assert ranks(images, recipes, device="cuda", ties=True) == ranks(images, recipes, ties=True)


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
    with pytest.raises(ValueError, match="must both be"):
        cross_modal_ranks([torch.ones(3, 2)] * 2, [torch.ones(3, 2)])
    with pytest.raises(ValueError, match="must both be"):
        cross_modal_ranks([torch.ones(3, 2), torch.ones(4, 2)], [torch.ones(3, 2), torch.ones(4, 2)])
    with pytest.raises(ValueError, match="recipe embedding 2"):
        cross_modal_ranks([torch.ones(3, 2)] * 2, [torch.ones(3, 2), torch.tensor([[1.0, 0], [1, 0], [0, 0]])])
