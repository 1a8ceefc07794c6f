"""The device that models run on."""

from __future__ import annotations

import torch


def device() -> str:
    """Either "cuda", where there is such a GPU, or "cpu": Apple's mps has no float64, which ranks are counted in."""
    return "cuda" if torch.cuda.is_available() else "cpu"
