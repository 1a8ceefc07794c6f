import pytest
import torch

from recipe_lib.encoders.lstm import LSTMEncoder, last_states
from tests.encoders.test_recipe import batch, random_recipes

MARKS = [1, 2]  # <start> and <end>


def make():
    torch.manual_seed(0)
    return LSTMEncoder(30, 8, dim=6, instruction_dim=10)


def cells(lstm, x):
    """(L, E) -> last states of each direction, by the formulas, one position after the other."""
    states = []
    for way in ["", "_reverse"][: 1 + lstm.bidirectional]:
        w, u, b, c = (getattr(lstm, f"{name}_l0{way}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h = cell = torch.zeros(lstm.hidden_size)
        for step in x.flip(0) if way else x:
            enter, forget, new, out = (w @ step + b + u @ h + c).chunk(4)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            h = out.sigmoid() * cell.tanh()
        states.append(h)
    return torch.cat(states)


def one_by_one(model, recipes):
    """Each recipe alone, each sentence alone: nothing is padded, packed or shared."""
    rows = []
    for _, lines, steps in recipes:
        means = [torch.stack([model.word.weight[i] for i in line if i > 2]).mean(0) for line in lines]
        read = [cells(model.words, model.word.weight[step]) for step in steps]
        parts = [cells(model.ingredients, torch.stack(means)), cells(model.instructions, torch.stack(read))]
        rows.append(torch.tanh(model.fc(torch.cat(parts))))
    return torch.stack(rows)


def marked(recipes):
    """The same with marks around every sentence, and 2 replaced, which is one of them."""

    def sentence(ids):
        return [1, *(max(3, i) for i in ids), 2]

    return [(sentence(t), [*map(sentence, i)], [*map(sentence, s)]) for t, i, s in recipes]


def test_padding_never_counts():
    model, recipes = make(), marked(random_recipes(9))
    torch.testing.assert_close(model(batch(recipes)).embedding, one_by_one(model, recipes), rtol=1e-5, atol=1e-5)
    alone = torch.cat([model(batch([recipe])).embedding for recipe in recipes])
    torch.testing.assert_close(model(batch(recipes)).embedding, alone, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_recipes_one_by_one():
    model, recipes = make(), marked(random_recipes(9))
    weights, upstream = list(model.parameters()), torch.randn(9, 8)
    ours = torch.autograd.grad(model(batch(recipes)).embedding, weights, upstream)
    theirs = torch.autograd.grad(one_by_one(model, recipes), weights, upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert b.any()


def test_what_the_dictionary_is_made_of_is_the_ingredients_own_word_vector():
    model = make()
    lines = torch.tensor([[1, 7, 2, 0, 0], [1, 7, 9, 9, 2], [1, 2, 0, 0, 0]])
    word = model.word.weight
    vectors = model.encode_sentences("ingredients", lines)
    torch.testing.assert_close(vectors, torch.stack([word[7], (word[7] + 2 * word[9]) / 3, 0 * word[7]]))
    assert vectors.shape[1] == model.dim


def test_order_of_steps_counts_and_titles_do_not():
    model, (title, lines, steps) = make(), marked(random_recipes(3))[2]
    assert len(steps) > 1
    one, turned, other = (model(batch([r])).embedding for r in [
        (title, lines, steps), (title, lines, steps[::-1]), ([1, 5, 2], lines, steps)])  # fmt: skip
    assert not torch.allclose(one, turned, atol=1e-4)
    assert torch.equal(one, other)


def test_a_recipe_without_steps_or_lines_is_finite_and_in_its_row():
    model, recipes = make(), marked(random_recipes(4))
    recipes[1] = (recipes[1][0], recipes[1][1], [])
    recipes[2] = (recipes[2][0], [[1, 2]], [])  # as the store has a recipe without ingredients: an empty sentence
    features = model(batch(recipes))
    title, lines, steps = features.components
    assert title.shape == (4, 0) and lines.shape == (4, 12) and steps.shape == (4, 10)
    assert not steps[1].any() and not steps[2].any() and steps[[0, 3]].any(1).all()
    assert features.embedding.isfinite().all()
    none = batch(recipes)
    none.instructions = torch.full((4, 1), -1)
    assert not model(none).components[2].any()


def test_no_row_at_all():
    lstm = torch.nn.LSTM(4, 5, batch_first=True, bidirectional=True)
    assert last_states(lstm, torch.zeros(2, 4), torch.full((3, 2), -1)).shape == (3, 10)
    assert last_states(lstm, torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.long)).shape == (0, 10)


def test_starts_from_given_word_vectors():
    model, vectors = make(), torch.randn(30, 6)
    model.start_from(vectors)
    assert torch.equal(model.word.weight, vectors) and model.word.weight.requires_grad
    with pytest.raises(ValueError, match=r"make recipe_dim, 6, equal to word_vectors"):
        model.start_from(torch.randn(30, 7))


def test_encoding_a_split_equals_encoding_batches(tiny_store):
    """Evaluation joins vectors of distinct sentences; training reads batches."""
    from recipe_lib.data.loading import recipe_batch
    from recipe_lib.evaluation.scores import encode_recipes

    torch.manual_seed(0)
    encoder = LSTMEncoder(tiny_store.card["vocabulary"], 8, dim=6, instruction_dim=10)
    system = torch.nn.Module()
    system.recipe_encoder = encoder
    split = tiny_store.split("val")
    batches = encoder(recipe_batch(split, torch.arange(len(split)).numpy())).embedding
    torch.testing.assert_close(encode_recipes(system, split), batches, rtol=1e-5, atol=1e-5)
