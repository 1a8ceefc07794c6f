"""The device that models run on, and the others that train beside it."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def device() -> str:
    """Either "cuda", where there is such a GPU, or "cpu": Apple's mps has no float64, which ranks are counted in."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_bfloat16(where: str | torch.device) -> bool:
    """Whether a device has units for bfloat16. A CPU without them computes it too, at an eighth of float32's speed."""
    where = torch.device(where)
    if where.type == "cuda":
        return torch.cuda.get_device_capability(where) >= (8, 0)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    return where.type == "cpu" and bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


def precision(wanted: str) -> str:
    """Lightning's name of a precision; "auto" is bf16-mixed where this machine is fast at it, else 32-true."""
    if wanted != "auto":
        return wanted
    return "bf16-mixed" if fast_bfloat16(device()) else "32-true"


def mean_over_devices(value: Tensor) -> Tensor:
    """Mean of a detached number over all processes that train together; one process: the number itself."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    total = value.clone().float()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
