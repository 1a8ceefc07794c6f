"""Cosine similarities of two sides of a batch, which the losses between them are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_matrix(a: Tensor, b: Tensor) -> Tensor:
    """a (B, D), b (B, D) -> (B, B) in float32, cos(a_i, b_j); autocast would take the product back to 8 bits."""
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T
