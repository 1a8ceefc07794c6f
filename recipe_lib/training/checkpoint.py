"""Checkpoints after every epoch and, by time or when a signal asks for one, inside it: one file, renamed into place.

A run that goes on from either ends with the numbers of one that was never stopped (on CPUs, bit for bit).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from recipe_lib.training.stopping import Stop

if TYPE_CHECKING:
    from recipe_lib.training.fit import TrainingConfig, TrainingTask

AGREE = 10  # steps after which several processes ask each other whether it is time


def best_epoch(scores: Sequence[float], select_by: str) -> int:
    """Position of the first of the best scores: the highest recall, or the lowest median rank."""
    return min(range(len(scores)), key=lambda epoch: worse(select_by) * scores[epoch])


def worse(select_by: str) -> int:
    """1 where a higher score is a worse one, else -1."""
    return 1 if select_by.endswith("medr") else -1


def place(path: Path) -> tuple[int, int]:
    """Epoch that a run goes on with, and steps of it that are done, by its checkpoint."""
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    step = state["inside"]["step"] if state.get("inside") else 0
    return state["epoch"] + (not step), step


class EpochCheckpoint(Checkpoint):
    """After each epoch: a row of history, the best weights so far, and all of it in one file.

    One file, renamed into place, cannot disagree with itself: whenever the run dies, the last whole epoch is there
    with its optimizer, its history and the best weights up to it. Inside an epoch the same file also holds its place,
    the state of each process's random numbers and its running figures. Of several processes rank 0 alone writes and
    prints. Training stops after `patience` epochs that were no better; the history says so too, so a killed run counts
    on.

    Args:
        path: of the file.
        stop: signals; when one has come, a checkpoint is written and it is obeyed.
    """

    def __init__(self, path: Path, config: TrainingConfig, stop: Stop):
        self.path, self.config, self.stop = path, config, stop
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self._inside: dict[str, Any] | None = None
        self._started, self._saved = time.perf_counter(), time.monotonic()

    def scores(self) -> list[float]:
        """Validation score of each epoch."""
        return [row[f"val_{self.config.select_by}"] for row in self.history]

    def _out_of_patience(self) -> bool:
        since = len(self.history) - 1 - best_epoch(self.scores(), self.config.select_by) if self.history else 0
        return 0 < self.config.patience <= since

    def on_train_start(self, trainer: L.Trainer, task: TrainingTask) -> None:
        self.stop.listen()  # Lightning would only raise an error at SIGTERM
        trainer.should_stop |= self._out_of_patience()  # killed between the last checkpoint and the end
        if self._inside:
            task.on_train_epoch_start()  # Lightning begins in the middle, after it
            own, self._inside = self._inside["processes"][trainer.global_rank], None
            self._started = time.perf_counter() - own["seconds"]
            task.running = {name: (total.to(task.device), count) for name, (total, count) in own["running"].items()}
            torch.set_rng_state(own["rng"])
            if own["cuda_rng"] is not None:
                torch.cuda.set_rng_state(own["cuda_rng"])

    def on_train_epoch_start(self, trainer: L.Trainer, task: TrainingTask) -> None:
        self._started = time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether enough time has passed after so many steps of an epoch."""
        return 0 < self.config.checkpoint_minutes * 60 <= time.monotonic() - self._saved

    def on_train_batch_end(self, trainer: L.Trainer, task: TrainingTask, _: Any, batch: Any, batch_idx: int) -> None:
        step = batch_idx + 1
        # The end of the epoch writes its own.
        if step == trainer.num_training_batches or (trainer.world_size > 1 and step % AGREE):
            return
        if self._agreed(trainer, self.due(step) or bool(self.stop.asked)):
            own = {"running": {name: (total.cpu(), count) for name, (total, count) in task.running.items()}}
            own |= {"seconds": time.perf_counter() - self._started, "rng": torch.get_rng_state()}
            own["cuda_rng"] = torch.cuda.get_rng_state() if task.device.type == "cuda" else None
            every = [own] * trainer.world_size
            if trainer.world_size > 1:
                torch.distributed.all_gather_object(every, own)
            self._inside = {"step": step, "processes": every}
            self._save(trainer)
            self._inside = None
            self._obey(trainer)

    def _agreed(self, trainer: L.Trainer, mine: bool) -> bool:
        """Of one mind: a process that saved or stopped alone would leave the others waiting."""
        return trainer.strategy.reduce_boolean_decision(mine, all=False)

    def _save(self, trainer: L.Trainer) -> None:
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial)  # all processes: Lightning gathers, rank 0 writes
        if trainer.is_global_zero:
            os.replace(partial, self.path)
        self._saved = time.monotonic()

    def _obey(self, trainer: L.Trainer) -> None:
        if self._agreed(trainer, bool(self.stop.asked)):
            if trainer.is_global_zero:
                print(f"stopped by a signal; {self.path.name} is written, and the same command goes on", flush=True)
            self.stop.asked = self.stop.asked or signal.SIGUSR1  # where another process was asked
            self.stop.obey()

    def on_train_epoch_end(self, trainer: L.Trainer, task: TrainingTask) -> None:
        row = {"epoch": trainer.current_epoch + 1} | {k: float(v) for k, v in trainer.callback_metrics.items()}
        row["seconds"] = round(time.perf_counter() - self._started, 2)
        self.history.append(row)
        if trainer.is_global_zero and best_epoch(self.scores(), self.config.select_by) == len(self.history) - 1:
            self.best = {k: v.detach().cpu().clone() for k, v in task.system.trained_state().items()}
        self._save(trainer)
        if trainer.is_global_zero:
            print(
                f"epoch {row['epoch']:>3}/{self.config.epochs}  retrieval loss {row['retrieval']:.4f}  "
                f"val {self.config.select_by} {self.scores()[-1]:.3f}  {row['seconds']:.1f} s",
                flush=True,
            )
            for remark in task.system.remarks(row):
                print(f"           {remark}", flush=True)
        self._obey(trainer)
        trainer.should_stop |= self._agreed(trainer, self._out_of_patience())

    def state_dict(self) -> dict:
        return {"history": self.history, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.history, self.best = state["history"], state["best"]

    def on_save_checkpoint(self, trainer: L.Trainer, task: TrainingTask, checkpoint: dict) -> None:
        checkpoint["inside"] = self._inside

    def on_load_checkpoint(self, trainer: L.Trainer, task: TrainingTask, checkpoint: dict) -> None:
        self._inside = checkpoint.get("inside")
