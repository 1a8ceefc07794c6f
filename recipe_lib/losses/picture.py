"""Triplets between pictures, by the distance of their pixels (R2GAN's ranking in image space, CVPR 2019)."""

from __future__ import annotations

import torch
from torch import Tensor


def picture_triplet_loss(a: Tensor, b: Tensor, margin: float = 0.1) -> Tensor:
    """Hinge [margin + |q - p| - |q - n|]_+ of a -> b and b -> a, each its sum over the number that are not zero.

    Distances are root mean squares over pixels, so that the margin means the same at every resolution.

    Shape:
        a, b (B, pixels); row i of a belongs to row i of b -> scalar. One pair alone has no negative and costs 0.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        squares = a.square().mean(1)[:, None] + b.square().mean(1) - 2 * a @ b.T / a.shape[1]
        distance = squares.clamp(min=1e-12).sqrt()
    own = distance.diagonal()
    itself = torch.eye(len(a), dtype=torch.bool, device=a.device)
    hinges = [(margin + positive - distance).clamp(min=0).masked_fill(itself, 0) for positive in (own[:, None], own)]
    return sum(hinge.sum() / (hinge > 0).sum().clamp(min=1) for hinge in hinges)
