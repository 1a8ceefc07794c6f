"""Bidirectional triplet loss over every in-batch negative (H-T, arXiv:2103.13061)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def triplet_loss(a: Tensor, b: Tensor, margin: float = 0.3) -> Tensor:
    """Hinge on the cosine similarities of all pairs, both directions, no hard mining.

    sum over i != j of [margin + s_ij - s_ii]_+ + [margin + s_ij - s_jj]_+, divided by all B x B cells,
    s_ij = cos(a_i, b_j).

    Shape:
        a, b (B, D); row i of a belongs to row i of b -> scalar. One pair alone has no negative and costs 0.
    """
    with torch.autocast(a.device.type, enabled=False):  # it would take the product back to 8 bits of mantissa
        similarity = F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T  # (B, B)
    positive = similarity.diagonal()
    a_to_b = (margin + similarity - positive[:, None]).clamp(min=0)
    b_to_a = (margin + similarity - positive[None, :]).clamp(min=0)
    # The diagonal is margin in both, whatever the embeddings: a constant, taken off without a mask.
    return (a_to_b + b_to_a).mean() - 2 * margin / len(a)
