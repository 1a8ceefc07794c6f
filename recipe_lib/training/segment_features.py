"""Features of photos' segments, computed once for each state of their encoder, and kept."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from recipe_lib import devices
from recipe_lib.data.loading import segment_pixels
from recipe_lib.data.store import Split
from recipe_lib.paths import atomic_write_text
from recipe_lib.progress import progress
from recipe_lib.reachable import code_digest
from recipe_lib.systems.base import System

BATCH = 256  # segments encoded together
FLUSH = 200  # batches that a kill can lose


@torch.no_grad()
def segment_features(system: System, split: Split, folder: Path, *, first_only: bool = False) -> Path:
    """Encode the segments of a split's photos, or find the file of those that are encoded already.

    Args:
        system: with a segment encoder.
        folder: where features are kept, a file for each split and state of tower, adapters and segments.
        first_only: of each recipe's first photo alone.

    Returns:
        .npy file, (photos or recipes, n, E) float32; zero where a photo has fewer than n segments.
    """
    encoder = system.segment_encoder
    counts = split.segment_counts
    photos = split.photo_start[:-1] if first_only else np.arange(len(counts))
    code = code_digest(type(encoder), segment_pixels)
    state = hashlib.sha256(f"{split.extras['segments']['sha256']} {split.name} {first_only} {code}".encode())
    for value in (*encoder.tower.state_dict().values(), *encoder.state_dict().values()):
        state.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    path = folder / f"segments-{split.name}-{state.hexdigest()[:16]}.npy"
    if path.is_file():
        path.touch()  # the runner clears away what no notebook uses any more
        return path
    device = devices.device()
    encoder.to(device).tower.to(device)
    partial = path.with_suffix(".partial")
    shape = (len(photos), max(1, int(counts.max(initial=0))), encoder.tower.dim)
    # An interrupted run goes on: `.rows` says up to where its features are on the disk.
    finished = partial.with_suffix(".rows")
    done = int(finished.read_text()) if partial.is_file() and finished.is_file() else 0
    features = np.lib.format.open_memmap(partial, "r+" if done else "w+", np.float32, None if done else shape)
    step = max(1, BATCH // shape[1])
    steps = range(done, len(photos), step)
    for number, start in enumerate(progress(steps, f"segments of {split.name}")):
        if number and number % FLUSH == 0:
            features.flush()
            atomic_write_text(finished, str(start))
        pixels, mask = segment_pixels(split, photos[start : start + step], shape[1])
        if mask.any():
            encoded = encoder.features(pixels[mask].to(device)).float().cpu().numpy()
            features[start : start + step, : mask.shape[1]][mask.numpy()] = encoded
    features.flush()
    os.replace(partial, path)
    finished.unlink(missing_ok=True)
    return path


def load_features(system: System, path: Path) -> np.ndarray:
    """What `segment_features` left, as many segments of each photo as the system reads; the file stays on disk."""
    return np.load(path, mmap_mode="r", allow_pickle=False)[:, : system.config.segments]
