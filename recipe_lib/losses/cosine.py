"""Cosine loss of pairs that match and pairs that do not, as JE trains on them (im2recipe, CVPR 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from recipe_lib.losses.similarity import cosine_matrix


def cosine_loss(a: Tensor, b: Tensor, partner: Tensor | None = None, margin: float = 0.1, share: float = 0.8) -> Tensor:
    """1 - cos of what belongs together, [cos - margin]_+ of what does not; the mean over the pairs.

    Args:
        partner: (B,) row of a that each row of b is held against: its own, or that of another as a mismatch. None: all
            of them, the mean that drawing partners has in the long run.
        share: of mismatches in that mean; the drawn ones say it themselves.

    Shape:
        a, b (B, D); row i of a belongs to row i of b -> scalar. One pair alone has no mismatch.
    """
    cosine = cosine_matrix(a, b)
    own, others = 1 - cosine.diagonal(), (cosine - margin).clamp(min=0)
    if partner is not None:
        rows = torch.arange(len(b), device=b.device)
        return torch.where(partner == rows, own, others[partner, rows]).mean()
    if len(b) == 1:
        return (1 - share) * own.mean()
    apart = ~torch.eye(len(b), dtype=torch.bool, device=b.device)
    return (1 - share) * own.mean() + share * others[apart].mean()


def mismatches(pairs: int, share: float, generator: torch.Generator) -> Tensor:
    """(pairs,) partners for `cosine_loss`: with probability `share` any other pair's, each as likely, else its own."""
    rows = torch.arange(pairs)
    if pairs < 2:
        return rows
    other = (rows + torch.randint(1, pairs, (pairs,), generator=generator)) % pairs
    return torch.where(torch.rand(pairs, generator=generator) < share, other, rows)
