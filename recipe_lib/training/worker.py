"""What torchrun starts: one process of several that train together, on the job that `fit.train` wrote."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from recipe_lib.data.store import Store
from recipe_lib.systems.saving import load_system
from recipe_lib.training.distributed import die_with_parent
from recipe_lib.training.fit import TrainingConfig, fit


def fit_job(job: Path) -> None:
    """This process's part of a job."""
    task = json.loads((job / "job.json").read_text())
    store, *paths = (
        Path(task[name]) if task[name] else None for name in ("store", "folder", "resume", "segments", "kept")
    )
    fit(load_system(job).train(), Store(store), TrainingConfig(**task["training"]), *paths)


def main(job: Path) -> None:
    """Do the job; an error is noted in it for the process that waits, and raised."""
    try:
        fit_job(job)
    except BaseException as error:
        with open(job / "errors.txt", "a", encoding="utf-8") as log:
            what = " ".join(str(error).split())[:400]
            print(f"rank {os.environ['RANK']}: {type(error).__name__}: {what}", file=log)
        raise


if __name__ == "__main__":
    die_with_parent()
    main(Path(sys.argv[1]))
