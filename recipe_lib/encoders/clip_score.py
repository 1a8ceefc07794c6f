"""How much like a picture of food a CLIP finds a crop: the rank of segments that DAR takes (arXiv:2312.04763)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from recipe_lib.data.clip_text import CONTEXT, clip_tokens
from recipe_lib.encoders.clip import clip_towers


class FoodRank:
    """Similarity of crops to "a picture of food".

    Args:
        model, pretrained: as `clip_towers` takes them.

    Shape:
        crops (m, H, W, 3) uint8 -> m cosines.
    """

    def __init__(self, model: str, pretrained: str, *, device: str = "cpu"):
        self.image, text = clip_towers(model, pretrained=pretrained)
        self.image.to(device)
        self.device, self.name = device, f"{model} {pretrained}"
        with torch.inference_mode():
            self.food = F.normalize(text(clip_tokens(["a picture of food"], CONTEXT)), dim=1).to(device)

    def __str__(self) -> str:
        """What decides its scores."""
        return self.name

    @torch.inference_mode()
    def __call__(self, crops: np.ndarray) -> Sequence[float]:
        pixels = torch.from_numpy(crops).permute(0, 3, 1, 2).float().to(self.device)
        pixels = F.interpolate(pixels, self.image.size, mode="bicubic", antialias=True).clamp(0, 255)
        return (F.normalize(self.image.pool(self.image(pixels)), dim=1) @ self.food.T)[:, 0].tolist()
