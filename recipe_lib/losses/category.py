"""Cross-entropy of a category that not every recipe has (JE's regularisation, im2recipe, CVPR 2017)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def category_loss(logits: Tensor, category: Tensor) -> Tensor:
    """Mean over the labelled rows; 0, not NaN as in the released code, where none is labelled.

    Shape:
        logits (B, C), category (B,) int64, -1 for none -> scalar.
    """
    total = F.cross_entropy(logits.float(), category, ignore_index=-1, reduction="sum")
    return total / (category >= 0).sum().clamp(min=1)
