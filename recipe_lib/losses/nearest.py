"""Triplets with the nearest negative of either modality, by Euclidean distance (ACME, arXiv:1905.01273)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest_triplet_loss(a: Tensor, b: Tensor, margin: float = 0.3, cross_modal_only: bool = False) -> Tensor:
    """Mean over all 2B rows of [margin + |row - partner| - |row - nearest other row|]_+, rows of unit length.

    Of the 2B - 2 rows that are neither the row nor its partner, so photos push photos apart too.

    Args:
        cross_modal_only: among the B - 1 others of the partner's side.

    Shape:
        a, b (B, D); row i of a belongs to row i of b -> scalar. One pair alone has no negative and costs 0.
    """
    rows = torch.cat([a, b])
    with torch.autocast(rows.device.type, enabled=False):
        rows = F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)
        distance = (2 - 2 * rows @ rows.T).clamp(min=1e-12).sqrt()
    number = torch.arange(len(rows), device=rows.device)
    same = number[:, None] % len(a) == number % len(a)
    if cross_modal_only:
        same = same | ((number[:, None] < len(a)) == (number < len(a)))
    partner = distance.gather(1, number.roll(len(a))[:, None])[:, 0]
    return (margin + partner - distance.masked_fill(same, torch.inf).amin(1)).clamp(min=0).mean()
