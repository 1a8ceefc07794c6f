"""Training by Lightning: one checkpoint file per epoch, resume with the same numbers, best weights by validation score.

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
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from timm.layers import convert_sync_batchnorm
from torch import Tensor
from torch.utils.data import DataLoader

from recipe_lib import devices, previous
from recipe_lib.data.batches import neighbours, strata
from recipe_lib.data.loading import Batch, InOrder, PairedBatches, StudyDataset, loader
from recipe_lib.data.store import TEXT_ONLY, Store
from recipe_lib.losses import circle_loss, triplet_loss
from recipe_lib.paths import atomic_write_text
from recipe_lib.reachable import code_digest
from recipe_lib.retrieval.metrics import evaluate, mean_cosine
from recipe_lib.systems.base import Step, System
from recipe_lib.systems.registry import code_of
from recipe_lib.systems.saving import save_system, saved_state
from recipe_lib.training import distributed
from recipe_lib.training.checkpoint import EpochCheckpoint, best_epoch, place
from recipe_lib.training.checkpoint import worse as _worse
from recipe_lib.training.frozen_features import with_features
from recipe_lib.training.loggers import close, make_logger
from recipe_lib.training.segment_features import load_features, segment_features
from recipe_lib.training.stopping import Stop
from recipe_lib.training.watching import EpochProgress

__all__ = ["best_epoch"]  # for the notebooks, beside what is defined here


@dataclass(frozen=True)
class TrainingConfig:
    """How a system is trained; see the notebooks' parameters for what each value means.

    Args:
        chunk: pairs that are encoded at a time, with the gradients of the whole batch; 0: all. See `encoders.chunks`.
        adam_beta1: decay of the optimizers' mean gradient.
        weights: of the losses, by name; a parameter `x_weight` is that of the loss x. 1 for those that are not in it.
        margin_start, margin_step: see `margin_at`.
        frozen_epochs, alternate: when the photo backbone trains; see `trained_parts`.
        checkpoint_minutes: between two checkpoints inside an epoch; 0: none.
        logger: see `make_logger`.
    """

    epochs: int = 100
    batch_size: int = 128
    chunk: int = 0
    crop_size: int = 224
    optimizer: str = "adam"
    adam_beta1: float = 0.9
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    lr_schedule: str = "step"
    lr_step_epochs: int = 30
    lr_factor: float = 0.1
    warmup_epochs: float = 0.0
    frozen_epochs: int = 0
    alternate: list[int] = field(default_factory=list)
    loss: str = "triplet"
    mining: str = "all"
    margin: float = 0.3
    margin_start: float = 0.0
    margin_step: float = 0.0
    circle_gamma: float = 32.0
    weights: Mapping[str, float] = field(default_factory=lambda: {"classifier": 0.001})
    select_by: str = "i2r_recall_1"
    val_candidates: int = 1000
    patience: int = 0
    first_photo_only: bool = False
    augment: str = ""
    precision: str = "32-true"
    seed: int = 1
    num_workers: int = 0
    devices: int = 1
    num_nodes: int = 1
    checkpoint_minutes: float = 10.0
    logger: str = "csv"

    @classmethod
    def gather(cls, parameters: Mapping[str, Any], **facts: Any) -> TrainingConfig:
        """From a notebook's parameters, by name; every number `x_weight` is a weight; `facts` win.

        Precision "auto" becomes that of this machine; see `devices.precision`.
        """
        named = {f.name: parameters[f.name] for f in fields(cls) if f.name in parameters}
        if "precision" in named:
            named["precision"] = devices.precision(named["precision"])
        return cls(**named | {"weights": _weights(parameters)} | facts)

    def regather(self, parameters: Mapping[str, Any], prefix: str, **facts: Any) -> TrainingConfig:
        """The same but for parameters that are called `prefix` + name, further weights, and `facts`."""
        named = {f.name: parameters[prefix + f.name] for f in fields(self) if prefix + f.name in parameters}
        return replace(self, **named | {"weights": {**self.weights, **_weights(parameters)}} | facts)

    @property
    def world(self) -> int:
        """Processes that train together."""
        return self.devices * self.num_nodes

    def weight(self, loss: str) -> float:
        """Of a loss, by its name."""
        return self.weights.get(loss, 1.0)

    def margin_at(self, epoch: float) -> float:
        """The margin after some epochs: `margin`; with a `margin_step`, min(margin, start + step x epoch)."""
        return min(self.margin, self.margin_start + self.margin_step * int(epoch)) if self.margin_step else self.margin


def _weights(parameters: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.removesuffix("_weight"): float(value)
        for name, value in parameters.items()
        if name.endswith("_weight") and isinstance(value, int | float)
    }


def load_training(folder: Path) -> TrainingConfig:
    """How the system that lies in a folder was trained."""
    return TrainingConfig(**json.loads((folder / "training.json").read_text()))


def pair_loss(config: TrainingConfig, epoch: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss between two sides, (B, D) each, row for row, with the margin of an epoch."""
    margin = config.margin_at(epoch)
    if config.loss == "triplet":
        return partial(triplet_loss, margin=margin, mining=config.mining)
    over = {"circle": "batch", "circle_per_query": "query", "circle_released": "triangle"}[config.loss]
    return partial(circle_loss, margin=margin, gamma=config.circle_gamma, over=over)


