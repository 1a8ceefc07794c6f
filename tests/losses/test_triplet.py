import pytest
import torch
import torch.nn.functional as F

from recipe_lib.losses import triplet_loss
from recipe_lib.losses.triplet import MINING


def naive(a, b, margin):
    total = 0.0
    for i in range(len(a)):
        for j in range(len(a)):
            if i != j:
                own = F.cosine_similarity(a[i], b[i], dim=0)
                total += max(0.0, float(margin + F.cosine_similarity(a[i], b[j], dim=0) - own))
                total += max(0.0, float(margin + F.cosine_similarity(a[j], b[i], dim=0) - own))
    return total / len(a) ** 2


def mined(a, b, margin, mining):
    """ "hardest" and "non_zero" by loops over the hinges of each direction, as tensors with gradients."""
    size, cos, zero = len(a), lambda i, j: F.cosine_similarity(a[i], b[j], dim=0), (a.sum() + b.sum()) * 0
    total = zero
    for own_side in (cos, lambda i, j: cos(j, i)):  # a -> b, b -> a
        ways = [
            [(margin + own_side(i, j) - own_side(i, i)).clamp(min=0) for j in range(size) if j != i]
            for i in range(size)
        ]
        if mining == "hardest":
            total = total + sum((max(hinges, default=zero) for hinges in ways), zero) / size
        else:
            positive = [hinge for hinges in ways for hinge in hinges if hinge > 0]
            total = total + sum(positive, zero) / max(len(positive), 1)
    return total


@pytest.mark.parametrize("mining", ["hardest", "non_zero"])
@pytest.mark.parametrize("margin", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_mining_equals_loops_with_gradients(size, margin, mining):
    sides = torch.randn(2, size, 5, generator=torch.Generator().manual_seed(size))
    a, b = (side.clone().requires_grad_() for side in sides)
    expected, found = mined(a, b, margin, mining), triplet_loss(a, b, margin, mining)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    if size == 1:
        assert float(found.detach()) == 0
    for ours, naively in zip(*(torch.autograd.grad(loss, (a, b)) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(ours, naively, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mining", MINING)
def test_a_solved_batch_costs_nothing_and_moves_nothing(mining):
    a = torch.eye(4).requires_grad_()
    loss = triplet_loss(a, torch.eye(4), 0.3, mining)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert torch.equal(a.grad, torch.zeros(4, 4))


def test_an_unknown_mining_names_those_there_are():
    with pytest.raises(ValueError, match="mining 'semihard': choose all, hardest, non_zero"):
        triplet_loss(torch.eye(2), torch.eye(2), mining="semihard")


@pytest.mark.parametrize("margin", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [2, 7])
def test_equals_loops(size, margin):
    a, b = torch.randn(2, size, 5, generator=torch.Generator().manual_seed(size))
    assert float(triplet_loss(a, b, margin)) == pytest.approx(naive(a, b, margin), abs=1e-5)


def test_one_pair_has_no_negative():
    a = torch.randn(1, 4, requires_grad=True)
    loss = triplet_loss(a, torch.randn(1, 4))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(a.grad).all()


def test_perfect_pairs_cost_nothing_and_collapse_costs_the_margin():
    eye = torch.eye(4)
    assert float(triplet_loss(eye, eye, 0.3)) == pytest.approx(0, abs=1e-6)
    ones = torch.ones(4, 4)
    assert float(triplet_loss(ones, ones, 0.3)) == pytest.approx(2 * 0.3 * 12 / 16, abs=1e-6)


def test_gradient_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    a.requires_grad_()

    def loss(x):  # the loss itself works in float32, too coarse for finite differences
        s = F.normalize(x, dim=1) @ F.normalize(b, dim=1).T
        d = s.diagonal()
        both = (0.3 + s - d[:, None]).clamp(min=0) + (0.3 + s - d[None]).clamp(min=0)
        return both.mean() - 2 * 0.3 / 3

    assert torch.autograd.gradcheck(loss, a)
    (expected,) = torch.autograd.grad(loss(a), a)
    (gradient,) = torch.autograd.grad(triplet_loss(a, b, 0.3), a)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_autocast_does_not_touch_the_similarities():
    eye = torch.eye(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(triplet_loss(eye, eye, 0.3)) == pytest.approx(0, abs=1e-6)
        a, b = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(7))
        assert float(triplet_loss(a, b)) == pytest.approx(naive(a, b, 0.3), abs=1e-5)
