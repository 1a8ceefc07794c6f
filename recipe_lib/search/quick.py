"""What makes a command start fast."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def quick_imports() -> Iterator[None]:
    """While it lasts, nothing is collected, and imports get an empty stand-in for torch's compiler.

    Its import takes as long as torch's. timm and torchvision ask for it for decorators that matter to compiled models
    alone; no system here is compiled. Afterwards it is imported as ever, where something asks for it.
    """
    collecting = gc.isenabled()
    gc.disable()  # of what an import makes nothing is garbage; looking for some takes a sixth of the time
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
        if collecting:
            gc.enable()
