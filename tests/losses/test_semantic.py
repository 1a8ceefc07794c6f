import pytest
import torch
import torch.nn.functional as F

from recipe_lib.losses import semantic_triplet_loss


def naive(a, b, category, margin, mining):
    total = 0.0
    for queries, answers in ((a, b), (b, a)):
        hinges = []
        for i, kind in enumerate(category):
            others = [j for j, k in enumerate(category) if j != i and k == kind]
            if kind < 0 or not others:
                continue
            positive = F.cosine_similarity(queries[i], answers[others[0]], dim=0)
            for j, k in enumerate(category):
                if k not in (-1, kind):
                    cos = F.cosine_similarity(queries[i], answers[j], dim=0)
                    hinges.append((margin + cos - positive).clamp(min=0))
        kept = [h for h in hinges if h > 0] if mining == "non_zero" else hinges
        if kept:
            total = total + torch.stack(kept).sum() / len(kept)
    return total


@pytest.mark.parametrize("mining", ["all", "non_zero"])
@pytest.mark.parametrize("margin", [0.3, 0.05])
def test_equals_a_naive_loop_with_gradients(mining, margin):
    torch.manual_seed(1)
    a, b = (torch.randn(9, 4, requires_grad=True) for _ in range(2))
    category = [2, -1, 0, 2, 1, 0, -1, 2, 5]  # 1 and 5 alone of their kind: negatives, never queries
    loss = semantic_triplet_loss(a, b, torch.tensor(category), margin, mining)
    expected = naive(a, b, category, margin, mining)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x, (a, b)) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert theirs.any() and not ours[[1, 6]].any()


@pytest.mark.parametrize("mining", ["all", "non_zero"])
@pytest.mark.parametrize("category", [[-1] * 4, [3] * 4, [0, 1, 2, 3], [-1, -1, 2, 2], [1]])
def test_without_a_triplet_it_costs_nothing(category, mining):
    a, b = (torch.randn(len(category), 3, requires_grad=True) for _ in range(2))
    loss = semantic_triplet_loss(a, b, torch.tensor(category), 0.3, mining)
    loss.backward()
    assert loss.item() == 0 and not a.grad.any() and not b.grad.any()


@pytest.mark.parametrize("mining", ["all", "non_zero"])
def test_when_all_is_solved_it_is_zero_and_not_nan(mining):
    a = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]], requires_grad=True)
    loss = semantic_triplet_loss(a, a, torch.tensor([0, 0, 1, 1]), 0.3, mining)
    loss.backward()
    assert loss.item() == 0 and a.grad.isfinite().all()


def test_other_minings_are_refused():
    with pytest.raises(ValueError, match="choose all or non_zero"):
        semantic_triplet_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([0, 0]), 0.3, "hardest")
