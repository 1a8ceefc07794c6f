"""Curves besides history.csv, through Lightning's loggers; each needs a package of its own."""

from __future__ import annotations

import json
import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

PROJECT = "causal-kitchen"
_PACKAGES = {"tensorboard": "tensorboard>=2.18", "wandb": "wandb", "mlflow": "mlflow"}


def check_logger(kind: str) -> None:
    """ModuleNotFoundError, one line with what to install, where a logger's package is not there."""
    if kind in _PACKAGES and find_spec(kind) is None:
        raise ModuleNotFoundError(
            f"logger {kind}: needs a package that is not installed: pip install '{_PACKAGES[kind]}', or set logger csv"
        )


def make_logger(kind: str, folder: Path) -> Logger | bool:
    """Lightning's logger by name; False for "csv", which history.csv is enough for.

    Args:
        folder: of the training; what the logger leaves goes to `logs/` in it, or where its own settings say.
    """
    if kind == "csv":
        return False
    check_logger(kind)
    run = "-".join([*folder.resolve().parts[-3:], json.loads((folder / "started.json").read_text())["fingerprint"][:8]])
    where = str(folder.resolve() / "logs")
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{where}/mlflow.db"
    name, options = {  # a run that goes on adds to its curves, where the logger can
        "tensorboard": ("TensorBoardLogger", {"save_dir": where, "name": "", "version": run}),
        "wandb": ("WandbLogger", {"project": PROJECT, "name": run, "id": run, "resume": "allow", "save_dir": where}),
        "mlflow": ("MLFlowLogger", {"experiment_name": PROJECT, "run_name": run, "tracking_uri": tracking}),
    }[kind]
    (folder / "logs").mkdir(exist_ok=True)
    return getattr(import_module("lightning.pytorch.loggers"), name)(**options)


def close(logger: Logger | None) -> None:
    """End a logger's run: wandb has one a process, and the next training's is another."""
    if finish := getattr(logger and logger.experiment, "finish", None):
        finish()
