"""Systems by name, imported when they are asked for: an H-T study imports no CLIP."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from torch import Tensor

from recipe_lib.paths import resolve
from recipe_lib.systems import methods
from recipe_lib.systems.base import System, SystemConfig


def system_class(method: str, system_file: str = "") -> type[System]:
    """The class of a system.

    Args:
        method: a file of this folder, or the name of a class in `system_file`, whatever its case.
        system_file: a user's Python file, counted from the repository; it is run.

    Raises:
        ValueError: no such system, in one line.
    """
    if system_file:
        module, where = _user_module(resolve(system_file)), system_file
    elif method in methods():
        module, where = import_module(f"recipe_lib.systems.{method}"), f"{method}.py"
    else:
        raise ValueError(f"method {method!r}: no such system; there are {', '.join(methods())}, or name a system_file")
    own = [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, System) and thing.__module__ == module.__name__
    ]
    for system in own:
        if system.__name__.lower() == method.replace("_", "").lower() or (len(own) == 1 and not system_file):
            return system
    names = ", ".join(system.__name__.lower() for system in own) or "none"
    raise ValueError(f"method {method!r}: {where} has no such subclass of System; it has {names}")


def build(config: SystemConfig, *facts: Tensor | None) -> System:
    """A new system; see `System` for what there is to know. Raises ValueError as `system_class`."""
    return system_class(config.method, config.system_file)(config, *facts)


def code_of(config: SystemConfig) -> str:
    """Digest of a user's system file, "" for a system of this package: `reachable` follows the package alone."""
    if not config.system_file:
        return ""
    return hashlib.sha256(resolve(config.system_file).read_bytes()).hexdigest()


def _user_module(path: Path) -> ModuleType:
    name = f"system_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        if not path.is_file():
            raise ValueError(f"system_file {path}: no such file; name a Python file with a subclass of System")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever a user's file does
            del sys.modules[name]
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"system_file {path}: cannot be imported ({type(error).__name__}: {reason})") from error
    return sys.modules[name]