def plateaus(scores: Sequence[float], select_by: str, *epochs: int) -> int:
    """How often more than `epochs` epochs in a row were no better than the best before, counted anew after each time.

    The drops of torch's ReduceLROnPlateau with patience `epochs` and threshold 0, from the history alone. Of several
    numbers the first holds until the first drop, and so on; the last holds for all others.
    """
    drops, bad, best = 0, 0, math.inf
    for score in scores:
        cost = _worse(select_by) * score
        bad, best = 0 if cost < best else bad + 1, min(best, cost)
        if bad > epochs[min(drops, len(epochs) - 1)]:
            drops, bad = drops + 1, 0
    return drops


def trained_parts(config: TrainingConfig, done: int, scores: Sequence[float] = ()) -> tuple[bool, bool]:
    """Whether the photo backbone trains, and whether the rest does, after `done` epochs with these scores.

    `frozen_epochs`: the backbone waits so long (AdaMine). `alternate`: the rest trains, and when a score was not better
    for so many epochs, the backbone, and so on in turns (JE).
    """
    if not config.alternate:
        return done >= config.frozen_epochs, True
    turns = plateaus(scores, config.select_by, *(epochs - 1 for epochs in config.alternate))
    return turns % 2 == 1, turns % 2 == 0


def learning_rate(config: TrainingConfig, done: float, scores: Sequence[float] = ()) -> float:
    """Learning rate after `done` epochs, a fraction included, of which the whole ones had these validation scores."""
    if config.lr_schedule == "step":
        return config.learning_rate * config.lr_factor ** (int(done) // config.lr_step_epochs)
    if config.lr_schedule == "plateau":
        return config.learning_rate * config.lr_factor ** plateaus(scores, config.select_by, config.lr_step_epochs)
    warm = min(1.0, (done + 1e-2) / config.warmup_epochs) if config.warmup_epochs else 1.0
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done / config.epochs)))


