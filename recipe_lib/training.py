"""Training by Lightning: one checkpoint file an epoch, resume with the same numbers, best weights by validation R@1.

On several devices every process runs `fit`, the one loop there is; `distributed` starts them and `train` waits.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import lightning as L
import pandas as pd
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from timm.layers import convert_sync_batchnorm
from torch import Tensor
from torch.utils.data import DataLoader

from recipe_lib import devices, distributed, previous
from recipe_lib.data.loading import Batch, InOrder, PairedBatches, StudyDataset, loader
from recipe_lib.data.store import TEXT_ONLY, Store
from recipe_lib.losses import asymmetric_loss, circle_loss, triplet_loss
from recipe_lib.models import RetrievalSystem
from recipe_lib.paths import atomic_write_text
from recipe_lib.reachable import code_digest
from recipe_lib.retrieval import evaluate
from recipe_lib.saving import load_system, save_system
from recipe_lib.segment_features import load_features, segment_features


@dataclass(frozen=True)
class TrainingConfig:
    """How a system is trained; see the notebooks' parameters for what each value means."""

    epochs: int = 100
    batch_size: int = 128
    crop_size: int = 224
    optimizer: str = "adam"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    lr_schedule: str = "step"
    lr_step_epochs: int = 30
    warmup_epochs: float = 0.0
    loss: str = "triplet"
    margin: float = 0.3
    gamma: float = 32.0
    self_supervised_weight: float = 1.0
    segment_weight: float = 1.0
    description_weight: float = 1.0
    classifier_weight: float = 0.001
    select_by: str = "i2r"
    val_candidates: int = 1000
    precision: str = "32-true"
    seed: int = 1
    num_workers: int = 0
    devices: int = 1
    num_nodes: int = 1

    @property
    def world(self) -> int:
        """Processes that train together."""
        return self.devices * self.num_nodes


def pair_loss(config: TrainingConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss between two sides, (B, D) each, row for row; "pooled_circle" is that of DAR's released code."""
    if config.loss == "triplet":
        return partial(triplet_loss, margin=config.margin)
    return partial(circle_loss, margin=config.margin, gamma=config.gamma, pooled=config.loss == "pooled_circle")


def learning_rate(config: TrainingConfig, done: float) -> float:
    """Learning rate after `done` epochs, a fraction included."""
    if config.lr_schedule == "step":
        return config.learning_rate * 0.1 ** (int(done) // config.lr_step_epochs)
    warm = min(1.0, (done + 1e-2) / config.warmup_epochs) if config.warmup_epochs else 1.0
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done / config.epochs)))


