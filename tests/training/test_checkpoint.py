"""Checkpoints inside epochs: killed at whatever step, a run ends with the numbers of one that was never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from recipe_lib.data.loading import PairedBatches
from recipe_lib.systems.ht import HT
from recipe_lib.systems.registry import build
from recipe_lib.training import fit as training
from recipe_lib.training.checkpoint import EpochCheckpoint, place
from recipe_lib.training.fit import TrainingConfig, fingerprint, train
from recipe_lib.training.stopping import Stop

CONFIG = TrainingConfig(
    epochs=2, batch_size=16, crop_size=48, optimizer="adamw", learning_rate=2e-3, lr_schedule="cosine", seed=5
)


class Killed(Exception):
    pass


class Game(HT):
    """Two players: the encoders, and a critic that learns to tell photos from recipes."""

    def build(self):
        super().build()
        self.critic = torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))

    def players(self):
        critic = list(self.critic.parameters())
        own = {id(parameter) for parameter in critic}
        return {"main": [p for p in self.parameters() if id(p) not in own], "critic": critic}

    def losses(self, step):
        if step.player == "main":
            return super().losses(step)
        if step.batch.images is None:
            return {}
        told = self.critic(self.encode_images(step.batch).embedding.detach().float())
        return {"told": torch.nn.functional.softplus(told).mean()}


def fresh(config, kind=None):
    torch.manual_seed(0)
    return kind(config) if kind else build(config)


def cut(monkeypatch, saves, dies):
    """Write checkpoints after these steps, counted over all epochs that this process sees, and die after one."""
    seen = 0

    def due(self, step):
        nonlocal seen
        seen += 1
        if seen == dies:
            raise Killed
        return seen in saves

    monkeypatch.setattr(EpochCheckpoint, "due", due)


def results(folder):
    return pd.read_csv(folder / "history.csv").drop(columns="seconds"), load_file(folder / "model.safetensors")


def assert_same(folder, other):
    (history, weights), (expected, values) = results(folder), results(other)
    pd.testing.assert_frame_equal(history, expected, check_exact=True)
    assert weights.keys() == values.keys() and all(torch.equal(weights[k], values[k]) for k in values)


@pytest.mark.parametrize("kind", [HT, Game])
def test_a_run_killed_at_random_steps_ends_with_the_same_numbers(tiny_store, tiny_config, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(training, "code_digest", lambda *_: "the game is no part of recipe_lib")
    config, rng = replace(CONFIG, precision="bf16-mixed"), np.random.default_rng(4)
    train(fresh(tiny_config, kind), tiny_store, config, tmp_path / "whole")
    places = []
    for number in range(2):
        folder, kills = tmp_path / f"killed {number}", 0
        while not (folder / "model.safetensors").exists():
            saves = sorted(rng.choice(np.arange(1, 9), 2, replace=False).tolist())
            with monkeypatch.context() as patched:
                # Every checkpoint lies behind the last one, so this ends.
                cut(patched, saves, saves[-1] + int(rng.integers(1, 6)))
                try:
                    train(fresh(tiny_config, kind), tiny_store, config, folder)
                except Killed:
                    kills += 1
                    places.append(place(folder / "last.ckpt"))
        assert kills
        assert_same(folder, tmp_path / "whole")
    assert {step % 2 for _, step in places} == {0, 1}, "after steps of pairs, and of text alone"
    assert {epoch for epoch, _ in places} == {0, 1}


def test_worker_processes_go_on_at_the_same_place(tiny_store, tiny_config, tmp_path, monkeypatch):
    train(fresh(tiny_config), tiny_store, replace(CONFIG, epochs=1), tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        cut(patched, [5], 7)
        train(fresh(tiny_config), tiny_store, replace(CONFIG, epochs=1), tmp_path / "killed")
    assert place(tmp_path / "killed/last.ckpt") == (0, 5)
    train(fresh(tiny_config), tiny_store, replace(CONFIG, epochs=1, num_workers=2), tmp_path / "killed")
    assert_same(tmp_path / "killed", tmp_path / "whole")


def test_the_sampler_goes_on_at_a_place_for_one_epoch():
    options = {"text_only": 30, "seed": 3}
    whole, again = (PairedBatches(100, 16, **options) for _ in range(2))
    whole.set_epoch(2)
    again.set_epoch(2, 5)
    again.set_epoch(2)  # as Lightning says
    rest = list(whole)[5:]
    assert len(again) == len(whole) == 14 == len(rest) + 5
    for a, b in zip(again, rest, strict=True):
        assert np.array_equal(a.rows, b.rows) and (a.paired, a.epoch) == (b.paired, b.epoch)
    again.set_epoch(3)
    assert len(list(again)) == len(whole)


def test_time_makes_them_due_and_zero_never(monkeypatch, tmp_path):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    ten, never = (
        EpochCheckpoint(tmp_path / "x", replace(CONFIG, checkpoint_minutes=minutes), Stop()) for minutes in (10, 0)
    )
    for later, due in ((0, False), (599, False), (600, True)):
        now = 100.0 + later
        assert (ten.due(1), never.due(1)) == (due, False)


def test_the_minutes_are_no_part_of_what_a_training_is(tiny_store, tiny_config):
    system = fresh(tiny_config)
    prints = {fingerprint(system, tiny_store, replace(CONFIG, checkpoint_minutes=m)) for m in (0, 10)}
    assert len(prints) == 1


SIGNALLED = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
import torch
from recipe_lib.data.store import Store
from recipe_lib.systems.base import SystemConfig
from recipe_lib.systems.registry import build
from recipe_lib.training.checkpoint import EpochCheckpoint
from recipe_lib.training.fit import TrainingConfig, train

data, config, training, out, number = sys.argv[1:]
def due(self, step, calls=[]):
    calls.append(step)
    if len(calls) == 15:  # the third step of the second epoch
        # The loader's processes too, and by another process than the trainer, as Slurm does.
        subprocess.run(["kill", f"-{number}", "--", f"-{os.getpgid(0)}"], start_new_session=True)
        time.sleep(2)  # of processes that it killed the trainer hears meanwhile
    return False
EpochCheckpoint.due = due
torch.manual_seed(0)
system = build(SystemConfig.from_dict(json.loads(config)))
train(system, Store(Path(data)), TrainingConfig(**json.loads(training)), Path(out))
"""


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGUSR1, 2), (signal.SIGTERM, 2), (signal.SIGTERM, 0)])
def test_a_signal_writes_a_checkpoint_and_then_kills(tiny_store, tiny_config, tmp_path, number, workers):
    training = json.dumps(asdict(replace(CONFIG, num_workers=workers)))
    values = [str(tiny_store.folder), json.dumps(tiny_config.to_dict()), training]
    command = [sys.executable, "-c", SIGNALLED, *values, str(tmp_path / "cut"), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, start_new_session=True)
    assert done.returncode == -number, done.stderr[-2000:]
    assert "stopped by a signal; last.ckpt is written" in done.stdout
    assert place(tmp_path / "cut/last.ckpt") == (1, 4), (
        "after 11 steps of the first epoch, which asks no more at its last, and 4"
    )
    train(fresh(tiny_config), tiny_store, CONFIG, tmp_path / "cut")
    train(fresh(tiny_config), tiny_store, CONFIG, tmp_path / "whole")
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_signals_are_noted_only_while_something_may_be_saved():
    before = signal.getsignal(signal.SIGUSR1)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is before
