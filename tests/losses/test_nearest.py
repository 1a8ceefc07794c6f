import math

import pytest
import torch

from recipe_lib.losses import nearest_triplet_loss, picture_triplet_loss


def sides(rows=5, width=6):
    a, b = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    return a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.3, 2.0])
def test_the_nearest_of_either_side_by_a_naive_loop(cross, margin):
    a, b = sides()
    rows = [x / x.norm() for x in (*a, *b)]
    total = 0
    for i, row in enumerate(rows):
        partner = rows[(i + 5) % 10]
        others = [x for j, x in enumerate(rows) if j % 5 != i % 5 and not (cross and j // 5 == i // 5)]
        assert len(others) == (4 if cross else 8)
        nearest = min(others, key=lambda x: float((row - x).detach().norm()))
        total = total + (margin + (row - partner).norm() - (row - nearest).norm()).clamp(min=0)
    found = nearest_triplet_loss(a, b, margin, cross)
    torch.testing.assert_close(found, total / 10)
    slopes = (torch.autograd.grad(x, (a, b)) for x in (found, total / 10))
    for mine, naive in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, naive)


@pytest.mark.parametrize("margin", [0.0, 0.1, 1.0])
def test_pictures_by_a_naive_loop(margin):
    a, b = sides(4, 12)
    distance = [[(p - q).square().mean().sqrt() for q in b] for p in a]
    total = 0
    for way in (lambda i, j: distance[i][j], lambda i, j: distance[j][i]):
        hinges = [margin + way(i, i) - way(i, j) for i in range(4) for j in range(4) if i != j]
        hinges = [h for h in hinges if h > 0]
        total = total + (sum(hinges) / len(hinges) if hinges else 0.0)
    found = picture_triplet_loss(a, b, margin)
    torch.testing.assert_close(found, torch.as_tensor(total, dtype=torch.float64))
    slopes = (torch.autograd.grad(x, (a, b), retain_graph=True) for x in (found, total))
    for mine, naive in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, naive)


@pytest.mark.parametrize("loss", [nearest_triplet_loss, picture_triplet_loss])
def test_degenerate_batches(loss):
    """One pair has no negative; rows that are all alike, and rows of nothing, are finite with their gradients."""
    one = sides(1)
    assert loss(*one).item() == 0
    loss(*one).backward()
    assert one[0].grad.abs().max() == 0
    for value in (0.0, 1.0):
        a = torch.full((3, 4), value, requires_grad=True)
        found = loss(a, torch.full((3, 4), value))
        found.backward()
        assert torch.isfinite(found) and torch.isfinite(a.grad).all()
    assert math.isclose(float(nearest_triplet_loss(torch.ones(3, 4), torch.ones(3, 4), 0.3)), 0.3, rel_tol=1e-3)
