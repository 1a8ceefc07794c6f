import math

import pytest
import torch
import torch.nn.functional as F

from recipe_lib.losses import circle_loss


def pairs(size, dtype=torch.float32):
    return torch.randn(2, size, 5, generator=torch.Generator().manual_seed(size), dtype=dtype)


def cosine(a, b):
    return [[F.cosine_similarity(x, y, dim=0) for y in b] for x in a]


def pull(c, margin, gamma):
    return torch.exp(gamma * max(0.0, 1 + margin - c.item()) * (1 - margin - c))


def push(c, margin, gamma):
    return torch.exp(gamma * max(0.0, c.item() + margin) * (c - margin))


def query(a, b, margin, gamma):
    total = 0.0
    for s in (cosine(a, b), cosine(b, a)):
        for i in range(len(s)):
            negatives = sum(push(s[i][j], margin, gamma) for j in range(len(s)) if j != i)
            total = total + torch.log(1 + negatives * pull(s[i][i], margin, gamma)) / len(s)
    return total


def pooled(a, b, margin, gamma, is_negative):
    total = 0.0
    for s in (cosine(a, b), cosine(b, a)):
        rows = range(len(s))
        negatives = sum(push(s[i][j], margin, gamma) for i in rows for j in rows if is_negative(i, j))
        total = total + torch.log(1 + negatives * sum(pull(s[i][i], margin, gamma) for i in rows))
    return total


LOOPS = {
    "batch": lambda *args: pooled(*args, lambda i, j: i != j),
    "query": query,
    "triangle": lambda *args: pooled(*args, lambda i, j: i < j),
}
every = pytest.mark.parametrize("over", LOOPS)


@every
@pytest.mark.parametrize("gamma", [1.0, 32.0])
@pytest.mark.parametrize("margin", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("size", [2, 7])
def test_equals_loops(size, margin, gamma, over):
    a, b = pairs(size, dtype=torch.float64)  # float32's exp would overflow in the loops
    loss = circle_loss(a, b, margin=margin, gamma=gamma, over=over)
    assert float(loss) == pytest.approx(float(LOOPS[over](a, b, margin, gamma)), rel=1e-4)


def test_the_pairs_of_the_batch_are_the_default():
    a, b = pairs(6)
    losses = {over: float(circle_loss(a, b, over=over)) for over in LOOPS}
    assert float(circle_loss(a, b)) == losses["batch"] and len(set(losses.values())) == 3
    with pytest.raises(ValueError, match="batch, query or triangle"):
        circle_loss(a, b, over="pairs")


@every
def test_sides_swap_and_rows_come_in_any_order(over):
    a, b = pairs(6)
    torch.testing.assert_close(circle_loss(a, b, over=over), circle_loss(b, a, over=over))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    # The halves of the released code hold other pairs in another order.
    shuffled, before = circle_loss(a[order], b[order], gamma=1.0, over=over), circle_loss(a, b, gamma=1.0, over=over)
    same = torch.isclose(shuffled, before)
    assert same == (over != "triangle")


@every
def test_gradient_is_that_of_the_loops(over):
    a, b = pairs(4, dtype=torch.float64)
    a.requires_grad_(), b.requires_grad_()
    expected = torch.autograd.grad(LOOPS[over](a, b, 0.25, 8.0), (a, b))
    gradients = torch.autograd.grad(circle_loss(a, b, gamma=8.0, over=over), (a, b))
    for f, e in zip(gradients, expected, strict=True):
        assert e.abs().max() > 0.1
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_gradient_by_finite_differences_with_the_weights_held():
    a, b = pairs(3, dtype=torch.float64)
    s0 = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    pull0, push0 = (1.25 - s0.diagonal()).clamp(min=0), (s0 + 0.25).clamp(min=0)

    def held(x):  # the loss with its weights taken from the point where the gradient is asked
        s = F.normalize(x, dim=1) @ F.normalize(b, dim=1).T
        n = (8 * push0 * (s - 0.25)).masked_fill(torch.eye(3, dtype=torch.bool), -torch.inf)
        p = 8 * pull0 * (0.75 - s.diagonal())
        return 2 * F.softplus(n.logsumexp((0, 1)) + p.logsumexp(0))

    a.requires_grad_()
    assert torch.autograd.gradcheck(held, a)
    (expected,) = torch.autograd.grad(held(a), a)
    (gradient,) = torch.autograd.grad(circle_loss(a, b, gamma=8.0), a)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@every
def test_one_pair_has_no_negative(over):
    a, b = pairs(1)
    a.requires_grad_()
    loss = circle_loss(a, b, over=over)
    loss.backward()
    assert loss.item() == 0 and (a.grad == 0).all()


@every
@pytest.mark.parametrize("gamma", [32.0, 256.0])
@pytest.mark.parametrize("case", ["random", "collapsed", "opposite", "zero", "perfect"])
def test_finite_in_float32_whatever_gamma(case, gamma, over):
    a, b = {
        "random": pairs(64),
        "collapsed": torch.ones(2, 64, 5),
        "opposite": torch.stack([torch.eye(64), -torch.eye(64)]),
        "zero": torch.zeros(2, 64, 5),
        "perfect": torch.eye(64).expand(2, 64, 64),
    }[case]
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    loss = circle_loss(a, b, gamma=gamma, over=over)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(a.grad).all() and torch.isfinite(b.grad).all()


def test_known_values():
    # Own at 1, others at 0: exp(-gamma m^2) each, positives and negatives alike.
    eye, small = torch.eye(4), math.exp(-32 * 0.25**2)
    costs = {"batch": 12 * small * 4 * small, "query": 3 * small * small, "triangle": 6 * small * 4 * small}
    # All at 1: log(1 + 3 exp(gamma (1 - m^2) - gamma m^2)), far above the range of float32's exp at gamma = 256.
    ones, counts = torch.ones(4, 4), {"batch": 12 * 4, "query": 3, "triangle": 6 * 4}
    for over in LOOPS:
        assert float(circle_loss(eye, eye, over=over)) == pytest.approx(2 * math.log(1 + costs[over]), rel=1e-5)
        collapsed = 2 * (math.log(counts[over]) + 256 * 0.875)
        assert float(circle_loss(ones, ones, gamma=256, over=over)) == pytest.approx(collapsed, rel=1e-5)


@every
def test_descends_to_matched_pairs(over):
    a, b = pairs(6)
    a.requires_grad_()
    optimizer = torch.optim.Adam([a], 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        circle_loss(a, b, over=over).backward()
        optimizer.step()
    similarity = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    assert similarity.argmax(1).tolist() == list(range(6))


def test_autocast_does_not_touch_the_similarities():
    a, b = pairs(7)
    expected = circle_loss(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(circle_loss(a, b), expected)
    assert circle_loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32