class TrainingTask(L.LightningModule):
    """Losses, optimizer and validation of a retrieval system."""

    def __init__(self, system: RetrievalSystem, config: TrainingConfig):
        super().__init__()
        self.system, self.config, self.loss = system, config, pair_loss(config)
        self._found: list[tuple[Tensor, Tensor]] = []

    def _union(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """(B / world, D) parts -> (B, D): the rows of all processes in the order of the whole batch, with gradients.

        Each process then computes the whole loss. Its gradient comes back summed over the processes, of which DDP
        takes the mean: exactly what one process would have found.
        """
        if self.trainer.world_size == 1:
            return parts
        rows = self.all_gather(torch.cat(parts, 1), sync_grads=True)  # (world, B / world, sum of D)
        return rows.transpose(0, 1).flatten(0, 1).split([part.shape[1] for part in parts], 1)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        config, system = self.config, self.system
        recipes = system.encode_recipes(batch.recipes)
        image = None if batch.images is None else system.encode_images(batch.images, batch.labels)
        # Gathered after all encoding: encoders' graphs differ with the lengths of sentences, collectives must not.
        # Nothing more than the losses use: to Adam a gradient of zero is not the same as none.
        sides = {} if image is None else {"image": image.embedding + image.z, "recipe": recipes.embedding}
        if batch.segments is not None:
            sides["segments"] = system.encode_segments(batch.segments, batch.segment_mask)
        if batch.descriptions is not None:
            sides["description"] = system.encode_descriptions(batch.descriptions)
        count = len(recipes.components)
        parts = self._union(*recipes.components, *sides.values())
        sides, losses = dict(zip(sides, parts[count:], strict=True)), {}
        if count:
            found = system.self_supervised_loss(recipes._replace(components=parts[:count]), self.loss)
            losses["self_supervised"] = config.self_supervised_weight * found
        if image is not None:
            losses["retrieval"] = self.loss(sides["image"], sides["recipe"])
            if "segments" in sides:
                losses["segments"] = config.segment_weight * self.loss(sides["segments"], sides["recipe"])
            if "description" in sides:
                losses["descriptions"] = config.description_weight * self.loss(sides["image"], sides["description"])
            if image.logits is not None:
                # Of this process's photos alone: the mean of equally large means is the mean.
                found = asymmetric_loss(
                    image.logits, batch.labels, system.config.debiasing.gamma_neg, system.config.debiasing.gamma_pos
                )
                losses["classifier"] = config.classifier_weight * found
            norms = {"e_norm": image.embedding.norm(dim=1).mean(), "z_norm": image.z.norm(dim=1).mean()}
            how = {"on_step": False, "on_epoch": True, "batch_size": len(batch.rows), "sync_dist": True}
            self.log_dict(norms, **how)
            self.log_dict(losses, **how)
        return torch.stack(list(losses.values())).sum()

    def on_validation_start(self) -> None:
        if self.trainer.world_size > 1:
            # Statistics of BatchNorm without Sync (CPU) differ; the checkpoint keeps rank 0's, so score those.
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: Batch, _: int) -> None:
        image = self.system.encode_images(batch.images, batch.labels)
        self._found.append(
            ((image.embedding + image.z).float(), self.system.encode_recipes(batch.recipes).embedding.float())
        )

    def on_validation_epoch_end(self) -> None:
        sides = self._union(*(torch.cat(side) for side in zip(*self._found, strict=True)))
        self._found.clear()
        pairs = len(self.trainer.val_dataloaders.dataset)  # the rows after these fill up the last step
        # The same bags in every epoch of every run: notebook 4 draws its curves beside the baseline's.
        bags = {"candidates": min(pairs, self.config.val_candidates), "bags": 10, "seed": 0}
        for found in evaluate(*(side[:pairs] for side in sides), **bags):
            self.log_dict({f"val_{found['direction']}_{k}": found[k] for k in ("recall_1", "recall_10", "medr")})

    def on_train_epoch_start(self) -> None:
        # Dropout of an epoch follows from the seed, the epoch and the rank alone, so a resumed run draws the same.
        torch.manual_seed(self.config.seed * 100_003 + self.current_epoch + (self.global_rank << 40))

    def on_train_batch_start(self, _: Batch, batch_idx: int) -> None:
        rate = learning_rate(self.config, self.current_epoch + batch_idx / self.trainer.num_training_batches)
        for group in self.optimizers().param_groups:
            group["lr"] = rate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.config.optimizer]
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return kind(trained, lr=self.config.learning_rate, weight_decay=self.config.weight_decay, fused=True)


