import numpy as np
import pytest
import torch

from recipe_lib.data.loading import RecipeBatch
from recipe_lib.encoders import RecipeEncoder
from recipe_lib.encoders.recipe import MaskedTransformer


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


def padded_reference(model, recipe):
    """One recipe the straightforward way: every sentence alone, no grouping, no sharing, no padding."""
    parts = []
    for name, sentences in zip(("title", "ingredients", "instructions"), ([recipe[0]], *recipe[1:]), strict=True):
        vectors = []
        for sentence in sentences:
            block = model.words[name]
            x = model.word(torch.tensor([sentence])) + block.position[: len(sentence)]
            vectors.append(block.encoder(x).mean(1))
        if name == "title":
            parts.append(vectors[0])
            continue
        block = model.sentences[name]
        x = torch.stack(vectors, 1) + block.position[: len(vectors)]
        parts.append(block.encoder(x).mean(1))
    return torch.tanh(model.fc(torch.cat(parts, 1)))


def test_equals_one_recipe_at_a_time():
    model, recipes = make(), random_recipes(9)
    found = model(batch(recipes)).embedding
    expected = torch.cat([padded_reference(model, recipe) for recipe in recipes])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


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
    found = model(batch([recipe, swapped_lines, swapped_words])).embedding
    assert not torch.allclose(found[0], found[1], atol=1e-4) and not torch.allclose(found[0], found[2], atol=1e-4)


def test_gradients_reach_every_weight():
    model = make(dropout=0.0).train()
    model(batch(random_recipes(5))).embedding.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_longer_than_its_positions_is_an_error():
    block = MaskedTransformer(16, layers=1, heads=2, feedforward=32, dropout=0.0, max_len=4)
    with pytest.raises(RuntimeError):
        block(torch.randn(1, 5, 16), torch.ones(1, 5, dtype=torch.bool))
