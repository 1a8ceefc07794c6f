import torch

from recipe_lib.losses import category_loss


def test_equals_a_naive_loop_over_labelled_rows_with_gradients():
    torch.manual_seed(0)
    logits, category = torch.randn(6, 4, requires_grad=True), torch.tensor([2, -1, 0, 3, -1, 2])
    terms = [-(x - x.exp().sum().log())[k] for x, k in zip(logits, category.tolist(), strict=True) if k >= 0]
    loss, expected = category_loss(logits, category), torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert not ours[[1, 4]].any() and ours[0].any()


def test_nothing_labelled_costs_nothing():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = category_loss(logits, torch.full((3,), -1))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()
