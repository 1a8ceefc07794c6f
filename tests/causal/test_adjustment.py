import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe_lib.causal.adjustment import (
    BackdoorAdjustment,
    corrupt_labels,
    ingredient_dictionary,
    ingredient_weights,
    marginal_weights,
    permute_rows,
    random_dictionary,
    shuffle_dictionary,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_dictionary_equals_loops():
    features, classes = torch.randn(50, 6, generator=seeded()), torch.arange(50) % 4
    batches = [(features[:7], classes[:7]), (features[7:], classes[7:])]
    dictionary = ingredient_dictionary(batches, ["a", "b", "c", "d"])
    for k in range(4):
        own = [features[i] for i in range(50) if classes[i] == k]
        torch.testing.assert_close(dictionary[k], sum(own) / len(own))


def test_unseen_ingredient_is_named():
    with pytest.raises(ValueError, match="saffron"):
        ingredient_dictionary([(torch.ones(2, 3), torch.tensor([0, 0]))], ["salt", "saffron"])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_weights_are_an_expectation_or_nothing(seed, threshold):
    probabilities = torch.rand(6, 5, generator=seeded(seed))
    weights = ingredient_weights(probabilities, threshold)
    for row, p in zip(weights, probabilities, strict=True):
        kept = [float(x) if x >= threshold else 0.0 for x in p]
        expected = [x / sum(kept) if sum(kept) else 0.0 for x in kept]
        assert row.tolist() == pytest.approx(expected, abs=1e-6)


def test_adjustment_equals_loops_and_an_empty_row_adds_nothing():
    dictionary = torch.randn(5, 3, generator=seeded())
    module = BackdoorAdjustment(dictionary, 4)
    weights = ingredient_weights(torch.tensor([[0.9, 0.1, 0.6, 0.0, 0.2], [0.1] * 5]), 0.5)
    z = module(torch.randn(2, 4), weights)
    values = [module.value(dictionary[k]) for k in range(5)]
    torch.testing.assert_close(z[0], (0.9 * values[0] + 0.6 * values[2]) / 1.5)
    assert z[1].tolist() == [0, 0, 0, 0]


def test_dictionary_is_frozen_and_gradients_reach_the_probabilities():
    module = BackdoorAdjustment(torch.randn(5, 3), 4)
    probabilities = torch.rand(2, 5).requires_grad_()
    module(torch.randn(2, 4), ingredient_weights(probabilities)).square().sum().backward()
    assert not module.dictionary.requires_grad and "dictionary" in module.state_dict()
    assert probabilities.grad.abs().sum() > 0 and module.value.weight.grad.abs().sum() > 0


def test_normalised_values_have_the_length_of_the_embedding():
    module = BackdoorAdjustment(100 * torch.randn(5, 3), 4, normalise=True)
    embedding = torch.randn(6, 4, requires_grad=True)
    z = module(embedding, torch.eye(5)[[0, 1, 2, 3, 4, 0]])
    torch.testing.assert_close(z.norm(dim=1), embedding.detach().norm(dim=1))
    z.sum().backward()
    assert embedding.grad is None, "the term takes the scale of e, it does not set it"


def test_marginal_is_the_same_for_every_image():
    weights = marginal_weights(torch.tensor([0.5, 0.25, 0.25]), 3)
    assert weights.tolist() == [[0.5, 0.25, 0.25]] * 3


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(0, 1000))
def test_permuted_rows_keep_content_and_never_place(n, seed):
    rows = torch.arange(n)[:, None]
    moved = permute_rows(rows, seeded(seed))
    assert sorted(moved.flatten().tolist()) == list(range(n))
    assert (moved != rows).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_corruption_keeps_the_number_of_labels(seed, rate):
    labels = (torch.rand(20, 30, generator=seeded(seed)) < 0.2).float()
    wrong = corrupt_labels(labels, rate, seeded(seed + 1))
    assert torch.equal(wrong.sum(1), labels.sum(1)) and set(wrong.unique().tolist()) <= {0.0, 1.0}
    if rate == 0:
        assert torch.equal(wrong, labels)
    if rate == 1:
        assert float((wrong * labels).sum()) == 0


