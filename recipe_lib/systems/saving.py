"""A trained system in a folder: weights as safetensors, architecture as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from recipe_lib.paths import atomic_write_text
from recipe_lib.systems.base import RetrievalSystem, SystemConfig


def save_system(system: RetrievalSystem, folder: Path) -> None:
    """Write model.safetensors and system.json."""
    weights = {k: v.contiguous() for k, v in system.state_dict().items()}
    partial = folder / "model.partial"
    save_file(weights, partial)
    os.replace(partial, folder / "model.safetensors")
    atomic_write_text(folder / "system.json", json.dumps(system.config.to_dict(), indent=1))


def load_system(folder: Path) -> RetrievalSystem:
    """The system that `train` left in `folder`, in evaluation mode.

    Raises:
        FileNotFoundError: nothing was trained there.
    """
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: no trained system here; run the training notebook of this study first")
    values = json.loads((folder / "system.json").read_text())
    # Every weight comes from the file: nothing is to be fetched.
    system = RetrievalSystem(SystemConfig.from_dict(values | {"pretrained": False}))
    system.load_state_dict(load_file(folder / "model.safetensors"))
    return system.eval()
