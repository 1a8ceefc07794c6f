"""A trained system in a folder: weights as safetensors, architecture as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from recipe_lib.paths import atomic_write_text
from recipe_lib.systems.base import System, SystemConfig
from recipe_lib.systems.registry import build

OBJECTIVES = "objectives."  # state of what serves training alone


def save_system(system: System, folder: Path) -> None:
    """Write model.safetensors and system.json, and objectives.safetensors where training had modules of its own."""
    state = {name: value.contiguous() for name, value in system.state_dict().items()}
    parts = {"model": {k: v for k, v in state.items() if not k.startswith(OBJECTIVES)}}
    parts["objectives"] = {k: v for k, v in state.items() if k.startswith(OBJECTIVES)}
    for name, weights in parts.items():
        if weights:
            partial = folder / f"{name}.partial"
            save_file(weights, partial)
            os.replace(partial, folder / f"{name}.safetensors")
    atomic_write_text(folder / "system.json", json.dumps(system.config.to_dict(), indent=1))


def saved_state(folder: Path) -> dict[str, Tensor]:
    """Every weight that `save_system` left."""
    objectives = folder / "objectives.safetensors"
    return load_file(folder / "model.safetensors") | (load_file(objectives) if objectives.is_file() else {})


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