def test_corruption_without_enough_absent_classes():
    assert corrupt_labels(torch.tensor([[1.0, 1.0, 0.0]]), 1.0, seeded()).sum() == 2
    assert corrupt_labels(torch.ones(2, 3), 1.0, seeded()).tolist() == [[1, 1, 1]] * 2


def test_corruption_swaps_at_its_rate():
    labels = (torch.rand(2000, 50, generator=seeded()) < 0.1).float()
    kept = (corrupt_labels(labels, 0.3, seeded(1)) * labels).sum() / labels.sum()
    assert float(kept) == pytest.approx(0.7, abs=0.02)


def test_dictionary_controls_lose_the_content_and_keep_the_shape():
    dictionary = torch.randn(200, 8, generator=seeded()) * torch.arange(1, 9) + 3
    shuffled, noise = shuffle_dictionary(dictionary, seeded(1)), random_dictionary(dictionary, seeded(1))
    assert torch.equal(shuffled.sort(0).values, dictionary.sort(0).values)
    assert not (shuffled == dictionary).all(1).any()
    torch.testing.assert_close(noise.mean(0), dictionary.mean(0), atol=2.0, rtol=0)
    torch.testing.assert_close(noise.std(0), dictionary.std(0), rtol=0.25, atol=0)
    correlation = np.corrcoef(noise.flatten() - noise.mean(), (dictionary - dictionary.mean(0)).flatten())[0, 1]
    assert abs(correlation) < 0.1


def linear_world(n=6000, seed=0):
    """Ing -> photo, Ing -> recipe, photo -> recipe: two of four ingredients each move both sides.

    Returns:
        photo (n, 2), recipe (n, 2), labels (n, 4), the causal matrix of photo -> recipe (2, 2), and what each
        ingredient adds to the recipe (4, 2), a recipe taking the mean of its two.
    """
    generator = seeded(seed)
    labels = torch.zeros(n, 4, dtype=torch.float64)
    popular = torch.tensor([0.5, 0.3, 0.1, 0.1]).expand(n, 4)
    labels.scatter_(1, popular.multinomial(2, generator=generator), 1)
    effect, on_photo, on_recipe = torch.randn(3, 4, 2, generator=generator).double()
    effect, on_recipe = effect[:2], on_recipe + 4 * on_photo  # what moves the photo one way moves the recipe so too
    photo = labels @ on_photo + torch.randn(n, 2, generator=generator)
    recipe = photo @ effect.T + labels / 2 @ on_recipe + 0.1 * torch.randn(n, 2, generator=generator)
    return photo, recipe, labels, effect, on_recipe


def fitted(photo, recipe, weights):
    """recipe = slope @ photo + BackdoorAdjustment(photo, weights), by least squares."""
    torch.manual_seed(0)
    module = BackdoorAdjustment(torch.randn(4, 6), 2).double()
    slope = torch.nn.Linear(2, 2, bias=False).double()
    optimizer = torch.optim.LBFGS(
        [*slope.parameters(), *module.parameters()], max_iter=300, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = (slope(photo) + module(photo, weights) - recipe).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    return slope.weight.detach(), module


def test_adjusting_removes_confounding_in_a_linear_world():
    photo, recipe, labels, effect, on_recipe = linear_world()
    prior = labels.mean(0)
    naive, _ = fitted(photo, recipe, marginal_weights(prior, len(photo)))
    adjusted, module = fitted(photo, recipe, ingredient_weights(labels))
    placebo, _ = fitted(photo, recipe, ingredient_weights(permute_rows(labels, seeded(1))))
    assert (naive - effect).abs().max() > 0.2, "the same for every photo: the backdoor stays open"
    torch.testing.assert_close(adjusted, effect, atol=0.01, rtol=0)
    torch.testing.assert_close(placebo, naive, atol=0.05, rtol=0.05)
    # do(photo): the average over the marginal P(ing) is what an experiment would measure.
    probe = torch.randn(5, 2, generator=seeded(2)).double()
    done = probe @ adjusted.T + module(probe, marginal_weights(prior, 5)).detach()
    torch.testing.assert_close(done, probe @ effect.T + (prior / 2) @ on_recipe, atol=0.03, rtol=0)
