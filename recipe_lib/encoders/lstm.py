"""Recurrent encoder of a recipe: names of its ingredients one way and back, its steps one way (JE, CVPR 2017).

Of im2recipe, and with it of AdaMine (arXiv:1804.11146), ACME (arXiv:1905.01273) and R2GAN. They read two kinds of
vectors made elsewhere: word2vec's of ingredient names, and skip-instructions', which were released as features alone.
Here word vectors may come from word2vec (`data/word_vectors.py`) or be learnt; **a step's vector is the last state of
an LSTM over its words that is trained along, a substitution for skip-instructions**.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from recipe_lib.data.loading import RecipeBatch
from recipe_lib.data.text import END, PAD
from recipe_lib.encoders.recipe import COMPONENTS, RecipeFeatures


class LSTMEncoder(nn.Module):
    """Bidirectional LSTM over ingredients, LSTM over steps, their last states -> Linear -> tanh. No title is read.

    A line's vector is the mean of its words' vectors: with `text_tokens: names` a line is one token, and the vector is
    that ingredient's own. **The ingredient dictionary is made of these vectors**, before the bidirectional LSTM, whose
    states hold the other ingredients of the recipe too.

    Args:
        vocabulary: V, number of words.
        embed_dim: D, width of the joint space.
        dim: E, width of a word vector and of the state of each direction over ingredients (300 in JE).
        instruction_dim: width of a step's vector and of the state over steps (1024 in JE).

    Shape:
        RecipeBatch of B recipes -> embedding (B, D); components: (B, 0), (B, 2 E), (B, instruction_dim).
    """

    def __init__(self, vocabulary: int, embed_dim: int, *, dim: int = 300, instruction_dim: int = 1024):
        super().__init__()
        self.dim = dim
        self.word = nn.Embedding(vocabulary, dim, padding_idx=PAD)
        self.ingredients = nn.LSTM(dim, dim, batch_first=True, bidirectional=True)
        self.words = nn.LSTM(dim, instruction_dim, batch_first=True)
        self.instructions = nn.LSTM(instruction_dim, instruction_dim, batch_first=True)
        self.fc = nn.Linear(2 * dim + instruction_dim, embed_dim)

    @torch.no_grad()
    def start_from(self, vectors: Tensor) -> None:
        """Word vectors (V, E) to begin with. ValueError where they are of another size."""
        if vectors.shape != self.word.weight.shape:
            raise ValueError(f"word vectors {tuple(vectors.shape)}: make recipe_dim, {self.dim}, equal to word_vectors")
        self.word.weight.copy_(vectors)

    def encode_sentences(self, component: str, tokens: Tensor) -> Tensor:
        """Token ids (U, L) -> vectors: of ingredient lines (U, E), of steps (U, instruction_dim), of titles (U, 0)."""
        if component == "ingredients":
            real = (tokens > END).unsqueeze(2)  # neither padding nor a mark of where the line starts or ends
            return (self.word(tokens) * real).sum(1) / real.sum(1).clamp(min=1)
        if component == "instructions":
            return last_states(self.words, self.word.weight, tokens.masked_fill(tokens == PAD, -1))
        return self.word.weight.new_zeros(len(tokens), 0)

    def join_sentences(self, component: str, sentences: Tensor, rows: Tensor) -> Tensor:
        """Sentence vectors (U, ...) and rows of them, (B,) or (B, S), -1 for none -> component (B, ...)."""
        if component == "title":
            return sentences.new_zeros(len(rows), 0)
        return last_states(getattr(self, component), sentences, rows)

    def embed(self, components: Sequence[Tensor]) -> RecipeFeatures:
        """The components and their embedding (B, D)."""
        return RecipeFeatures(torch.tanh(self.fc(torch.cat(list(components), 1))), tuple(components))

    def forward(self, recipes: RecipeBatch) -> RecipeFeatures:
        components = []
        for name in COMPONENTS:
            rows = getattr(recipes, name)
            used, which = rows[rows >= 0].unique(return_inverse=True)
            vectors = self.encode_sentences(name, recipes.tokens[used])
            components.append(self.join_sentences(name, vectors, rows.masked_scatter(rows >= 0, which)))
        return self.embed(components)


def last_states(lstm: nn.LSTM, table: Tensor, rows: Tensor) -> Tensor:
    """What an LSTM of one layer remembers at the end of each row; padding is not read at all.

    Shape:
        table (N, E); rows (R, L) of it, -1 after the last of each row -> (R, directions x H), zero for an empty row.
    """
    lengths = (rows >= 0).sum(1)
    some = lengths > 0
    if not some.any():
        return table.new_zeros(len(rows), (1 + lstm.bidirectional) * lstm.hidden_size)
    packed = pack_padded_sequence(rows[some], lengths[some].cpu(), batch_first=True, enforce_sorted=False)
    read = PackedSequence(F.embedding(packed.data, table), *packed[1:])
    states = lstm(read)[1][0].transpose(0, 1).flatten(1)
    return states.new_zeros(len(rows), states.shape[1]).index_copy(0, some.nonzero()[:, 0], states)