class Recorder(Checkpoint):
    """After each epoch: a row of history, the best weights so far, and all of it in one file.

    One file, renamed into place, cannot disagree with itself: whenever the run dies, the last whole epoch is there
    with its optimizer, its history and the best weights up to it. Of several processes rank 0 alone writes and prints.
    """

    def __init__(self, path: Path, config: TrainingConfig):
        self.path, self.config = path, config
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self._started = time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, task: TrainingTask) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, task: TrainingTask) -> None:
        row = {"epoch": trainer.current_epoch + 1} | {k: float(v) for k, v in trainer.callback_metrics.items()}
        row["seconds"] = round(time.perf_counter() - self._started, 2)
        key = f"val_{self.config.select_by}_recall_1"
        if trainer.is_global_zero and (not self.history or row[key] > max(past[key] for past in self.history)):
            self.best = {k: v.detach().cpu().clone() for k, v in task.system.state_dict().items()}
        self.history.append(row)
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial)  # all processes: Lightning gathers, rank 0 writes
        if trainer.is_global_zero:
            os.replace(partial, self.path)
            print(
                f"epoch {row['epoch']:>3}/{self.config.epochs}  retrieval loss {row['retrieval']:.4f}  "
                f"val {self.config.select_by} R@1 {row[key]:.3f}  {row['seconds']:.1f} s",
                flush=True,
            )

    def state_dict(self) -> dict:
        return {"history": self.history, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.history, self.best = state["history"], state["best"]


def train(
    system: RetrievalSystem, store: Store, config: TrainingConfig, folder: Path, *, kept: Path | None = None
) -> pd.DataFrame:
    """Train, or go on where a killed run of the same fingerprint stopped; one that is finished is not trained again.

    What another training left in the folder moves aside, and comes back when it is asked for again (`previous`).

    Leaves `model.safetensors`, `system.json` (best weights by validation R@1) and `history.csv` in `folder`, and the
    best weights in `system`. With more than one device the processes of `distributed` do the same, and this waits.

    Args:
        kept: folder of what several trainings share: features of segments, by `segment_features`; default: `folder`.

    Returns:
        history, a row an epoch.

    Raises:
        RuntimeError: a process on one of several devices failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    moved = previous.claim(folder, fingerprint(system, store, config))
    if (folder / "history.csv").is_file():
        print("already trained: the weights are kept")
        return _finished(system, folder)
    resume = folder / "last.ckpt"
    resume = resume if resume.is_file() else None
    if resume:
        print(f"resuming from {resume.name}")
    elif moved:
        print("what was trained here with other parameters, data or code is moved aside: training starts anew")
    segments = None
    if system.segment_encoder is not None:
        segments = segment_features(system, store.split("train"), kept or folder)
    if config.world == 1:
        history = fit(system, store, config, folder, resume, segments)
        previous.prune(folder)
        return history
    job = folder / "job"
    shutil.rmtree(job, ignore_errors=True)
    job.mkdir()
    save_system(system, job)
    paths = {"store": store.folder, "folder": folder, "resume": resume, "segments": segments}
    task = {"training": asdict(config)} | {name: path and str(path.resolve()) for name, path in paths.items()}
    atomic_write_text(job / "job.json", json.dumps(task))
    distributed.launch(job.resolve(), config.devices, config.num_nodes)
    shutil.rmtree(job)
    previous.prune(folder)
    return _finished(system, folder)


def _finished(system: RetrievalSystem, folder: Path) -> pd.DataFrame:
    """The history that a finished training left, digit for digit; its weights go into the system."""
    system.load_state_dict(load_file(folder / "model.safetensors"))
    with open(folder / "history.csv", newline="", encoding="utf-8") as file:  # pandas' own reading rounds
        rows = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
    return pd.DataFrame(rows).astype({"epoch": int})


def fit_job(job: Path) -> None:
    """What each of several processes does of the job that `train` wrote."""
    task = json.loads((job / "job.json").read_text())
    store, folder, resume, segments = (
        Path(task[name]) if task[name] else None for name in ("store", "folder", "resume", "segments")
    )
    fit(load_system(job).train(), Store(store), TrainingConfig(**task["training"]), folder, resume, segments)


def fit(
    system: RetrievalSystem,
    store: Store,
    config: TrainingConfig,
    folder: Path,
    resume: Path | None,
    segments: Path | None = None,
) -> pd.DataFrame:
    """Train in this process, one of `config.world`; see `train`.

    Args:
        resume: checkpoint to go on from.
        segments: file of the training photos' segment features, where the system encodes segments.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is free to differ from run to run
    torch.use_deterministic_algorithms(True, warn_only=True)  # on a GPU fused attention has no such backward
    torch.utils.deterministic.fill_uninitialized_memory = False
    if config.world > 1 and devices.device() == "cuda":
        # torch has none for CPUs. timm's, for torch's own drops the activation of timm's BatchNormAct2d.
        system = convert_sync_batchnorm(system)
    recorder = Recorder(folder / "last.ckpt", config)
    task = TrainingTask(system, config)
    # The notebook prints one line an epoch; Lightning's banners would drown it.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = make_trainer(config, folder, [recorder])
    with warnings.catch_warnings():
        # "does not have many workers": the number of workers is a parameter of the run.
        warnings.simplefilter("ignore", PossibleUserWarning)
        # Lightning's own use of torch: nothing that a reader of the notebook could act on.
        warnings.simplefilter("ignore", FutureWarning)
        loaders = _loaders(system, store, config, segments, trainer.global_rank, trainer.world_size)
        trainer.fit(task, *loaders, ckpt_path=resume, weights_only=True)
    history = pd.DataFrame(recorder.history)
    if trainer.is_global_zero:
        system.load_state_dict(recorder.best)
        save_system(system, folder)
        atomic_write_text(folder / "history.csv", history.to_csv(index=False))
    return history


def make_trainer(config: TrainingConfig, folder: Path, callbacks: list[Callback]) -> L.Trainer:
    """Lightning's Trainer in this process, alone or one of those that torchrun started."""
    together: dict = {"plugins": [LightningEnvironment()]}  # whatever scheduler it runs under
    if config.world > 1:
        together = {
            "plugins": [TorchElasticEnvironment()],
            # A text-only batch leaves the image encoder unused.
            "strategy": DDPStrategy(find_unused_parameters=True),
        }
    return L.Trainer(
        accelerator=devices.device(),
        max_epochs=config.epochs,
        precision=config.precision,
        devices=config.devices,
        num_nodes=config.num_nodes,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the samplers share the batches out themselves
        default_root_dir=folder,
        **together,
    )


def _loaders(
    system: RetrievalSystem, store: Store, config: TrainingConfig, segments: Path | None, rank: int, world: int
) -> tuple[DataLoader, DataLoader]:
    pairs, val = store.split("train"), store.split("val")
    # Captions have no components for text-only recipes to train.
    wanted = system.projections and config.self_supervised_weight and TEXT_ONLY in store.card["recipes"]
    text = store.split(TEXT_ONLY) if wanted else None
    train_set = StudyDataset(
        pairs,
        config.crop_size,
        text_only=text,
        augment=True,
        seed=config.seed,
        descriptions=system.description_encoder is not None,
        segments=None if segments is None else load_features(system, segments),
    )
    share = {"rank": rank, "world": world}
    texts = len(text) if text else 0
    batches = PairedBatches(len(pairs), config.batch_size, text_only=texts, seed=config.seed, **share)
    if not len(batches):
        raise ValueError(f"{len(pairs)} training pairs: a batch needs two to hold a negative, and one a device")
    return (
        loader(train_set, batches, config.num_workers),
        loader(StudyDataset(val, config.crop_size), InOrder(len(val), config.batch_size, **share), config.num_workers),
    )


# Of these only the number of processes that train together, devices x machines, changes a number.
_NO_NUMBER = ("num_workers", "devices", "num_nodes")


def fingerprint(system: RetrievalSystem, store: Store, config: TrainingConfig) -> str:
    """Digest of all that a training follows from: start weights, parameters, data card, the code that trains."""
    counted = {name: value for name, value in asdict(config).items() if name not in _NO_NUMBER}
    code = code_digest(fit, segment_features, type(system))
    made_from = [counted | {"world": config.world}, system.config.to_dict(), store.card, code]
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode())
    for name, value in sorted(system.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
