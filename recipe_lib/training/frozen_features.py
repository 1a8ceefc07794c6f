"""What a frozen photo backbone makes of photos: computed once, kept, and trained on in place of pixels.

A random crop cannot be computed beforehand, so of each recipe some views are: crop, flip, choice among its photos and
augmentation as a training epoch would draw them. Training then draws among the views. Photos with the surroundings of
others are further views. The files lie beside the studies, in outputs/frozen, named after all they follow from: seeds,
variants and studies of the same photos and weights share them, and whoever needs the space may delete them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from recipe_lib import devices
from recipe_lib.data.loading import Draw, StudyDataset
from recipe_lib.encoders.weights import weights_digest
from recipe_lib.paths import frozen_dir
from recipe_lib.progress import progress
from recipe_lib.reachable import code_digest, digest
from recipe_lib.systems.base import System

BATCH = 64  # photos encoded together; a lender of surroundings is another one of them


def with_features(system: System, dataset: StudyDataset, precision: str = "32-true") -> StudyDataset:
    """The dataset, which gives features in place of photos where the system's parameter `frozen_views` says so.

    Args:
        precision: of training; features are made as its steps would make them.
    """
    views = system.config.frozen_views if dataset.augment else 1
    if system.config.frozen_views and dataset.split.sha256:
        shares = (0.0, 1.0) if dataset.swap else (0.0,)
        dataset.features = [_features(system, dataset, views, share, precision) for share in shares]
    return dataset


@torch.no_grad()
def _features(system: System, dataset: StudyDataset, views: int, swap: float, precision: str) -> np.ndarray:
    """(pairs, views, C, h, w) float16 on the disk: view v is what the dataset would draw in epoch v with seed 0."""
    drawn, split, encoder = copy(dataset), dataset.split, system.image_encoder
    drawn.seed, drawn.swap = 0, swap
    drawing = [drawn.crop, drawn.augment, drawn.choose, drawn.policy and drawn.policy.name]
    if swap:
        drawing += [drawn.swap_radius, split.extras.get("segments", {}).get("sha256")]
        drawing += [] if drawn.swap_strata is None else [drawn.swap_strata.tolist()]
    weights = weights_digest({name: x for name, x in encoder.state_dict().items() if not name.startswith("fc.")})
    code = code_digest(StudyDataset, type(encoder))
    model = [system.config.image_model, list(system.config.image_model_args)]  # what no weight tells, as a stride
    path = frozen_dir() / f"{split.name}-{digest([split.sha256, views, precision, drawing, model, weights, code])}.npy"
    with _one_writer(path):
        if not path.is_file():
            _write(encoder.to(devices.device()).eval(), drawn, views, precision, path)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _write(encoder: nn.Module, dataset: StudyDataset, views: int, precision: str, path: Path) -> None:
    device, kept, rows = devices.device(), None, len(dataset)
    partial = path.with_suffix(".partial")
    steps = [(view, start) for view in range(views) for start in range(0, rows, BATCH)]
    for view, start in progress(steps, f"frozen features of {dataset.split.name}"):
        images, _ = dataset.photos(Draw(np.arange(start, min(rows, start + BATCH)), True, view))
        with torch.autocast(device, torch.bfloat16 if "bf16" in precision else torch.float16, "mixed" in precision):
            features = encoder.features(images.to(device)).to(torch.float16).cpu().numpy()
        if kept is None:
            kept = np.lib.format.open_memmap(partial, "w+", np.float16, (rows, views, *features.shape[1:]))
        kept[start : start + BATCH, view] = features
    kept.flush()
    os.replace(partial, path)


@contextmanager
def _one_writer(path: Path) -> Iterator[None]:
    """Studies that run beside each other want the same features: one computes, the others wait."""
    with open(path.with_name(f".{path.stem}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
