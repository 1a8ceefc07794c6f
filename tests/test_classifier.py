import pytest
import torch

from recipe_lib.classifier import IngredientClassifier, sine_positions


def make(**kw):
    torch.manual_seed(0)
    return IngredientClassifier(6, 5, dim=16, heads=2, feedforward=32, **{"dropout": 0.0} | kw).eval()


def test_shape_for_any_map_and_gradients_everywhere():
    model = make()
    for height, width in ((1, 1), (3, 5)):
        assert model(torch.randn(2, 6, height, width)).shape == (2, 5)
    model.train()(torch.randn(2, 6, 3, 3)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_queries_do_not_see_each_other():
    """Without decoder self-attention an ingredient's logit does not depend on which others are asked for."""
    model, image = make(), torch.randn(1, 6, 4, 4)
    before = model(image)
    with torch.no_grad():
        model.queries[3:] = 9.0
    torch.testing.assert_close(model(image)[:, :3], before[:, :3])


def test_positions_matter_and_are_distinct():
    positions = sine_positions(3, 4, 16)
    assert positions.shape == (12, 16) and torch.cdist(positions, positions).add(torch.eye(12)).min() > 0.05
    model, image = make(), torch.randn(1, 6, 4, 4)
    assert not torch.allclose(model(image), model(image.flip(2)))
    with pytest.raises(ValueError, match="classifier_dim"):
        sine_positions(2, 2, 6)


def test_group_wise_head_equals_loops():
    model, image = make(), torch.randn(2, 6, 2, 2)
    states = []
    handle = model.decoder[-1].register_forward_hook(lambda *args: states.append(args[2]))
    logits = model(image)
    handle.remove()
    for b in range(2):
        for k in range(5):
            expected = float((states[0][b, k] @ model.weight[k] + model.bias[k]).detach())
            assert float(logits[b, k].detach()) == pytest.approx(expected, abs=1e-5)
