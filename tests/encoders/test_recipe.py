from functools import partial

import numpy as np
import pytest
import torch

from recipe_lib.data.loading import RecipeBatch
from recipe_lib.encoders.packed import MaskedTransformer, Packing, _dropout
from recipe_lib.encoders.recipe import RecipeEncoder


def make(**kw):
    torch.manual_seed(0)
    return RecipeEncoder(30, 8, **{"dim": 16, "heads": 2, "feedforward": 32, "max_len": 20} | kw).eval()


def batch(recipes):
    """Recipes as lists of (title, ingredient lines, steps), each sentence a list of ids, without any sharing."""
    sentences, title, lines, steps = [], [], [], []

    def add(sentence):
        sentences.append(sentence)
        return len(sentences) - 1

    for t, i, s in recipes:
        title.append(add(t))
        lines.append([add(x) for x in i])
        steps.append([add(x) for x in s])

    def pad(rows, fill):
        width = max(map(len, rows))
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

    return RecipeBatch(pad(sentences, 0), torch.tensor(title), pad(lines, -1), pad(steps, -1))


def random_recipes(n, seed=0):
    rng = np.random.default_rng(seed)

    def sentence():
        return rng.integers(2, 30, rng.integers(1, 13)).tolist()

    return [
        (sentence(), [sentence() for _ in range(rng.integers(1, 7))], [sentence() for _ in range(rng.integers(1, 5))])
        for _ in range(n)
    ]


def padded(model, recipes):
    """The straightforward way: nn.TransformerEncoder with a padding mask over the whole grid (B, S, L)."""

    def encode(block, x, mask):
        x = block.encoder(x + block.position[: x.shape[1]], src_key_padding_mask=~mask)
        return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    parts = []
    for name in ("title", "ingredients", "instructions"):
        rows = getattr(recipes, name)
        there = rows >= 0
        tokens = (recipes.tokens[rows.clamp(min=0)] * there.unsqueeze(-1)).flatten(0, -2)  # (B S, L)
        mask = tokens != 0
        mask[:, 0] = True  # attention over nothing is NaN
        x = encode(model.words[name], model.word(tokens), mask)
        parts.append(encode(model.sentences[name], x.view(*rows.shape, -1), there) if rows.ndim > 1 else x)
    return torch.tanh(model.fc(torch.cat(parts, 1)))


@pytest.fixture(params=["blocks", "one grid"])
def packing(request, monkeypatch):
    """Both ways to pack: rows of one length (CPU), all rows in one grid (GPU)."""
    monkeypatch.setattr(Packing, "of", staticmethod(partial(Packing.of, one_grid=request.param == "one grid")))


def inputs(model, name):
    """The tensors that go through a component's first linear layer, as they come."""
    seen = []
    model.words[name].encoder.layers[0].linear1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    return seen


@pytest.mark.usefixtures("packing")
def test_equals_the_padded_computation():
    model, recipes = make(), batch(random_recipes(9))
    torch.testing.assert_close(model(recipes).embedding, padded(model, recipes), rtol=1e-5, atol=1e-5)
    one_by_one = torch.cat([model(batch([recipe])).embedding for recipe in random_recipes(9)])
    torch.testing.assert_close(model(recipes).embedding, one_by_one, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("packing")
def test_gradients_equal_those_of_the_padded_computation():
    model, recipes = make(dropout=0.0).train(), batch(random_recipes(9))
    weights, upstream = list(model.parameters()), torch.randn(9, 8)
    gradients = torch.autograd.grad(model(recipes).embedding, weights, upstream)
    expected = torch.autograd.grad(padded(model, recipes), weights, upstream)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert theirs.any()


def test_only_distinct_real_tokens_are_computed():
    model, recipes = make(), random_recipes(6)
    recipes[1] = (recipes[1][0], recipes[0][1], recipes[0][2])  # a recipe with the sentences of another
    shared = batch(recipes)
    tokens, which = shared.tokens.unique(dim=0, return_inverse=True)
    rows = [torch.where(x < 0, -1, which[x]) for x in (shared.title, shared.ingredients, shared.instructions)]
    seen = inputs(model, "ingredients")
    model(RecipeBatch(tokens, *rows))
    lines = {tuple(line) for _, own, _ in recipes for line in own}
    assert [x.shape for x in seen] == [(sum(map(len, lines)), 16)]
    assert len(lines) < sum(len(own) for _, own, _ in recipes), "nothing to share: the test shows nothing"


def test_bfloat16_on_a_cpu_rounds_its_rows_up_and_stays_near():
    model, recipes = make(dropout=0.0).train(), batch(random_recipes(9))
    exact = model(recipes)
    seen = inputs(model, "instructions")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(recipes)
    assert len(seen[0]) % 64 == 0
    for ours, theirs in zip(rounded.components, exact.components, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)
    weights, upstream = list(model.parameters()), torch.randn(9, 8)
    ours, theirs = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x.embedding.float(), weights, upstream)])
        for x in (rounded, exact)
    )
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99


