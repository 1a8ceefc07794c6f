"""Lines inside epochs that last, and near the start of a training how long it will take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from recipe_lib.progress import Meter, lasting

CURVE = 50  # steps between two points of a logger's curves inside epochs


class EpochProgress(Callback):
    """Steps, pairs a second, the mean loss so far, and the time left, by rank 0; a logger gets curves of them.

    Args:
        epochs: of the training.
        history: rows of those that are done, as the `EpochCheckpoint` has them.
    """

    def __init__(self, epochs: int, history: Callable[[], Sequence[dict[str, float]]]):
        self.epochs, self.history = epochs, history
        self.meter: Meter | None = None
        self.pairs, self._first = 0, True

    def on_train_batch_start(self, trainer: L.Trainer, _: Any, batch: Any, batch_idx: int) -> None:
        if self.meter is None and trainer.is_global_zero:
            epoch = trainer.current_epoch
            times = self.epochs - epoch if self._first else 1
            what = f"epoch {epoch + 1}/{self.epochs}"
            self.meter = Meter(what, trainer.num_training_batches, batch_idx, times)
            self.pairs, self._first = 0, False

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, _: Any, batch: Any, batch_idx: int) -> None:
        if self.meter:
            self.pairs += len(batch.rows) * trainer.world_size * (batch.images is not None)
            self.meter.step(lambda: self._say(task, trainer.current_epoch))
            if trainer.logger and (self.meter.done % CURVE == 0 or self.meter.done == self.meter.total):
                curves = {f"so_far/{name}": total / count for name, (total, count) in task.running.items()}
                curves["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
                curves["images_per_second"] = self.pairs / self.meter.seconds
                step = trainer.current_epoch * self.meter.total + self.meter.done
                trainer.logger.log_metrics({name: float(value) for name, value in curves.items()}, step)

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        if self.meter:
            self.meter.close()
        self.meter = None

    def _say(self, task: Any, epoch: int) -> str:
        meter = self.meter
        done = self.history()
        whole = done[-1]["seconds"] if done else meter.total / meter.rate  # validation is not known yet
        total, count = task.running.get("retrieval", (0.0, 0))
        loss = f", retrieval loss {float(total) / count:.4f}" if count else ""
        return (
            f"step {meter.done:,} of {meter.total:,}, {self.pairs / meter.seconds:,.0f} pairs/s{loss}, "
            f"{lasting(meter.left)} left of the epoch, "
            f"{lasting(meter.left + (self.epochs - epoch - 1) * whole)} of the training"
        )
