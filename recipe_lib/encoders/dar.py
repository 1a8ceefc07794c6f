"""The encoders of DAR (Song et al., arXiv:2312.04763): shared CLIP towers, an adapter set an encoder, FC, tanh.

The image tower belongs to `DARImageEncoder` and the text tower to `DARRecipeEncoder`; the other two only refer to them,
so that a system's state holds each tower once, and moves and freezes it once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recipe_lib.encoders.captions import CLIPImageEncoder
from recipe_lib.encoders.clip import ImageTower, TextTower
from recipe_lib.encoders.packed import MaskedTransformer
from recipe_lib.encoders.recipe import COMPONENTS, HierarchicalEncoder


class DARImageEncoder(CLIPImageEncoder):
    """Photo -> CLIP with adapters -> Linear -> tanh. The interface of `ImageEncoder`.

    Args:
        tower: becomes a part of this module.
        embed_dim: D, width of the joint space.
        width, reduction: of the adapters; both 0 for none.

    Shape:
        images (B, 3, S, S) uint8 -> `features` (B, 1 + N, C) -> `embed` (B, D) or `feature_map` (B, C, h, w).
    """

    def __init__(self, tower: ImageTower, embed_dim: int, *, width: int = 64, reduction: int = 0):
        super().__init__(tower)
        self.adapters = tower.adapters(width, reduction)
        self.fc = nn.Linear(tower.dim, embed_dim)

    def features(self, images: Tensor) -> Tensor:
        """Tokens after the last block, the class token first."""
        return self.tower(images, self.adapters)

    def embed(self, features: Tensor) -> Tensor:
        """(B, D) in (-1, 1)."""
        return torch.tanh(self.fc(self.tower.pool(features)))


class DARRecipeEncoder(HierarchicalEncoder):
    """Title, ingredients and instructions -> one vector.

    CLIP's text tower with an adapter set a component reads the sentences; for ingredients and instructions a
    transformer reads the sentence vectors.

    Args:
        tower: becomes a part of this module.
        embed_dim: D, width of the joint space.
        width, reduction: of the adapters; both 0 for none.
        transformer: as in `RecipeEncoder`.

    Shape:
        RecipeBatch of B recipes, tokens as `clip_ids` gives them -> embedding (B, D), three components (B, E).
    """

    def __init__(self, tower: TextTower, embed_dim: int, *, width: int = 64, reduction: int = 0, **transformer: float):
        super().__init__()
        self.tower = tower
        self.adapters = nn.ModuleDict({name: tower.adapters(width, reduction) for name in COMPONENTS})
        self.sentences = nn.ModuleDict({name: MaskedTransformer(tower.dim, **transformer) for name in COMPONENTS[1:]})
        self.fc = nn.Linear(3 * tower.dim, embed_dim)

    @property
    def dim(self) -> int:
        """E, width of a component."""
        return self.tower.dim

    def encode_sentences(self, component: str, tokens: Tensor) -> Tensor:
        return self.tower(tokens, self.adapters[component])


class _Referring(nn.Module):
    """Reads through a tower that belongs to another module: not among its own parameters, its state or its modules."""

    def __init__(self, tower: ImageTower | TextTower, embed_dim: int):
        super().__init__()
        object.__setattr__(self, "tower", tower)
        self.fc = nn.Linear(tower.dim, embed_dim)


class DescriptionEncoder(_Referring):
    """Imagined description -> CLIP with adapters, or frozen where width and reduction are 0 -> Linear -> tanh.

    Args:
        tower: that of the recipe encoder.

    Shape:
        tokens (B, L) int64 as `clip_tokens` gives them -> (B, D) in (-1, 1).
    """

    def __init__(self, tower: TextTower, embed_dim: int, *, width: int = 64, reduction: int = 0):
        super().__init__(tower, embed_dim)
        self.adapters = tower.adapters(width, reduction)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.fc(self.tower(tokens, self.adapters)))


class SegmentEncoder(_Referring):
    """Segments of a photo -> frozen CLIP, once a run (`features`) -> mean -> Linear -> tanh, at every step (`forward`).

    Args:
        tower: that of the image encoder; frozen, else what was kept would be out of date after one step.

    Shape:
        `features`: segments (N, 3, S, S) uint8 -> (N, E);
        features (B, n, E), mask (B, n) bool, True where there is a segment -> (B, D) in (-1, 1). A photo without any
        gives tanh(bias), as good as no information.

    Raises:
        ValueError: the tower trains.
    """

    def __init__(self, tower: ImageTower, embed_dim: int):
        if not tower.frozen:
            raise ValueError(
                "segments are encoded once a run: their tower must be frozen; give them a frozen one of their own"
            )
        super().__init__(tower, embed_dim)

    @torch.no_grad()
    def features(self, segments: Tensor) -> Tensor:
        return self.tower.pool(self.tower(segments))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        weight = mask.to(features.dtype).unsqueeze(2)
        return torch.tanh(self.fc((features * weight).sum(1) / weight.sum(1).clamp(min=1)))