def test_dropout_drops_its_share_and_keeps_the_mean():
    drop, x = torch.nn.Dropout(0.1), torch.full((1000, 301), 2.0, requires_grad=True)
    torch.manual_seed(0)
    out = _dropout(x, drop)
    assert float((out == 0).float().mean()) == pytest.approx(0.1, abs=0.003)
    assert out[out > 0].unique().tolist() == pytest.approx([2 / 0.9], rel=1e-3)
    assert float((out == 0).float().mean(0).std()) == pytest.approx((0.1 * 0.9 / 1000) ** 0.5, rel=0.2), "independent"
    out.sum().backward()
    torch.testing.assert_close(x.grad * 2, out.detach())
    torch.manual_seed(0)
    assert torch.equal(_dropout(x, drop), out) and not torch.equal(_dropout(x, drop), out)
    assert _dropout(x, drop.eval()) is x


def test_words_and_positions_start_as_released():
    torch.manual_seed(0)
    model = RecipeEncoder(4000, 8, dim=512, layers=1)
    assert float(model.word.weight[1:].detach().std()) == pytest.approx(1, abs=0.01)
    for block in (*model.words.values(), *model.sentences.values()):
        assert float(block.position.detach().std()) == pytest.approx((2 / (50 + 512)) ** 0.5, abs=0.002)


def test_dropout_falls_on_words_and_positions_too():
    model, recipes = make(dropout=0.5).train(), batch(random_recipes(9))
    seen = []
    for block in (model.words["title"], model.sentences["ingredients"]):
        layer = block.encoder.layers[0]
        layer.norm1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        with torch.no_grad():  # nothing but the input is left in what the first norm gets
            layer.self_attn.out_proj.weight.zero_()
            layer.self_attn.out_proj.bias.zero_()
    model(recipes)
    assert len(seen) == 2
    for x in seen:
        assert float((x == 0).float().mean().detach()) == pytest.approx(0.5, abs=0.06)


def test_training_drops_out_and_evaluation_does_not():
    model, recipes = make(dropout=0.5), batch(random_recipes(3))
    assert torch.equal(model(recipes).embedding, model(recipes).embedding)
    model.train()
    assert not torch.allclose(model(recipes).embedding, model(recipes).embedding, atol=1e-3)


def test_padding_and_shared_sentences_change_nothing():
    model, recipes = make(), random_recipes(4)
    plain = batch(recipes)
    tokens = torch.cat([plain.tokens, torch.zeros(len(plain.tokens), 5, dtype=torch.long)], 1)
    lines = torch.cat([plain.ingredients, torch.full((4, 3), -1)], 1)
    unique, which = np.unique(tokens.numpy(), axis=0, return_inverse=True)
    which = torch.from_numpy(which)
    shared = RecipeBatch(
        torch.from_numpy(unique),
        which[plain.title],
        torch.where(lines < 0, -1, which[lines]),
        torch.where(plain.instructions < 0, -1, which[plain.instructions]),
    )
    torch.testing.assert_close(model(shared).embedding, model(plain).embedding, rtol=1e-5, atol=1e-5)


def test_order_of_sentences_and_words_matters():
    model = make()
    recipe = ([2, 3], [[4, 5], [6, 7]], [[8]])
    swapped_lines, swapped_words = ([2, 3], [[6, 7], [4, 5]], [[8]]), ([3, 2], [[4, 5], [6, 7]], [[8]])
    as_it_is, lines_moved, words_moved = model(batch([recipe, swapped_lines, swapped_words])).embedding
    assert not torch.allclose(as_it_is, lines_moved, atol=1e-4)
    assert not torch.allclose(as_it_is, words_moved, atol=1e-4)


def test_a_grid_of_vectors_is_read_as_a_table_of_them():
    block = MaskedTransformer(16, layers=1, heads=2, feedforward=32, dropout=0.0, max_len=6).eval()
    x, mask = torch.randn(4, 6, 16), torch.arange(6) < torch.tensor([6, 1, 3, 3])[:, None]
    rows = torch.where(mask, torch.arange(24).view(4, 6), -1)
    expected = torch.cat([block(x[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate([6, 1, 3, 3])])
    torch.testing.assert_close(block(x, mask), expected)
    torch.testing.assert_close(block.gather(x.flatten(0, 1), rows, mask), expected)


def test_longer_than_its_positions_is_an_error():
    block = MaskedTransformer(16, layers=1, heads=2, feedforward=32, dropout=0.0, max_len=4)
    with pytest.raises(ValueError, match="5 positions"):
        block(torch.randn(1, 5, 16), torch.ones(1, 5, dtype=torch.bool))
