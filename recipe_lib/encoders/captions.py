"""CLIP without heads or transformers over sentences (Radford et al., arXiv:2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipe_lib.data.clip_text import CONTEXT, clip_ids
from recipe_lib.data.loading import RecipeBatch
from recipe_lib.encoders.clip import ImageTower, TextTower
from recipe_lib.encoders.recipe import HierarchicalEncoder, RecipeFeatures


class CLIPImageEncoder(nn.Module):
    """Photo -> CLIP: the interface of `ImageEncoder` over an image tower, with or without adapters.

    Args:
        tower: becomes a part of this module.
        width, reduction: of the adapters; both 0 for none.

    Shape:
        images (B, 3, S, S) uint8 -> `features` (B, 1 + N, C) -> `embed` (B, E) or `feature_map` (B, C, h, w).
    """

    def __init__(self, tower: ImageTower, *, width: int = 0, reduction: int = 0):
        super().__init__()
        self.tower, self.adapters = tower, tower.adapters(width, reduction)
        self.channels = tower.width  # C

    def features(self, images: Tensor) -> Tensor:
        """Tokens after the last block, the class token first."""
        return self.tower(images, self.adapters)

    def embed(self, features: Tensor) -> Tensor:
        """(B, E) in CLIP's joint space."""
        return self.tower.pool(features)

    def feature_map(self, features: Tensor) -> Tensor:
        """(B, C, h, w): the patch tokens on their grid."""
        return self.tower.patches(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(self.features(images))


class CaptionEncoder(nn.Module):
    """A recipe's title and ingredient lines as one caption, as long as the text tower reads, in CLIP's joint space.

    Shape:
        RecipeBatch of B recipes, tokens as `clip_ids` gives them -> embedding (B, E), no components.
    """

    def __init__(self, tower: TextTower):
        super().__init__()
        self.tower, self.dim = tower, tower.dim
        (self.comma,) = clip_ids(",", 3)[1:-1]

    def encode_sentences(self, component: str, tokens: Tensor) -> Tensor:
        """Token ids (U, L) -> sentence vectors (U, E), whatever the component. The dictionary is made from these."""
        return self.tower(tokens)

    def forward(self, recipes: RecipeBatch) -> RecipeFeatures:
        return RecipeFeatures(self.tower(self.captions(recipes)), ())

    def captions(self, recipes: RecipeBatch) -> Tensor:
        """(B, L) int64."""
        sentences = [row[1 : row.index(max(row))] for row in recipes.tokens.tolist()]  # the end has the highest id
        start, end = int(recipes.tokens[0, 0]), int(recipes.tokens.max())
        rows = torch.cat([recipes.title[:, None], recipes.ingredients], 1).tolist()
        texts = [[id_ for i in row if i >= 0 for id_ in (self.comma, *sentences[i])][1 : CONTEXT - 1] for row in rows]
        tokens = torch.zeros(len(texts), max(map(len, texts)) + 2, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text) + 2] = torch.tensor([start, *text, end])
        return tokens.to(recipes.tokens.device)


class ZeroShotEncoder(HierarchicalEncoder):
    """CLIP's zero-shot recipe: the mean of title, ingredients and instructions, as DAR scores it (arXiv:2312.04763).

    The paper says that the three are averaged, not how. Here each is the mean of its sentences' vectors, and nothing is
    L2-normalised before a mean, as DAR's segments are averaged. A component without a sentence counts as zeros, which
    leaves the direction of the others.

    Shape:
        RecipeBatch of B recipes, tokens as `clip_ids` gives them -> embedding (B, E), three components (B, E).
    """

    def __init__(self, tower: TextTower):
        super().__init__()
        self.tower, self.dim = tower, tower.dim

    def encode_sentences(self, component: str, tokens: Tensor) -> Tensor:
        return self.tower(tokens)

    def join_sentences(self, component: str, sentences: Tensor, rows: Tensor) -> Tensor:
        rows = rows.view(len(rows), -1)
        there = (rows >= 0).to(sentences.dtype).unsqueeze(2)
        return (F.embedding(rows.clamp(min=0), sentences) * there).sum(1) / there.sum(1).clamp(min=1)

    def embed(self, components: Sequence[Tensor]) -> RecipeFeatures:
        return RecipeFeatures(torch.stack(list(components)).mean(0), tuple(components))
