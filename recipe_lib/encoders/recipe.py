"""Hierarchical transformers over a recipe: words -> sentences -> components -> recipe (H-T, arXiv:2103.13061)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from recipe_lib.data.loading import RecipeBatch
from recipe_lib.data.text import PAD

COMPONENTS = ("title", "ingredients", "instructions")


class RecipeFeatures(NamedTuple):
    """embedding (B, D) in (-1, 1); components: title, ingredients, instructions, each (B, E)."""

    embedding: Tensor
    components: tuple[Tensor, Tensor, Tensor]


class MaskedTransformer(nn.Module):
    """Post-norm transformer with learned positions, then the mean over the real positions.

    Shape:
        x (B, L, E), mask (B, L) bool, True where real: the first ones of each row, at least one -> (B, E).
    """

    def __init__(self, dim: int, *, layers: int, heads: int, feedforward: int, dropout: float, max_len: int):
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(max_len, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, feedforward, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        # Rows of about the same length go together: padding all to the longest would double the work on real recipes.
        group = (mask.sum(1) + 3) // 4
        order = group.argsort(stable=True)
        parts = []
        for rows in order.split(group.bincount().tolist()):
            if len(rows):
                length = min(4 * int(group[rows[0]]), x.shape[1])
                parts.append(self._encode(x[rows, :length], mask[rows, :length]))
        return torch.cat(parts)[order.argsort()]

    def _encode(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.encoder(x + self.position[: x.shape[1]], src_key_padding_mask=~mask)
        weight = mask.to(x.dtype).unsqueeze(2)
        return (x * weight).sum(1) / weight.sum(1)


class RecipeEncoder(nn.Module):
    """Title, ingredients and instructions -> one vector.

    A first transformer a component reads the words of a sentence; a second one, for ingredients and instructions,
    reads the sentence vectors. Only real sentences are encoded, each distinct one of the batch once a component.

    Args:
        vocabulary: V, number of words.
        embed_dim: D, width of the joint space.
        dim: E, width inside (512 in the paper).

    Shape:
        RecipeBatch of B recipes -> embedding (B, D), three components (B, E).
    """

    def __init__(
        self,
        vocabulary: int,
        embed_dim: int,
        *,
        dim: int = 512,
        layers: int = 2,
        heads: int = 4,
        feedforward: int = 2048,
        dropout: float = 0.1,
        max_len: int = 50,
    ):
        super().__init__()
        self.word = nn.Embedding(vocabulary, dim, padding_idx=PAD)
        nn.init.normal_(self.word.weight, std=0.02)  # as the positions: neither drowns the other
        shape = {"layers": layers, "heads": heads, "feedforward": feedforward, "dropout": dropout, "max_len": max_len}
        self.words = nn.ModuleDict({name: MaskedTransformer(dim, **shape) for name in COMPONENTS})
        self.sentences = nn.ModuleDict({name: MaskedTransformer(dim, **shape) for name in COMPONENTS[1:]})
        self.fc = nn.Linear(3 * dim, embed_dim)

    def encode_sentences(self, component: str, tokens: Tensor) -> Tensor:
        """First level: token ids (U, L) -> sentence vectors (U, E). The dictionary is made from these."""
        return self.words[component](self.word(tokens), tokens != PAD)

    def forward(self, recipes: RecipeBatch) -> RecipeFeatures:
        components = []
        for name in COMPONENTS:
            rows = getattr(recipes, name)
            mask = rows >= 0
            used, which = rows[mask].unique(return_inverse=True)
            sentences = self.encode_sentences(name, recipes.tokens[used])
            if name not in self.sentences:
                components.append(sentences[which])
                continue
            grid = sentences.new_zeros(*rows.shape, sentences.shape[1])  # (B, S, E)
            grid[mask] = sentences[which]
            components.append(self.sentences[name](grid, mask))
        embedding = torch.tanh(self.fc(torch.cat(components, 1)))
        return RecipeFeatures(embedding, tuple(components))
