import pytest
import torch

from recipe_lib.causal.classifier import IngredientClassifier, sine_positions


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
    handle = model.norm.register_forward_hook(lambda *args: states.append(args[2]))
    logits = model(image)
    handle.remove()
    for b in range(2):
        for k in range(5):
            expected = float((states[0][b, k] @ model.weight[k] + model.bias[k]).detach())
            assert float(logits[b, k].detach()) == pytest.approx(expected, abs=1e-5)


def test_size_of_the_paper():
    """153.1 M: three layers of width 2048 and 8192, 500 queries with their heads, nothing between map and encoder."""
    with torch.device("meta"):
        model = IngredientClassifier(2048, 500)
    attention, feedforward, norms = 4 * 2048 * 2049, 2 * 2048 * 8192 + 8192 + 2048, 4 * 2048
    assert sum(p.numel() for p in model.parameters()) == (
        3 * (attention + feedforward + norms) + 2 * 2048 + 500 * (2048 + 2049)
    )
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 153.1


def test_queries_start_apart():
    torch.manual_seed(0)
    model = IngredientClassifier(64, 20, dim=64, heads=4, feedforward=128)
    assert float(model.queries.detach().std()) == pytest.approx(1, abs=0.05)
    states = []
    model.norm.register_forward_hook(lambda *args: states.append(args[2]))
    model.eval()(torch.randn(1, 64, 7, 7))
    cosine = torch.nn.functional.cosine_similarity(states[0][0][:, None], states[0][0][None], dim=2)
    assert float(cosine.fill_diagonal_(0).max().detach()) < 0.999


def test_equals_a_naive_computation():
    """The paper's transformer by torch's own layers and loops over heads."""
    model, image = make(), torch.randn(2, 6, 3, 3)
    where = sine_positions(3, 3, 16)

    def attend(layer, query, key, value):
        q, k, v = (
            torch.nn.functional.linear(x, w, b)
            for x, w, b in zip(
                (query, key, value), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True
            )
        )
        heads = [
            torch.softmax(q[:, h] @ k[:, h].T / 8**0.5, 1) @ v[:, h] for h in (slice(0, 8), slice(8, 16))
        ]  # two heads of width 8
        return layer.out_proj(torch.cat(heads, 1))

    def layer_of(layer, x, position, memory, memory_position):
        x = layer.norm1(x + attend(layer.attention, x + position, memory + memory_position, memory))
        return layer.norm2(x + layer.feedforward[3](torch.relu(layer.feedforward[0](x))))

    for b in range(2):
        x = model.project(image)[b].flatten(1).T
        memory = layer_of(model.encoder, x, where, x, where)
        x = torch.zeros(5, 16)
        for layer in model.decoder:
            x = layer_of(layer, x, model.queries, memory, where)
        expected = (model.norm(x) * model.weight).sum(1) + model.bias
        torch.testing.assert_close(model(image)[b], expected, rtol=1e-4, atol=1e-5)