class TrainingTask(L.LightningModule):
    """Turns of a system's players, their optimizers, and validation.

    One player: one backward pass per step. Several, as in a game: each in its turn, with the others' parameters held
    fixed, so that no gradient of one reaches another.

    Args:
        scores: validation scores of the epochs so far, as the `EpochCheckpoint` has them.
    """

    def __init__(self, system: System, config: TrainingConfig, scores: Callable[[], Sequence[float]] = tuple):
        super().__init__()
        if mining := system.config.debiasing.mining:
            config = replace(config, mining=mining)
        self.system, self.config, self.scores = system, config, scores
        self.automatic_optimization = len(system.players()) == 1
        self.running: dict[str, tuple[Tensor, int]] = {}  # sum over pairs, and pairs, of each figure of this epoch
        self._validated: list[tuple[Tensor, Tensor]] = []

    def _union(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """(B / world, D) parts -> (B, D): the rows of all processes in the order of the whole batch, with gradients.

        Each process then computes the whole loss. Its gradient comes back summed over the processes, of which DDP
        takes the mean: exactly what one process would have found.
        """
        if self.trainer.world_size == 1 or not parts:
            return parts
        rows = self.all_gather(torch.cat(parts, 1), sync_grads=True)  # (world, B / world, sum of D)
        return rows.transpose(0, 1).flatten(0, 1).split([part.shape[1] for part in parts], 1)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        for name in self.system.frozen:  # the system that goes on has them: they are part of its fingerprint
            checkpoint["state_dict"].pop(f"system.{name}", None)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        own = {f"system.{name}": value for name, value in self.system.frozen_state().items()}
        checkpoint["state_dict"] = own | checkpoint["state_dict"]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self._turn("main", batch, batch_idx, {})
        shared: dict[str, Any] = {}
        for player, optimizer in zip(self.system.players(), self.optimizers(), strict=True):
            self.toggle_optimizer(optimizer)
            cost = self._turn(player, batch, batch_idx, shared)
            if cost is not None:
                optimizer.zero_grad()
                self.manual_backward(cost)
                optimizer.step()
            self.untoggle_optimizer(optimizer)
        return None

    def _turn(self, player: str, batch: Batch, batch_idx: int, shared: dict[str, Any]) -> Tensor | None:
        """The weighted sum of a player's losses; None where it has none in this batch."""
        config = self.config
        epoch = self.current_epoch + batch_idx / self.trainer.num_training_batches
        figures: dict[str, Tensor] = {}
        who = {"player": player, "epoch": epoch, "margin": config.margin_at(epoch), "mining": config.mining}
        who |= {"chunk": config.chunk, "shared": shared}
        step = Step(batch, pair_loss(config, epoch), config.weight, self._union, figures.update, **who)
        losses = {name: config.weight(name) * loss for name, loss in self.system.losses(step).items()}
        if batch.images is not None:  # of pairs, so that a row of history is over equally many of each
            for name, value in (figures | losses).items():
                total, count = self.running.get(name, (0.0, 0))
                self.running[name] = (total + value.detach().float() * len(batch.rows), count + len(batch.rows))
        return torch.stack(list(losses.values())).sum() if losses else None

    def on_validation_start(self) -> None:
        if self.trainer.world_size > 1:
            # Statistics of BatchNorm without Sync (CPU) differ; the checkpoint keeps rank 0's, so score those.
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: Batch, _: int) -> None:
        image = self.system.encode_images(batch)
        recipes = self.system.adjusted_recipes(self.system.encode_recipes(batch.recipes).embedding, batch.labels)
        self._validated.append(((image.embedding + image.z).float(), recipes.float()))

    def on_validation_epoch_end(self) -> None:
        sides = self._union(*(torch.cat(side) for side in zip(*self._validated, strict=True)))
        self._validated.clear()
        pairs = len(self.trainer.val_dataloaders.dataset)  # the rows after these fill up the last step
        # The same bags in every epoch of every run: notebook 4 draws its curves beside the baseline's.
        bags = {"candidates": min(pairs, self.config.val_candidates), "bags": 10, "seed": 0}
        sides = [side[:pairs] for side in sides]
        for row in evaluate(*sides, **bags):
            self.log_dict({f"val_{row['direction']}_{k}": row[k] for k in ("recall_1", "recall_10", "medr")})
        self.log_dict(
            {f"val_{name}_cosine": mean_cosine(x) for name, x in zip(("image", "recipe"), sides, strict=True)}
        )

    def on_train_epoch_start(self) -> None:
        # Dropout of an epoch follows from the seed, the epoch and the rank alone, so a resumed run draws the same.
        torch.manual_seed(self.config.seed * 100_003 + self.current_epoch + (self.global_rank << 40))
        if self.config.frozen_epochs or self.config.alternate:
            self.system.train_parts(*trained_parts(self.config, self.current_epoch, self.scores()))

    def on_train_epoch_end(self) -> None:
        means = {name: total / torch.tensor(count, device=self.device) for name, (total, count) in self.running.items()}
        self.log_dict(means, sync_dist=True)
        self.running = {}

    def on_train_batch_start(self, _: Batch, batch_idx: int) -> None:
        done = self.current_epoch + batch_idx / self.trainer.num_training_batches
        rate = learning_rate(self.config, done, self.scores())
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.config.optimizer]
        options = {"lr": self.config.learning_rate, "weight_decay": self.config.weight_decay, "fused": True}
        options["betas"] = (self.config.adam_beta1, 0.999)
        return [kind(parameters, **options) for parameters in self.system.players().values()]


