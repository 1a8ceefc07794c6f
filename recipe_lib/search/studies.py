"""Which studies there are, and with which of their systems one can search."""

from __future__ import annotations

import json
from pathlib import Path

from recipe_lib.causal.debiasing import Debiasing
from recipe_lib.data.recipe import DataError
from recipe_lib.paths import repo_root, study_dir

NO_TERM = "@no_z"  # after the name of a variant: its causal term is removed, as in results.csv


def study_folder(study: str | Path) -> Path:
    """Folder of a study by its name or path. DataError: nothing was trained there; it names studies that are there."""
    path = Path(study).expanduser()
    named = len(path.parts) == 1 and not path.is_absolute()
    try:
        folder = study_dir(str(study)) if named else path if path.is_dir() else repo_root() / path
    except ValueError as error:
        raise DataError(str(error)) from None
    if not variants_of(folder):
        others = sorted(p.parents[1].name for p in folder.parent.glob("*/02_baseline_training/model.safetensors"))
        there = f"; finished studies: {', '.join(others)}" if others else ""
        raise DataError(f"{folder}: no finished study here; run it first (./run_all.sh makes outputs/kitchen){there}")
    return folder.resolve()


def variants_of(folder: Path) -> dict[str, Path]:
    """What may be searched with, and where it was trained. The oracle may not: nobody tells it the ingredients."""
    trained = {"baseline": folder / "02_baseline_training"}
    trained |= {path.name: path for path in sorted((folder / "04_debiasing_training").glob("*"))}
    variants = {}
    for name, path in trained.items():
        if (path / "model.safetensors").is_file():
            attached = Debiasing.from_dict(json.loads((path / "system.json").read_text())["debiasing"])
            weights = attached.weights
            # Nor one whose recipes carry their own ingredients: those of a typed recipe have no labels.
            if weights not in ("labels", "visible") and attached.sides == "image":
                variants |= {name: path} | ({f"{name}{NO_TERM}": path} if weights else {})
    return variants
