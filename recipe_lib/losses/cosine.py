"""Cosine loss of pairs that match and pairs that do not, as JE trains on them (im2recipe, CVPR 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from recipe_lib.losses.similarity import cosine_matrix


def cosine_loss(a: Tensor, b: Tensor, partner: Tensor, margin: float = 0.1) -> Tensor:
    """Mean over the pairs of 1 - cos where they belong together, [cos - margin]_+ where they do not.

    Shape:
        a, b (B, D); row i of a belongs to row i of b. partner (B,): the row of a that each row of b is held against,
        its own or, as a mismatch, another's -> scalar.
    """
    rows = torch.arange(len(b), device=b.device)
    cosine = cosine_matrix(a, b)[partner, rows]
    return torch.where(partner == rows, 1 - cosine, (cosine - margin).clamp(min=0)).mean()


def mismatches(pairs: int, share: float, generator: torch.Generator) -> Tensor:
    """(pairs,) partners for `cosine_loss`: with probability `share` any other pair's, each as likely, else its own."""
    rows = torch.arange(pairs)
    if pairs < 2:
        return rows
    other = (rows + torch.randint(1, pairs, (pairs,), generator=generator)) % pairs
    return torch.where(torch.rand(pairs, generator=generator) < share, other, rows)
