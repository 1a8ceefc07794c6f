"""A discriminator that tells photos from painted pictures, given the condition (StackGAN-v2, arXiv:1710.10916)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipe_lib.objectives.generator import doublings


class Discriminator(nn.Module):
    """Convolutions of stride 2 down to 4 x 4, one with the condition's code, one logit.

    Args:
        size: S, of the pictures: 16, 32, 64, 128 ...
        channels: of the first map; each halving of the picture doubles them (64 in the paper, 1,024 at the end).
        code: width of the condition's code; 0: none is read.
        categories: a second head tells so many; 0: there is none.

    Shape:
        pictures (B, 3, S, S) in [-1, 1] -> `features` (B, C, 4, 4); with code (B, code) -> logits (B,) that they are
        photos; features -> `category` logits (B, categories).
    """

    def __init__(self, size: int = 128, channels: int = 64, *, code: int = 128, categories: int = 0):
        super().__init__()
        width, layers = channels, [nn.Conv2d(3, channels, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for _ in range(doublings(size) - 1):
            layers += _leaky(nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False))
            width *= 2
        half = width // 2
        self.features = nn.Sequential(*layers, *_leaky(nn.Conv2d(width, half, 3, padding=1, bias=False)))
        self.joint = nn.Sequential(*_leaky(nn.Conv2d(half + code, half, 3, padding=1, bias=False)))
        self.logit = nn.Conv2d(half, 1, 4)
        self.category = nn.Sequential(nn.Flatten(), nn.Linear(16 * half, categories)) if categories else None

    def forward(self, pictures: Tensor, code: Tensor | None = None) -> Tensor:
        return self.judge(self.features(pictures), code)

    def judge(self, features: Tensor, code: Tensor | None = None) -> Tensor:
        """Features of pictures and their condition's code -> logits (B,)."""
        if code is not None:
            features = torch.cat([features, code.to(features.dtype)[:, :, None, None].expand(-1, -1, 4, 4)], 1)
        return self.logit(self.joint(features)).flatten()


def _leaky(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.LeakyReLU(0.2)]


def told_as(logits: Tensor, real: bool) -> Tensor:
    """(B,) logits -> (B,) cross-entropy of each with what it is to be told as."""
    logits = logits.float()
    return F.softplus(-logits if real else logits)


def as_pictures(images: Tensor, size: int) -> Tensor:
    """Photos (B, 3, H, W) uint8 -> (B, 3, size, size) in [-1, 1], as they are painted."""
    photos = images.float() / 127.5 - 1
    return F.interpolate(photos, (size, size), mode="bilinear", antialias=True, align_corners=False).clamp(-1, 1)
