"""CLIP's towers alone, trained whole: a photo against title and ingredients as one caption (arXiv:2103.00020)."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from recipe_lib.causal.debiasing import Debiasing
from recipe_lib.encoders.captions import CaptionEncoder, CLIPImageEncoder
from recipe_lib.encoders.clip import TextTower, clip_towers
from recipe_lib.systems.base import System
from recipe_lib.systems.registry import build


class Captions(System):
    """A recipe has no components here."""

    def build(self) -> None:
        config = self.config
        image, text = clip_towers(
            config.clip_model, pretrained=config.clip_pretrained, load=config.pretrained, frozen=False
        )
        self.image_encoder, self.recipe_encoder = CLIPImageEncoder(image), self.read(text)
        self.config = replace(config, embed_dim=self.recipe_encoder.dim)

    def read(self, tower: TextTower) -> nn.Module:
        """What reads a recipe through the text tower."""
        return CaptionEncoder(tower)


def bare_towers(system: System, method: str = "captions") -> System:
    """The CLIP towers of a system, without what the study put on them.

    The new system has its own copy; `set_towers` puts one back.

    Args:
        method: "captions", how towers are trained, or "zero_shot", how DAR scores them.
    """
    bare = replace(system.config, method=method, pretrained=False, descriptions="", segments=0, debiasing=Debiasing())
    towers = build(bare)
    set_towers(towers, system)
    return towers


def set_towers(system: System, source: System) -> None:
    """Give a system the weights of another one's CLIP towers."""
    for side in ("image_encoder", "recipe_encoder"):
        getattr(system, side).tower.load_state_dict(getattr(source, side).tower.state_dict())
