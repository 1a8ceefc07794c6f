"""DAR: CLIP with adapters, imagined descriptions, segments of the photo (Song et al., arXiv:2312.04763)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from recipe_lib.data.loading import Batch
from recipe_lib.encoders.captions import CLIPImageEncoder
from recipe_lib.encoders.clip import clip_towers
from recipe_lib.encoders.dar import DARRecipeEncoder, DescriptionEncoder, SegmentEncoder
from recipe_lib.systems.base import Step, System


class DAR(System):
    """Frozen towers that all encoders share, a set of adapters for each; the joint space is CLIP's own."""

    pairs: ClassVar = {
        "retrieval": ("image", "recipe"),
        "segment": ("segments", "recipe"),
        "description": ("image", "description"),
    }

    def build(self) -> None:
        config = self.config
        image, text = clip_towers(config.clip_model, pretrained=config.clip_pretrained, load=config.pretrained)
        none = {"width": 0}
        own = {"width": config.adapter_width, "reduction": config.adapter_reduction}
        photos, texts = (own if config.adapters in ("both", side) else none for side in ("image", "text"))
        self.image_encoder = CLIPImageEncoder(image, **photos)
        self.recipe_encoder = DARRecipeEncoder(text, **texts, **config.recipe_transformer)
        if config.descriptions:
            self.description_encoder = DescriptionEncoder(text, **(texts if config.descriptions == "adapted" else none))
        if config.segments:
            self.segment_encoder = SegmentEncoder(image, **(photos if config.segment_encoder == "adapted" else none))
        self.config = replace(config, embed_dim=self.recipe_encoder.dim)
        self.project_components()

    @property
    def reads(self) -> frozenset[str]:
        wanted = {"descriptions": self.config.descriptions, "segments": self.config.segments}
        return frozenset(name for name, value in wanted.items() if value)

    def sides(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        sides = {}
        if batch.segments is not None and step.weight("segment"):
            sides["segments"] = self.encode_segments(batch.segments, batch.segment_mask)
        if batch.descriptions is not None and step.weight("description"):
            sides["description"] = self.encode_descriptions(batch.descriptions)
        return sides

    def compare(self, name: str, a: Tensor, b: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if name != "segment":
            return loss(a, b)
        # A photo without segments, zeros, is no pair: a logarithm over the batch would see it alone.
        there = a.detach().any(1)
        return loss(a[there], b[there]) if there.any() else a.sum()

    def encode_descriptions(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 ids of CLIP -> (B, D)."""
        with torch.autocast("cpu", enabled=False):
            return self.description_encoder(tokens)

    def encode_segments(self, segments: Tensor, mask: Tensor) -> Tensor:
        """(B, n, E) features or (B, n, 3, S, S) uint8 pixels of segments, mask (B, n) -> (B, D)."""
        return self.segment_encoder(segments, mask)
