"""Bidirectional triplet loss: similarity -> mining -> reduction (all negatives: H-T, arXiv:2103.13061)."""

from __future__ import annotations

import torch
from torch import Tensor

from recipe_lib.losses.similarity import cosine_matrix

MINING = ("all", "hardest", "non_zero")


def triplet_loss(a: Tensor, b: Tensor, margin: float = 0.3, mining: str = "all") -> Tensor:
    """Hinge on the cosine similarities of in-batch pairs, both directions.

    With hinges [margin + s_ij - s_ii]_+ of a -> b and [margin + s_ij - s_jj]_+ of b -> a, i != j, s_ij = cos(a_i, b_j):

    Args:
        mining: "all": the sum of all hinges, divided by all B x B cells (H-T). "hardest": of each query that of its
            most similar negative; their mean (ACME, arXiv:1905.01273). "non_zero": the sum over the number of hinges
            that are not zero, each direction on its own: AdaMine's adaptive mean (arXiv:1804.11146).

    Shape:
        a, b (B, D); row i of a belongs to row i of b -> scalar. One pair alone has no negative and costs 0.
    """
    similarity = cosine_matrix(a, b)
    positive = similarity.diagonal()
    ways = [(margin + similarity - own).clamp(min=0) for own in (positive[:, None], positive[None, :])]
    if mining == "all":
        # The diagonal is margin in both, whatever the embeddings: a constant, taken off without a mask.
        return (ways[0] + ways[1]).mean() - 2 * margin / len(a)
    itself = torch.eye(len(a), dtype=torch.bool, device=a.device)
    hinges = [way.masked_fill(itself, 0) for way in ways]
    if mining == "hardest":
        return hinges[0].amax(1).mean() + hinges[1].amax(0).mean()
    if mining == "non_zero":
        return sum(hinge.sum() / (hinge > 0).sum().clamp(min=1) for hinge in hinges)
    raise ValueError(f"mining {mining!r}: choose {', '.join(MINING)}")
