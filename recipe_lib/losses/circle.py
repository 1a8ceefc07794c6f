"""Circle loss over the pairs of a batch (Sun et al., arXiv:2002.10857), as DAR takes it (arXiv:2312.04763)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def circle_loss(
    a: Tensor, b: Tensor, *, margin: float = 0.25, gamma: float = 32.0, both: bool = True, pooled: bool = False
) -> Tensor:
    """A pair far from where it should be weighs more than one that is almost there; weights detached.

    For a query with similarity c_p to its own and c_n to the others, m the margin,
    log[1 + sum_n exp(gamma [c_n + m]_+ (c_n - m)) * sum_p exp(gamma [1 + m - c_p]_+ (1 - m - c_p))],
    the mean over the queries of a plus the mean over the queries of b.

    Args:
        both: each row of a and each row of b asks; else the rows of a alone.
        pooled: as the released code: no mean over queries but one logarithm a direction, over all positives and half
            of the negatives (those above the diagonal of a -> b, below it for b -> a). It grows with the batch.

    Shape:
        a, b (B, D); row i of a belongs to row i of b -> scalar. One pair alone has no negative and costs 0.
    """
    with torch.autocast(a.device.type, enabled=False):  # exp(gamma s) turns 8 bits of mantissa into noise
        similarity = F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T  # (B, B)
    own = similarity.diagonal()
    positive = gamma * (1 + margin - own).detach().clamp(min=0) * (1 - margin - own)  # (B,)
    negative = gamma * (similarity + margin).detach().clamp(min=0) * (similarity - margin)  # (B, B)
    directions = [negative, negative.T] if both else [negative]
    # Products of sums of exp are sums of their logarithms: nothing overflows, whatever gamma.
    if pooled:
        half = torch.ones_like(similarity, dtype=torch.bool).triu(1)
        terms = [positive.logsumexp(0) + _log_sum_exp(logits, half).logsumexp(0) for logits in directions]
    else:
        others = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
        terms = [positive + _log_sum_exp(logits, others) for logits in directions]
    return sum(F.softplus(term).mean() for term in terms)


def _log_sum_exp(logits: Tensor, mask: Tensor) -> Tensor:
    """(B,): over the cells of each row where `mask` is True; -inf for a row without any."""
    return logits.masked_fill(~mask, -torch.inf).logsumexp(1)
