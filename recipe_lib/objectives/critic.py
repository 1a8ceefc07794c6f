"""A critic that tells two modalities apart (Wasserstein GAN with gradient penalty, Gulrajani et al., arXiv:1704.00028).

ACME (arXiv:1905.01273) aligns photos and recipes by it: the critic scores photos high and recipes low, and the recipe
encoder raises the score of its recipes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class ModalityCritic(nn.Module):
    """Linear layers D -> D / 2 -> D / 4 -> 1 with LeakyReLU .2, in float32 whatever the precision around it.

    Shape:
        embeddings (B, D) -> scores (B,), unbounded.
    """

    def __init__(self, dim: int):
        super().__init__()
        widths = (dim, max(1, dim // 2), max(1, dim // 4))
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.layers(embeddings.to(self.layers[0].weight.dtype))[:, 0]


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, share: Tensor | None = None) -> Tensor:
    """Mean of (|gradient of the score| - 1)^2 at random points between the two, row by row.

    Args:
        share: (B, 1) of `real` in each point, 0..1; drawn where it is not given.

    Shape:
        real, fake (B, D), detached -> scalar.
    """
    if share is None:
        share = torch.rand(len(real), 1, device=real.device, dtype=real.dtype)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, penalty: float = 10.0) -> tuple[Tensor, Tensor, Tensor]:
    """What the critic lowers: -E score(real) + E score(fake) + penalty x `gradient_penalty`. Nothing reaches the rows.

    Shape:
        real, fake (B, D) -> loss, E score(real) - E score(fake), gradient penalty; scalars, the last two detached.
    """
    real, fake = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (real, fake))
    gap, slope = critic(real).mean() - critic(fake).mean(), gradient_penalty(critic, real, fake)
    return penalty * slope - gap, gap.detach(), slope.detach()
