"""Where the study lies: the same answer from papermill (caller's folder), nbval (notebook's folder) and a test."""

from __future__ import annotations

import os
import re
from pathlib import Path
from uuid import uuid4


def _is_root(folder: Path) -> bool:
    return (folder / "notebooks").is_dir() and (folder / "params").is_dir()


def repo_root() -> Path:
    """The repository: CAUSAL_KITCHEN_ROOT, else the nearest folder at or above the current one with notebooks/ and
    params/, else the folder above an editable install.

    Raises:
        FileNotFoundError: none of these is the repository.
    """
    if named := os.environ.get("CAUSAL_KITCHEN_ROOT"):
        candidates = [Path(named).expanduser()]
    else:
        here = Path.cwd()
        candidates = [here, *here.parents, Path(__file__).parent.parent]
    for folder in candidates:
        if _is_root(folder):
            return folder.resolve()
    raise FileNotFoundError(f"{candidates[0]}: no notebooks/ and params/ here or above; go into the repository")


def resolve(path: str | Path) -> Path:
    """A user's path as an absolute one: ~ expanded, relative paths counted from the repository root."""
    return (repo_root() / Path(path).expanduser()).resolve()


def resolve_if_there(name: str) -> str:
    """A file or folder of the user as `resolve` gives it, or the name as it is: that of a published model, say."""
    return str(resolve(name)) if name and resolve(name).exists() else name


def study_dir(study: str) -> Path:
    """Folder of one study's results, outputs/<study>; CAUSAL_KITCHEN_OUTPUTS moves outputs/ elsewhere.

    Raises:
        ValueError: the name is not one plain folder name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", study):
        raise ValueError(f"{study!r} is not a folder name; use letters, digits, '.', '_' and '-', not a leading dot")
    return resolve(os.environ.get("CAUSAL_KITCHEN_OUTPUTS") or "outputs") / study


def frozen_dir() -> Path:
    """Folder of what frozen encoders make of photos and sentences, outputs/frozen, for all studies."""
    path = resolve(os.environ.get("CAUSAL_KITCHEN_OUTPUTS") or "outputs") / "frozen"
    path.mkdir(parents=True, exist_ok=True)
    return path


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, whoever else writes it."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
