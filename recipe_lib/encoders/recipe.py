"""Hierarchical transformers over a recipe: words -> sentences -> components -> recipe (H-T, arXiv:2103.13061)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipe_lib.data.loading import RecipeBatch
from recipe_lib.data.text import PAD
from recipe_lib.encoders.packed import MaskedTransformer

COMPONENTS = ("title", "ingredients", "instructions")


class RecipeFeatures(NamedTuple):
    """embedding (B, D) in (-1, 1); components: title, ingredients, instructions, each (B, E)."""

    embedding: Tensor
    components: tuple[Tensor, Tensor, Tensor]


class HierarchicalEncoder(nn.Module, ABC):
    """What encoders of recipes by sentences have in common; a subclass says how a sentence is read.

    It has `dim` (E), `fc` and `sentences`: transformers over the sentence vectors of ingredients and of instructions
    (or its own `embed` and `join_sentences`).
    Only real sentences are encoded, each distinct one of the batch once per component. A component without a sentence
    is a zero vector (the store gives it an empty sentence).

    Shape:
        RecipeBatch of B recipes -> embedding (B, D), three components (B, E).
    """

    @abstractmethod
    def encode_sentences(self, component: str, tokens: Tensor) -> Tensor:
        """First level: token ids (U, L) -> sentence vectors (U, E). The dictionary is made from these."""

    def join_sentences(self, component: str, sentences: Tensor, rows: Tensor) -> Tensor:
        """Second level: sentence vectors (U, E); rows of them (B,) or (B, S), -1 for none -> (B, E)."""
        some = (rows >= 0).view(len(rows), -1).any(1)
        if component in self.sentences:
            encoded = self.sentences[component].gather(sentences, rows[some], rows[some] >= 0)
        else:
            encoded = F.embedding(rows[some], sentences)
        return encoded.new_zeros(len(rows), self.dim).index_copy(0, some.nonzero()[:, 0], encoded)

    def embed(self, components: Sequence[Tensor]) -> RecipeFeatures:
        """The three components (B, E) and their embedding."""
        return RecipeFeatures(torch.tanh(self.fc(torch.cat(list(components), 1))), tuple(components))

    def forward(self, recipes: RecipeBatch) -> RecipeFeatures:
        return self.embed([self._component(name, getattr(recipes, name), recipes.tokens) for name in COMPONENTS])

    def _component(self, name: str, rows: Tensor, tokens: Tensor) -> Tensor:
        """rows (B,) or (B, S) of tokens, -1 where there is none -> (B, E)."""
        mask = rows >= 0
        if not mask.any():
            return torch.zeros(len(rows), self.dim, device=rows.device)
        used, which = rows[mask].unique(return_inverse=True)
        return self.join_sentences(name, self.encode_sentences(name, tokens[used]), rows.masked_scatter(mask, which))


class RecipeEncoder(HierarchicalEncoder):
    """Title, ingredients and instructions -> one vector.

    A first transformer per component reads the words of a sentence; a second one, for ingredients and instructions,
    reads the sentence vectors.

    Args:
        vocabulary: V, number of words.
        embed_dim: D, width of the joint space.
        dim: E, width inside (512 in the paper).
        transformer: layers, heads, ... of each `MaskedTransformer`; its defaults are the paper's.

    Shape:
        RecipeBatch of B recipes -> embedding (B, D), three components (B, E).
    """

    def __init__(self, vocabulary: int, embed_dim: int, *, dim: int = 512, **transformer: float):
        super().__init__()
        self.dim = dim
        self.word = nn.Embedding(vocabulary, dim, padding_idx=PAD)  # N(0, 1), as in the released code
        self.words = nn.ModuleDict({name: MaskedTransformer(dim, **transformer) for name in COMPONENTS})
        self.sentences = nn.ModuleDict({name: MaskedTransformer(dim, **transformer) for name in COMPONENTS[1:]})
        self.fc = nn.Linear(3 * dim, embed_dim)

    def encode_sentences(self, component: str, tokens: Tensor) -> Tensor:
        return self.words[component].gather(self.word.weight, tokens, tokens != PAD)
