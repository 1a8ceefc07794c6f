import math

import pytest
import torch

from recipe_lib.losses import asymmetric_loss, posterior


def naive(logits, labels, gamma_neg, gamma_pos):
    samples = []
    for row, truth in zip(logits.tolist(), labels.tolist(), strict=True):
        total = 0.0
        for logit, y in zip(row, truth, strict=True):
            p = 1 / (1 + math.exp(-logit))
            total += (1 - p) ** gamma_pos * -math.log(p) if y else p**gamma_neg * -math.log(1 - p)
        samples.append(total * 1000 / len(row))
    return sum(samples) / len(samples)


@pytest.mark.parametrize(("gamma_neg", "gamma_pos"), [(2.0, 0.0), (0.0, 0.0), (4.0, 1.0)])
def test_equals_loops(gamma_neg, gamma_pos):
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(5, 8, generator=generator)
    labels = (torch.rand(5, 8, generator=generator) < 0.3).float()
    loss = asymmetric_loss(logits, labels, gamma_neg, gamma_pos)
    assert float(loss) == pytest.approx(naive(logits, labels, gamma_neg, gamma_pos), rel=1e-5)


def test_focal_weight_is_detached():
    logits = torch.tensor([[0.7, -0.4]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.0]])
    asymmetric_loss(logits, labels).backward()
    p = torch.sigmoid(logits.detach())
    expected = torch.tensor([[float(p[0, 0]) - 1, float(p[0, 1]) ** 3]]) * 1000 / 2
    torch.testing.assert_close(logits.grad, expected)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[500.0, -500.0]], requires_grad=True)
    loss = asymmetric_loss(logits, torch.tensor([[0.0, 1.0]]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    assert posterior(logits.detach()).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(("gamma_neg", "gamma_pos"), [(2.0, 0.0), (0.0, 0.0), (1.0, 1.0), (4.0, 0.5)])
@pytest.mark.parametrize("truth", [0.05, 0.2, 0.6])
def test_posterior_recovers_the_rate_that_was_trained_on(gamma_neg, gamma_pos, truth):
    """A constant logit trained to its optimum on labels of a known rate: its posterior is the rate."""
    labels = torch.zeros(1000, 1)
    labels[: round(1000 * truth)] = 1
    logit = torch.zeros(1, 1, requires_grad=True)
    # With detached weights the stationary point is no minimum of the value: follow the gradient, not a line search.
    for _ in range(600):
        logit.grad = None
        (asymmetric_loss(logit.expand(1000, 1), labels, gamma_neg, gamma_pos) / 1000).backward()
        with torch.no_grad():
            logit -= 4 * logit.grad
    assert float(posterior(logit.detach(), gamma_neg, gamma_pos)) == pytest.approx(truth, abs=0.005)


def test_half_stands_for_a_fifth():
    assert float(posterior(torch.zeros(1), 2.0, 0.0)) == pytest.approx(0.2)
