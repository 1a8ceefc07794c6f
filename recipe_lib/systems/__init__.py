"""Retrieval systems, one file each; `registry` finds them. This list needs no torch."""

from __future__ import annotations

from pathlib import Path

_NOT_SYSTEMS = {"__init__", "attach", "base", "games", "published", "recurrent", "registry", "saving"}


def methods() -> list[str]:
    """Names of the systems of this package: one file each."""
    return sorted({path.stem for path in Path(__file__).parent.glob("*.py")} - _NOT_SYSTEMS)
