"""Trained weights that are replaced: moved aside, never deleted; taken back when they are wanted again.

A training folder says in `started.json` which training its files belong to. Those of another one move to

    outputs/<study>/.previous/trained/<stage>/[<variant>/]weights-<fingerprint>/

and come back from there when that training is asked for again. When the new training is finished, the one that was
replaced last stays there (the last finished one, if any was) and older ones are deleted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from recipe_lib.paths import atomic_write_text, resolve

# In the order in which they move away: without its history a training is not finished, and what is left of it can
# be told as long as `started.json` is there.
TRAINING = (
    *("history.csv", "model.safetensors", "objectives.safetensors", "frozen.safetensors"),
    *("system.json", "training.json", "last.ckpt", "started.json"),
)


def place(folder: Path) -> Path:
    """Where the replaced trainings of a folder are; below the folder itself where it is not in outputs/."""
    outputs, folder = resolve(os.environ.get("CAUSAL_KITCHEN_OUTPUTS") or "outputs"), folder.resolve()
    if not folder.is_relative_to(outputs) or len(folder.relative_to(outputs).parts) < 2:
        return folder / ".previous"
    study, *inner = folder.relative_to(outputs).parts
    return outputs.joinpath(study, ".previous", "trained", *inner)


def claim(folder: Path, fingerprint: str) -> bool:
    """Make a folder that of one training: files of another one move aside, its own come back.

    Returns:
        files of another training moved.
    """
    there = [name for name in TRAINING if (folder / name).exists()]
    other = bool(there) and _started(folder) != fingerprint
    if other:
        set_aside(folder)
    kept = _kept(folder, fingerprint)
    for name in reversed(TRAINING):
        if (kept / name).exists() and not (folder / name).exists():
            (kept / name).replace(folder / name)
    if kept.is_dir():
        shutil.rmtree(kept)  # empty, but for copies of what is in the folder
    atomic_write_text(folder / "started.json", json.dumps({"fingerprint": fingerprint}))
    return other


def set_aside(folder: Path) -> None:
    """Move a training's files out of its folder."""
    kept = _kept(folder, _started(folder))
    kept.mkdir(parents=True, exist_ok=True)
    for name in TRAINING:
        if (folder / name).exists():
            (folder / name).replace(kept / name)
    os.utime(kept)


def prune(folder: Path) -> None:
    """Of a folder's replaced trainings keep the one that was replaced last: of the finished ones, if there are any."""
    kept = sorted(place(folder).glob("weights-*"), key=lambda path: path.stat().st_mtime_ns)
    finished = [path for path in kept if (path / TRAINING[0]).is_file()]
    for path in kept:
        if path != (finished or kept)[-1]:
            shutil.rmtree(path)


def trainings(folder: Path, wanted: Callable[[Path], bool] = lambda _: True) -> list[Path]:
    """Folders at or below this one that hold a training whose `started.json` is wanted."""
    return [path.parent for path in sorted(folder.rglob("started.json")) if wanted(path)]


def _kept(folder: Path, fingerprint: str) -> Path:
    return place(folder) / f"weights-{fingerprint[:16]}"


def _started(folder: Path) -> str:
    try:
        return json.loads((folder / "started.json").read_text())["fingerprint"]
    except FileNotFoundError:
        return "unknown"
