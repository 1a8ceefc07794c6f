"""CLIP's towers as they are, a recipe being the mean of its components, as DAR scores them (arXiv:2312.04763)."""

from __future__ import annotations

from torch import nn

from recipe_lib.encoders.captions import ZeroShotEncoder
from recipe_lib.encoders.clip import TextTower
from recipe_lib.systems.captions import Captions


class ZeroShot(Captions):
    """Photos and recipes through the bare towers."""

    def read(self, tower: TextTower) -> nn.Module:
        return ZeroShotEncoder(tower)
