"""Circle loss over the pairs of a batch (Sun et al., arXiv:2002.10857), as DAR takes it (arXiv:2312.04763, Eq. 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recipe_lib.losses.similarity import cosine_matrix


def circle_loss(a: Tensor, b: Tensor, *, margin: float = 0.25, gamma: float = 32.0, over: str = "batch") -> Tensor:
    """A pair far from where it should be weighs more than one that is almost there; weights detached.

    With similarities c_p of positive and c_n of negative pairs, m the margin, for a -> b and for b -> a
    log[1 + sum_n exp(gamma [c_n + m]_+ (c_n - m)) * sum_p exp(gamma [1 + m - c_p]_+ (1 - m - c_p))].

    Args:
        over: which pairs one logarithm holds.
            "batch": those of all queries, B positives and B (B - 1) negatives, as Eq. 6 says. Both directions then have
            the same pairs, and the loss is twice that of one. It grows with log B.
            "query": those of one query, 1 and B - 1; the mean over the queries of each direction.
            "triangle": as the released code, all positives and the negatives above the diagonal for a -> b, those
            below it for b -> a.

    Shape:
        a, b (B, D); row i of a belongs to row i of b -> scalar. One pair alone has no negative and costs 0.
    """
    similarity = cosine_matrix(a, b)  # (B, B); exp(gamma s) would turn fewer bits into noise
    own = similarity.diagonal()
    positive = gamma * (1 + margin - own).detach().clamp(min=0) * (1 - margin - own)  # (B,)
    negative = gamma * (similarity + margin).detach().clamp(min=0) * (similarity - margin)  # (B, B)
    # Products of sums of exp are sums of their logarithms: nothing overflows, whatever gamma.
    others = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    if over == "batch":
        return 2 * F.softplus(positive.logsumexp(0) + _log_sum_exp(negative, others, (0, 1)))
    if over == "query":
        return sum(F.softplus(positive + _log_sum_exp(negative, others, way)).mean() for way in (1, 0))
    if over == "triangle":
        halves = others.triu(), others.tril()
        return sum(F.softplus(positive.logsumexp(0) + _log_sum_exp(negative, half, (0, 1))) for half in halves)
    raise ValueError(f"circle loss over {over!r}: batch, query or triangle")


def _log_sum_exp(logits: Tensor, mask: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Over the cells where `mask` is True; -inf where there is none."""
    return logits.masked_fill(~mask, -torch.inf).logsumexp(dim)
