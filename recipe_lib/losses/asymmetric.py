"""Asymmetric loss for many rare labels (Ridnik et al., arXiv:2009.14119), and what its output means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def asymmetric_loss(
    logits: Tensor, labels: Tensor, gamma_neg: float = 2.0, gamma_pos: float = 0.0, asked: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy with focal weights that are stronger for absent labels; no clipping, weights detached.

    A sample's sum over its K classes is scaled by 1000 / K, so that the weight of the loss does not change its meaning
    with K; then the mean over samples.

    Args:
        asked: weight of each decision, broadcast to (B, K); 0: the classifier is not asked.

    Shape:
        logits (B, K), labels (B, K) in {0, 1} -> scalar.
    """
    logits = logits.float()
    with torch.no_grad():
        p = torch.sigmoid(logits)
        weight = torch.where(labels > 0, (1 - p) ** gamma_pos, p**gamma_neg)
        if asked is not None:
            weight = weight * asked
    loss = weight * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return loss.sum(1).mean() * (1000 / logits.shape[1])


def posterior(logits: Tensor, gamma_neg: float = 2.0, gamma_pos: float = 0.0) -> Tensor:
    """The probability that a logit trained with `asymmetric_loss` stands for.

    With s = sigmoid(logit), the expected gradient is zero where
    pi (1 - s)^(1 + gamma_pos) = (1 - pi) s^(1 + gamma_neg); solved for the true probability pi.
    With gamma- = 2, s = 0.5 means pi = 0.2. With both gammas 0, pi = s.

    Shape:
        any -> same, in [0, 1].
    """
    log_odds = (1 + gamma_neg) * F.logsigmoid(logits) - (1 + gamma_pos) * F.logsigmoid(-logits)
    return torch.sigmoid(log_odds)