def train(
    system: System, store: Store, config: TrainingConfig, folder: Path, *, kept: Path | None = None
) -> pd.DataFrame:
    """Train, or go on where a killed run of the same fingerprint stopped; one that is finished is not trained again.

    What another training left in the folder moves aside, and comes back when it is asked for again (`previous`).

    Leaves `model.safetensors`, `system.json` (best weights by `select_by`) and `history.csv` in `folder`, and the
    best weights in `system`. With more than one device the processes of `distributed` do the same, and this waits.
    With 0 epochs the system is left as it is.

    Args:
        kept: folder of the baseline, with what several trainings share: features of segments, by `segment_features`,
            and frozen weights; default: `folder`.

    Returns:
        history, a row per epoch.

    Raises:
        RuntimeError: a process on one of several devices failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    moved = previous.claim(folder, fingerprint(system, store, config))
    atomic_write_text(folder / "training.json", json.dumps(asdict(config), indent=1))
    if (folder / "history.csv").is_file():
        print("already trained: the weights are kept")
        return _finished(system, folder)
    if not config.epochs:
        return _as_it_is(system, folder, kept)
    resume = folder / "last.ckpt"
    resume = resume if resume.is_file() else None
    if resume:
        print(f"resuming from {resume.name}")
    elif moved:
        print("what was trained here with other parameters, data or code is moved aside: training starts anew")
    segments = None
    if "segments" in system.reads and system.segment_encoder.adapters is None:
        segments = segment_features(system, store.split("train"), kept or folder)
    if config.world == 1:
        history = fit(system, store, config, folder, resume, segments, kept)
        previous.prune(folder)
        return history
    job = folder / "job"
    shutil.rmtree(job, ignore_errors=True)
    job.mkdir()
    save_system(system, job, kept)
    paths = {"store": store.folder, "folder": folder, "resume": resume, "segments": segments, "kept": kept}
    task = {"training": asdict(config)} | {name: path and str(path.resolve()) for name, path in paths.items()}
    atomic_write_text(job / "job.json", json.dumps(task))
    distributed.launch(job.resolve(), config.devices, config.num_nodes)
    shutil.rmtree(job)
    previous.prune(folder)
    return _finished(system, folder)


def _finished(system: System, folder: Path) -> pd.DataFrame:
    """The history that a finished training left, digit for digit; its weights go into the system."""
    system.load_state_dict(saved_state(folder))
    with open(folder / "history.csv", newline="", encoding="utf-8") as file:  # pandas' own reading rounds
        table = csv.DictReader(file)
        rows = [{name: float(value or "nan") for name, value in row.items()} for row in table]
    return pd.DataFrame(rows, columns=table.fieldnames, dtype=float).astype({"epoch": int})


def _as_it_is(system: System, folder: Path, kept: Path | None) -> pd.DataFrame:
    """What no training leaves: the weights as they came, and a history without an epoch."""
    scores = [f"val_{way}_{name}" for way in ("i2r", "r2i") for name in ("recall_1", "recall_10", "medr")]
    scores += ["val_image_cosine", "val_recipe_cosine"]
    columns = ["epoch", "retrieval", "self_supervised", "e_norm", "z_norm", *scores, "seconds"]
    history = pd.DataFrame(columns=columns, dtype=float)
    save_system(system, folder, kept)
    atomic_write_text(folder / "history.csv", history.to_csv(index=False))
    return history


def fit(
    system: System,
    store: Store,
    config: TrainingConfig,
    folder: Path,
    resume: Path | None,
    segments: Path | None = None,
    kept: Path | None = None,
) -> pd.DataFrame:
    """Train in this process, one of `config.world`; see `train`.

    Args:
        resume: checkpoint to go on from.
        segments: file of the training photos' segment features, where the system's segment encoder is frozen.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is free to differ from run to run
    torch.use_deterministic_algorithms(True, warn_only=True)  # on a GPU fused attention has no such backward
    torch.utils.deterministic.fill_uninitialized_memory = False
    if config.world > 1 and devices.device() == "cuda":
        # torch has none for CPUs. timm's, for torch's own drops the activation of timm's BatchNormAct2d.
        system = convert_sync_batchnorm(system).train()  # what is frozen goes back to evaluation mode
    stop = Stop()
    checkpoint = EpochCheckpoint(folder / "last.ckpt", config, stop)
    task = TrainingTask(system, config, checkpoint.scores)
    # The notebook prints one line per epoch; Lightning's banners would drown it.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    watching = EpochProgress(config.epochs, lambda: checkpoint.history)
    trainer = make_trainer(config, folder, [checkpoint, watching], make_logger(config.logger, folder))
    with warnings.catch_warnings():
        # "does not have many workers": the number of workers is a parameter of the run.
        warnings.simplefilter("ignore", PossibleUserWarning)
        # Lightning's own use of torch: nothing that a reader of the notebook could act on.
        warnings.simplefilter("ignore", FutureWarning)
        loaders = _loaders(system, store, config, segments, trainer.global_rank, trainer.world_size)
        if resume:  # worker processes draw their first batches before Lightning says which epoch it is
            epoch, step = place(resume)
            loaders[0].sampler.set_epoch(epoch, step)
        with stop:  # from the first step on there is something to save
            trainer.fit(task, *loaders, ckpt_path=resume, weights_only=True)
    close(trainer.logger)
    history = pd.DataFrame(checkpoint.history)
    if trainer.is_global_zero:
        system.load_state_dict(checkpoint.best | system.frozen_state())
        save_system(system, folder, kept)
        atomic_write_text(folder / "history.csv", history.to_csv(index=False))
    stop.obey()  # a signal that came after the last step
    return history


