"""Cosine similarities of two sides of a batch, which the losses between them are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_matrix(a: Tensor, b: Tensor) -> Tensor:
    """a, b (B, D) -> (B, B) in float32 or more, cos(a_i, b_j); autocast would take the product back to 8 bits."""
    a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
