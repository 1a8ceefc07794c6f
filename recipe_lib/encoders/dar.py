"""The encoders of DAR (Song et al., arXiv:2312.04763): shared CLIP towers, an adapter set for each encoder.

Photos, descriptions and segments are what CLIP gives (Eqs. 4 and 5); only the recipe side ends in FC -> tanh. So the
joint space is CLIP's own, D = E. The towers belong to `CLIPImageEncoder` and to `DARRecipeEncoder`; the other two only
refer to them, so that a system's state holds each tower once, and moves and freezes it once.
"""

from __future__ import annotations

from torch import Tensor, nn

from recipe_lib.encoders.clip import ImageTower, TextTower
from recipe_lib.encoders.packed import MaskedTransformer
from recipe_lib.encoders.recipe import COMPONENTS, HierarchicalEncoder


class DARRecipeEncoder(HierarchicalEncoder):
    """Title, ingredients and instructions -> one vector.

    CLIP's text tower with an adapter set for each component reads the sentences; for ingredients and instructions a
    transformer reads the sentence vectors.

    Args:
        tower: becomes a part of this module.
        width, reduction: of the adapters; both 0 for none.
        transformer: as in `RecipeEncoder`.

    Shape:
        RecipeBatch of B recipes, tokens as `clip_ids` gives them -> embedding (B, E) in (-1, 1), three components
        (B, E).
    """

    def __init__(self, tower: TextTower, *, width: int = 64, reduction: int = 0, **transformer: float):
        super().__init__()
        self.tower, self.dim = tower, tower.dim
        self.adapters = nn.ModuleDict({name: tower.adapters(width, reduction) for name in COMPONENTS})
        self.sentences = nn.ModuleDict({name: MaskedTransformer(tower.dim, **transformer) for name in COMPONENTS[1:]})
        self.fc = nn.Linear(3 * tower.dim, tower.dim)

    def encode_sentences(self, component: str, tokens: Tensor) -> Tensor:
        return self.tower(tokens, self.adapters[component])


class _Referring(nn.Module):
    """Reads through a tower that belongs to another module: not among its own parameters, its state or its modules."""

    def __init__(self, tower: ImageTower | TextTower, width: int, reduction: int):
        super().__init__()
        object.__setattr__(self, "tower", tower)
        self.adapters = tower.adapters(width, reduction)


class DescriptionEncoder(_Referring):
    """Imagined description -> CLIP with adapters, or frozen where width and reduction are 0.

    Args:
        tower: that of the recipe encoder.

    Shape:
        tokens (B, L) int64 as `clip_tokens` gives them -> (B, E).
    """

    def __init__(self, tower: TextTower, *, width: int = 64, reduction: int = 0):
        super().__init__(tower, width, reduction)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tower(tokens, self.adapters)


class SegmentEncoder(_Referring):
    """Segments of a photo -> CLIP (`features`) -> their mean.

    Without adapters, the default, `features` never change and are computed once per run. With adapters they are
    learned: pixels come with every batch, and their activations take the memory of n more photos per pair.

    Args:
        tower: that of the image encoder.
        width, reduction: of the adapters; both 0 for none.

    Shape:
        `features`: segments (N, 3, S, S) uint8 -> (N, E);
        segments (B, n, E) features or (B, n, 3, S, S) uint8 pixels, mask (B, n) bool, True where there is a segment
        -> (B, E). A photo without any gives zeros.

    Raises:
        ValueError: no adapters and a tower that trains: what was kept would be out of date after one step.
    """

    def __init__(self, tower: ImageTower, *, width: int = 0, reduction: int = 0):
        super().__init__(tower, width, reduction)
        if self.adapters is None and not tower.frozen:
            raise ValueError(
                "segments are encoded once per run: their tower must be frozen; give them a frozen one of their own"
            )

    def features(self, segments: Tensor) -> Tensor:
        return self.tower.pool(self.tower(segments, self.adapters))

    def forward(self, segments: Tensor, mask: Tensor) -> Tensor:
        if segments.ndim == 5:
            features = self.features(segments[mask])
            segments = features.new_zeros(*mask.shape, features.shape[1]).masked_scatter(mask.unsqueeze(2), features)
        weight = mask.to(segments.dtype).unsqueeze(2)
        return (segments * weight).sum(1) / weight.sum(1).clamp(min=1)
