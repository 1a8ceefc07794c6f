"""A generator that paints a dish from an embedding: ACME's (arXiv:1905.01273), from StackGAN-v2 (arXiv:1710.10916)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Painted(NamedTuple):
    """pictures (B, 3, S, S) in (-1, 1); mean and log_variance (B, code) of the condition that was painted from."""

    pictures: Tensor
    mean: Tensor
    log_variance: Tensor

    def divergence(self) -> Tensor:
        """(B,) of each row's code from N(0, I): mean over the code of the Kullback-Leibler divergence."""
        mean, log_variance = self.mean.float(), self.log_variance.float()
        return (mean.square() + log_variance.exp() - 1 - log_variance).mean(1) / 2


def doublings(size: int) -> int:
    """How often 4 pixels are doubled up to `size`. ValueError where they are not, or not twice."""
    if size < 16 or size & (size - 1):
        raise ValueError(f"picture: {size}: pictures are 16, 32, 64, 128 ... pixels wide")
    return int(math.log2(size)) - 2


class Generator(nn.Module):
    """Conditioning augmentation, then a map of 4 x 4 that is doubled up to the picture; the condition is read twice.

    A random code around a learnt mean smooths the condition; with noise it becomes the first map, of
    `channels` x 2^(doublings - 1); each doubling halves the channels. Before the last one a second stage reads the
    condition again and refines by two residual blocks. In evaluation mode the code is its mean. The paper's size is
    128 pixels with 64 channels; statistics of BatchNorm are per channel in the first map too.

    Args:
        dim: D, width of the condition.
        size: S, of the pictures: 16, 32, 64, 128 ...
        channels: of a discriminator's first map; see `Discriminator`.
        code, noise: widths.

    Shape:
        condition (B, D) -> Painted.
    """

    def __init__(self, dim: int, size: int = 128, channels: int = 64, *, code: int = 128, noise: int = 100):
        super().__init__()
        steps = doublings(size)
        width = channels * 2 ** (steps - 1)
        self.noise = noise
        self.condition = nn.Sequential(nn.Linear(dim, 4 * code), nn.GLU(1))
        self.first = nn.Linear(code + noise, 2 * width * 16, bias=False)
        self.first_norm = nn.Sequential(nn.BatchNorm2d(2 * width), nn.GLU(1))
        ups = [_double(width >> step, width >> (step + 1)) for step in range(steps - 1)]
        self.stage_1 = nn.Sequential(*ups)
        self.join = _gated(channels + code, channels)
        self.stage_2 = nn.Sequential(_Residual(channels), _Residual(channels), _double(channels, channels // 2))
        self.paint = nn.Sequential(nn.Conv2d(channels // 2, 3, 3, padding=1, bias=False), nn.Tanh())

    def forward(self, condition: Tensor) -> Painted:
        mean, log_variance = self.condition(condition).chunk(2, 1)
        code = mean + (log_variance / 2).exp() * torch.randn_like(mean) if self.training else mean
        noise = torch.randn(len(code), self.noise, device=code.device, dtype=code.dtype)
        x = self.first(torch.cat([code, noise], 1)).unflatten(1, (-1, 4, 4))
        x = self.stage_1(self.first_norm(x))
        x = self.join(torch.cat([x, code[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1))
        return Painted(self.paint(self.stage_2(x)), mean, log_variance)


def _gated(inner: int, outer: int) -> nn.Sequential:
    conv = nn.Conv2d(inner, 2 * outer, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(2 * outer), nn.GLU(1))


def _double(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), *_gated(inner, outer))


class _Residual(nn.Module):
    """x + norm(conv(gated(x)))."""

    def __init__(self, channels: int):
        super().__init__()
        out = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.block = nn.Sequential(*_gated(channels, channels), *out)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)
