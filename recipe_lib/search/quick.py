"""What makes a command start fast."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def without_compiler() -> Iterator[None]:
    """While it lasts, imports get an empty stand-in for torch's compiler, which takes as long to import as torch.

    timm and torchvision import it for decorators that matter to compiled models alone; no system here is compiled.
    Afterwards it is imported as ever, where something asks for it.
    """
    import torch  # noqa: F401  (without the stand-in: torch's own import does not touch its compiler)

    def decorator(function=None, *_, **__):
        return function or decorator

    def attribute(name: str):
        if name.startswith("__"):  # whoever looks into every module, as `inspect` does
            raise AttributeError(name)
        return decorator

    names = [name for name in ("torch._dynamo", "torch._dynamo.utils") if "torch._dynamo" not in sys.modules]
    for name in names:
        stand_in = ModuleType(name)
        stand_in.__path__, stand_in.__getattr__ = [], attribute
        sys.modules[name] = stand_in
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
