"""A trained system in a folder: weights as safetensors, architecture as JSON.

What never trains is a file of its own, frozen.safetensors, and on the disk but once in a study: the variants' are hard
links to the baseline's. A folder is still whole by itself, wherever it is copied.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipe_lib.encoders.weights import weights_digest
from recipe_lib.paths import atomic_write_text
from recipe_lib.systems.base import System, SystemConfig
from recipe_lib.systems.registry import build

OBJECTIVES = "objectives."  # state of what serves training alone
FROZEN = "frozen.safetensors"


def save_system(system: System, folder: Path, baseline: Path | None = None) -> None:
    """Write model.safetensors and system.json; objectives.safetensors and frozen.safetensors where there are such.

    Args:
        baseline: folder of a saved system; where it has the same frozen weights, its file is linked.
    """
    trained, frozen = system.trained_state(), system.frozen_state()
    digest = {"frozen": weights_digest(frozen)} if frozen else None
    if frozen:
        _frozen_file(frozen, digest, folder, baseline)
    _write({k: v for k, v in trained.items() if not k.startswith(OBJECTIVES)}, folder / "model.safetensors", digest)
    if objectives := {k: v for k, v in trained.items() if k.startswith(OBJECTIVES)}:
        _write(objectives, folder / "objectives.safetensors")
    atomic_write_text(folder / "system.json", json.dumps(system.config.to_dict(), indent=1))


def _write(weights: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    partial = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in weights.items()}, partial, metadata)
    os.replace(partial, path)


def _frozen_file(frozen: dict[str, Tensor], digest: dict[str, str], folder: Path, baseline: Path | None) -> None:
    path = folder / FROZEN
    if baseline and (baseline / FROZEN).is_file() and _metadata(baseline / FROZEN) == digest:
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        try:
            os.link(baseline / FROZEN, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(baseline / FROZEN, partial)
        os.replace(partial, path)
    elif not path.is_file() or _metadata(path) != digest:
        _write(frozen, path, digest)


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def saved_state(folder: Path) -> dict[str, Tensor]:
    """Every weight that `save_system` left.

    Raises:
        FileNotFoundError: the frozen ones are not there.
        ValueError: they belong to another system.
    """
    model = folder / "model.safetensors"
    state = load_file(model)
    if (wanted := _metadata(model)).get("frozen"):
        if _metadata(folder / FROZEN) != wanted:
            raise ValueError(f"{folder / FROZEN}: not the frozen weights of model.safetensors; copy both together")
        state |= load_file(folder / FROZEN)
    objectives = folder / "objectives.safetensors"
    return state | (load_file(objectives) if objectives.is_file() else {})


def load_system(folder: Path) -> System:
    """The system that `train` left in `folder`, in evaluation mode.

    Raises:
        FileNotFoundError: nothing was trained there.
    """
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: no trained system here; run the training notebook of this study first")
    values = json.loads((folder / "system.json").read_text())
    # Every weight comes from the file: nothing is to be fetched.
    system = build(SystemConfig.from_dict(values | {"pretrained": False, "image_weights": ""}))
    system.load_state_dict(saved_state(folder))
    return system.eval()