def validate(system: System, store: Store, config: TrainingConfig, folder: Path) -> dict[str, float]:
    """The validation figures of a system as `train` measures them after an epoch, on one device: a row of history."""
    config, val = replace(config, devices=1, num_nodes=1), store.split("val")
    val_set = with_features(system, StudyDataset(val, config.crop_size), config.precision)
    batches = loader(val_set, InOrder(len(val), config.batch_size), config.num_workers)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        trainer = make_trainer(config, folder, [])
        return trainer.validate(TrainingTask(system, config), batches, verbose=False)[0]


def make_trainer(
    config: TrainingConfig, folder: Path, callbacks: list[Callback], logger: Logger | bool = False
) -> L.Trainer:
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
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the samplers share the batches out themselves
        default_root_dir=folder,
        **together,
    )


def _loaders(
    system: System, store: Store, config: TrainingConfig, segments: Path | None, rank: int, world: int
) -> tuple[DataLoader, DataLoader]:
    pairs, val, attached = store.split("train"), store.split("val"), system.config.debiasing
    # Captions have no components for text-only recipes to train.
    wanted = hasattr(system, "projections") and config.weight("self_supervised") and TEXT_ONLY in store.card["recipes"]
    text = store.split(TEXT_ONLY) if wanted else None
    grouped = strata(pairs, config.seed) if attached.stratified or attached.swap_within else None
    train_set = StudyDataset(
        pairs,
        config.crop_size,
        text_only=text,
        augment=True,
        policy=config.augment,
        first_photo_only=config.first_photo_only,
        seed=config.seed,
        descriptions="descriptions" in system.reads,
        category="category" in system.reads,
        segments=load_features(system, segments) if segments else system.config.segments * ("segments" in system.reads),
        visible=attached.reads_visible,
        swap=attached.context_swap,
        swap_radius=attached.swap_radius,
        swap_strata=grouped if attached.swap_within else None,
    )
    val_set = StudyDataset(val, config.crop_size, visible=attached.reads_visible)
    share = {"rank": rank, "world": world}
    texts = len(text) if text else 0
    batches = PairedBatches(
        len(pairs),
        config.batch_size,
        text_only=texts,
        seed=config.seed,
        strata=grouped if attached.stratified else None,
        stratified=attached.stratified,
        nearest=neighbours(pairs) if attached.hard_negatives else None,
        hard=attached.hard_negatives,
        category=pairs.categories if system.half_of_a_kind and "category" in system.reads else None,
        **share,
    )
    if not len(batches):
        raise ValueError(f"{len(pairs)} training pairs: a batch needs two to hold a negative, and one per device")
    return (
        loader(with_features(system, train_set, config.precision), batches, config.num_workers),
        loader(
            with_features(system, val_set, config.precision),
            InOrder(len(val), config.batch_size, **share),
            config.num_workers,
        ),
    )


# Of these only the number of processes that train together, devices x machines, changes a number.
_NO_NUMBER = ("num_workers", "devices", "num_nodes", "checkpoint_minutes", "logger")


def fingerprint(system: System, store: Store, config: TrainingConfig) -> str:
    """Digest of all that a training follows from: start weights, parameters, data card, the code that trains."""
    counted = {name: value for name, value in asdict(config).items() if name not in _NO_NUMBER}
    own = System if system.config.system_file else type(system)
    code = [code_digest(fit, segment_features, own), code_of(system.config)]
    made_from = [counted | {"world": config.world}, system.config.to_dict(), store.card, code]
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode())
    for name, value in sorted(system.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
