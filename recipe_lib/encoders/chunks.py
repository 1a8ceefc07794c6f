"""A batch larger than memory: encoded in chunks, each of which is computed again in the backward pass.

Gradient caching (GradCache, Gao et al., arXiv:2101.06983): a first pass keeps the vectors alone, the loss sees all of
them, and its gradient at the vectors is carried through one chunk after the other, which is encoded again with the same
random numbers. The gradient is that of the whole batch; memory holds one chunk; the price is a second forward pass.
Here the two passes are torch's checkpointing, which replays chunk by chunk from the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

Tree = TypeVar("Tree")


def in_chunks(
    encode: Callable[[slice], Tree], rows: int, chunk: int, *, module: nn.Module, where: torch.device | str
) -> Tree:
    """`encode(slice of the rows)`, of at most `chunk` rows at a time where `chunk` is not 0, put together again.

    BatchNorm normalises within a chunk, as it would on several devices; all else is exact, dropout included.

    Args:
        encode: gives tensors (rows of the slice, ...), None, or tuples and dicts of such.
        module: what encodes; BatchNorm's running statistics in it follow the first pass alone.
        where: the device, whose random numbers are replayed.
    """
    if not 0 < chunk < rows:
        return encode(slice(None))
    parts = -(-rows // chunk)  # of nearly equal size: one row alone has no statistics
    edges = [rows * part // parts for part in range(parts + 1)]
    # torch keeps the state of those devices on which it finds an argument.
    there = torch.empty(0, device=where)
    options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), resting_statistics(module))}
    made = [checkpoint(lambda _, part: encode(part), there, slice(a, b), **options) for a, b in pairwise(edges)]
    return tree_map(_joined, *made)


def _joined(*parts: Tensor | None) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)


@contextmanager
def resting_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by its batch as ever, but its running statistics stay as they are."""
    norms = [(norm, norm.momentum) for norm in module.modules() if isinstance(norm, _BatchNorm)]
    try:
        for norm, _ in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum
