"""The causal module on top of any trained baseline."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from recipe_lib.causal.debiasing import Debiasing
from recipe_lib.systems.base import System
from recipe_lib.systems.registry import build


def attach(
    baseline: System,
    debiasing: Debiasing,
    dictionary: Tensor | None = None,
    prior: Tensor | None = None,
    seen: Tensor | None = None,
) -> System:
    """A new system with the baseline's weights and the debiasing modules on top, freshly initialised.

    Raises:
        RuntimeError: the baseline lacks a weight that is not part of what is attached.
    """
    # The weights come from the baseline: fetching the backbone's published ones again would be waste.
    config = replace(baseline.config, debiasing=debiasing, pretrained=False, image_weights="")
    system = build(config, dictionary, prior, seen)
    parts, buffers = ("classifier.", "adjustment."), ("prior", "seen")
    fresh = {k: v for k, v in system.state_dict().items() if k.startswith(parts) or k in buffers}
    system.load_state_dict(baseline.state_dict() | fresh)
    return system
