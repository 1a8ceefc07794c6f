import pytest
import torch
import torch.nn.functional as F

from recipe_lib.losses import cosine_loss, mismatches


def naive(a, b, partner, margin):
    terms = []
    for i, j in enumerate(partner.tolist()):
        cos = F.cosine_similarity(a[j], b[i], dim=0)
        terms.append(1 - cos if i == j else (cos - margin).clamp(min=0))
    return torch.stack(terms).mean()


def sides(n=7, d=5):
    torch.manual_seed(n)
    return (torch.randn(n, d, requires_grad=True) for _ in range(2))


def test_drawn_pairs_equal_a_naive_loop_with_gradients():
    a, b = sides()
    partner = torch.tensor([0, 3, 2, 1, 0, 5, 4])
    loss, expected = cosine_loss(a, b, partner, 0.1), naive(a, b, partner, 0.1)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x, (a, b)) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert theirs.any()
    theirs = F.cosine_embedding_loss(a[partner], b, 2 * (partner == torch.arange(7)).float() - 1, margin=0.1)
    torch.testing.assert_close(loss, theirs)


def test_one_pair_and_equal_vectors_are_finite():
    a, b = sides(1)
    loss = cosine_loss(a, b, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, a)
    assert loss.isfinite() and gradient.isfinite().all()
    alike = torch.ones(4, 3, requires_grad=True)
    loss = cosine_loss(alike, alike, torch.tensor([1, 1, 2, 0]), margin=0.1)
    loss.backward()
    assert alike.grad.isfinite().all() and loss.item() == pytest.approx(0.9 * 2 / 4)


def test_mismatches_are_any_other_pair_by_their_share_and_follow_from_the_seed():
    draw = [mismatches(5, 0.8, torch.Generator().manual_seed(s)) for s in range(4000)]
    assert torch.equal(draw[3], mismatches(5, 0.8, torch.Generator().manual_seed(3)))
    partners = torch.stack(draw)
    counts = torch.stack([torch.bincount(column, minlength=5) for column in partners.T]) / 4000
    torch.testing.assert_close(counts, torch.eye(5) * 0.2 + (1 - torch.eye(5)) * 0.2, rtol=0, atol=0.03)
    assert torch.equal(mismatches(6, 0.0, torch.Generator()), torch.arange(6))
    assert (mismatches(6, 1.0, torch.Generator()) != torch.arange(6)).all()
    assert mismatches(1, 1.0, torch.Generator()).tolist() == [0]
