"""Several processes train what one would: gathered negatives, one writer, no orphans, several machines."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from timm.layers import convert_sync_batchnorm

from recipe_lib.causal.debiasing import VARIANTS
from recipe_lib.data.loading import PairedBatches, StudyDataset, loader
from recipe_lib.data.store import Store
from recipe_lib.evaluation.scores import encode
from recipe_lib.retrieval.metrics import evaluate
from recipe_lib.runner.params import ParamsError, declared, load
from recipe_lib.systems.base import System, SystemConfig
from recipe_lib.systems.registry import build
from recipe_lib.systems.saving import load_system
from recipe_lib.training import distributed
from recipe_lib.training.checkpoint import AGREE, place
from recipe_lib.training.fit import TrainingConfig, TrainingTask, make_trainer, train

ROOT = Path(__file__).parents[2]
# No dropout, and no crop: what is left of augmentation, the flip, is drawn by each process for its own photos.
CONFIG = TrainingConfig(epochs=2, batch_size=32, crop_size=64, learning_rate=5e-4, seed=5)
TRAIN = """
import json, sys
from pathlib import Path
from tests.training.test_distributed import fresh
from recipe_lib.data.store import Store
from recipe_lib.training.fit import TrainingConfig, train

store = Store(Path(sys.argv[1]))
train(fresh(store), store, TrainingConfig(**json.loads(sys.argv[2])), Path(sys.argv[3]))
"""
SERVE = "import sys; from recipe_lib.training.distributed import serve; sys.exit(serve(1, 2, 1))"
LEAD = """
import time
from recipe_lib.training.distributed import lead
with lead(2):
    print('leads', flush=True)
    time.sleep(60)
"""


def fresh(store: Store, **values) -> System:
    small = {
        "image_model": "test_resnet", "embed_dim": 16, "recipe_dim": 16, "recipe_layers": 1, "recipe_heads": 2,
        "recipe_feedforward": 32, "dropout": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = SystemConfig(store.card["vocabulary"], len(store.classes.names), **small | values)
    return build(config, torch.randn(config.num_classes, config.recipe_dim))


def without_time(history: pd.DataFrame) -> pd.DataFrame:
    return history.drop(columns="seconds")


# ---- loss and gradients ----


class Capture(Callback):
    """Each step's loss and gradients, as the optimizer gets them."""

    def __init__(self):
        self.losses, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, task, optimizer):
        self.gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in task.named_parameters()})

    def on_train_batch_end(self, trainer, task, outputs, batch, index):
        self.losses.append(float(outputs["loss"]))


def steps(folder: Path, out: Path) -> None:
    """An epoch of paired and text-only steps, in this process or, under torchrun, in one of several."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    store = Store(folder)
    debiased = replace(VARIANTS["debiased"], classifier_dim=16, classifier_heads=2, classifier_feedforward=32)
    # No BatchNorm, whose statistics are each process's own on CPUs; no learning, so that steps can be compared.
    system = fresh(store, image_model="test_vit", image_model_args=("img_size: 64",), debiasing=debiased)
    config = replace(CONFIG, epochs=1, learning_rate=0.0, weights={"classifier": 0.1}, devices=world)
    pairs, text = store.split("train"), store.split("text_only")
    batches = PairedBatches(len(pairs), 32, text_only=len(text), seed=1, rank=rank, world=world)
    capture = Capture()
    trainer = make_trainer(config, out, [capture])
    trainer.fit(TrainingTask(system, config), loader(StudyDataset(pairs, 64, text_only=text), batches))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    torch.save((capture.losses, capture.gradients, logged), out / f"{world}-{rank}.pt")


def test_gathered_loss_and_gradients_are_those_of_one_process(tiny_store, tmp_path):
    steps(tiny_store.folder, tmp_path)
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.training.test_distributed"]
    arguments = [str(tiny_store.folder), str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", *command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert len(one[0]) == len(first[0]) == 6, "three paired steps, three of text alone"
    for step, losses in enumerate(zip(one[0], first[0], second[0], strict=True)):
        assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5)
        assert (losses[1] == losses[2]) == bool(step % 2), "the classifier's loss alone is of each half"
    for step, gradients in enumerate(zip(one[1], first[1], second[1], strict=True)):
        for name, expected in gradients[0].items():
            assert (expected is None) == (gradients[1][name] is None), (step, name)
            if expected is not None:
                assert torch.equal(gradients[1][name], gradients[2][name])
                error = float((gradients[1][name] - expected).norm() / expected.norm().clamp(min=1e-6))
                assert error < 1e-5, (step, name)
        assert all(g is None for n, g in gradients[0].items() if "image_encoder" in n) == bool(step % 2)
    assert one[2].keys() >= {"retrieval", "classifier", "self_supervised", "z_norm"}
    assert first[2] == second[2] == pytest.approx(one[2], rel=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_synchronised_batchnorm_keeps_weights_and_activations(tiny_store, name):
    """torch's own conversion drops the activations of timm's BatchNormAct2d, which the second backbone has."""
    system = fresh(tiny_store, image_model=name).eval()
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        before, keys = (
            system.encode_images(SimpleNamespace(images=images, labels=None)).embedding,
            list(system.state_dict()),
        )
        converted = convert_sync_batchnorm(system)
        assert converted is system and list(system.state_dict()) == keys
        assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in system.modules())
        assert torch.equal(system.encode_images(SimpleNamespace(images=images, labels=None)).embedding, before)


def test_frozen_batchnorm_stays_frozen_when_it_is_synchronised(tiny_store):
    system = convert_sync_batchnorm(fresh(tiny_store, frozen=("bn1",))).train()
    norms = {name: module for name, module in system.named_modules() if isinstance(module, torch.nn.SyncBatchNorm)}
    frozen = norms.pop("image_encoder.backbone.bn1")
    assert not frozen.training and not frozen.weight.requires_grad
    assert norms and all(module.training and module.weight.requires_grad for module in norms.values())


# ---- train() ----


@pytest.fixture(scope="module")
def pair(tiny_store, tmp_path_factory) -> SimpleNamespace:
    """A system trained by two processes: its parent was killed after the first epoch, then the run went on."""
    folder, system, shown = tmp_path_factory.mktemp("pair"), fresh(tiny_store), io.StringIO()
    config = replace(CONFIG, devices=2)
    command = [sys.executable, "-c", TRAIN, str(tiny_store.folder), json.dumps(vars(config)), str(folder)]
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    first = killed.stdout.readline()
    children = psutil.Process(killed.pid).children(recursive=True)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    alive, left = psutil.wait_procs(children, timeout=5)[1], {path.name for path in folder.iterdir()}
    with contextlib.redirect_stdout(shown):
        history = train(system, tiny_store, config, folder)
    return SimpleNamespace(**{k: v for k, v in locals().items() if k not in ("tiny_store", "tmp_path_factory")})


def test_kill_9_leaves_no_process_and_the_next_run_goes_on(pair):
    assert pair.first.startswith("epoch   1/2")
    assert len(pair.children) >= 3 and not pair.alive, "torchrun and two workers"
    assert "last.ckpt" in pair.left and "model.safetensors" not in pair.left
    shown = pair.shown.getvalue()
    assert "resuming" in shown and "epoch   1" not in shown and shown.count("epoch   2") == 1


def test_two_processes_train_about_as_one(tiny_store, tmp_path, pair):
    history = pair.history
    alone = train(fresh(tiny_store), tiny_store, CONFIG, tmp_path)
    assert list(history.columns) == list(alone.columns) and list(history["epoch"]) == [1, 2]
    for name in ("retrieval", "self_supervised", "e_norm"):
        assert list(history[name]) == pytest.approx(list(alone[name]), rel=0.05), name
    assert {path.name for path in pair.folder.iterdir()} == {path.name for path in tmp_path.iterdir()}
    loaded = load_system(pair.folder)
    assert all(torch.equal(value, pair.system.state_dict()[name]) for name, value in loaded.state_dict().items())
    found = encode(loaded, tiny_store.split("val"), crop=64)
    best = history.loc[history["val_i2r_recall_1"].idxmax()]
    # The shares of both were put together in order, and scored with the statistics that the checkpoint keeps.
    for row in evaluate(found.embedding, found.recipes, candidates=24):
        assert best[f"val_{row['direction']}_medr"] == pytest.approx(row["medr"], abs=0.51)
        assert best[f"val_{row['direction']}_recall_10"] == pytest.approx(row["recall_10"], abs=1.5 / 24)


STOPPED = TRAIN.replace("fresh(store)", "fresh(store, dropout=0.1)")


def test_a_signal_stops_all_processes_at_one_checkpoint_inside_an_epoch(tiny_store, tmp_path):
    config = replace(CONFIG, batch_size=8, devices=2)
    assert tiny_store.card["recipes"]["train"] // 8 * 2 > 2 * AGREE, "they agree twice in an epoch"
    command = [sys.executable, "-c", STOPPED, str(tiny_store.folder), json.dumps(vars(config)), str(tmp_path / "cut")]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert run.stdout.readline().startswith("epoch   1/2")
    children = psutil.Process(run.pid).children(recursive=True)
    for process in [psutil.Process(run.pid), *children]:  # as Slurm does: all of a job's step
        process.send_signal(signal.SIGUSR1)
    said = run.communicate(timeout=120)[0]
    assert run.returncode == -signal.SIGUSR1 and "stopped by a signal; last.ckpt is written" in said
    assert psutil.wait_procs(children, timeout=5)[1] == []
    epoch, step = place(tmp_path / "cut/last.ckpt")
    assert epoch == 1 and step in (0, AGREE, 2 * AGREE)
    torch.manual_seed(1)
    for name in ("cut", "whole"):
        train(fresh(tiny_store, dropout=0.1), tiny_store, config, tmp_path / name)
    cut, whole = (pd.read_csv(tmp_path / name / "history.csv").drop(columns="seconds") for name in ("cut", "whole"))
    pd.testing.assert_frame_equal(cut, whole, check_exact=True)


def test_a_failing_process_is_one_line(tiny_store, tmp_path):
    with pytest.raises(RuntimeError, match=r"2 devices failed: rank \d: ValueError: crop_size 80 is larger") as error:
        train(fresh(tiny_store), tiny_store, replace(CONFIG, crop_size=80, devices=2), tmp_path)
    assert "\n" not in str(error.value)


def test_a_process_that_was_killed_is_told_by_torchrun(tmp_path):
    (tmp_path / "stderr-0.txt").write_text("====\nexitcode : -9\n----\nSignal 9 (SIGKILL) received by PID 1\n====")
    assert "exitcode : -9 Signal 9 (SIGKILL) received by PID 1 (see " in distributed._why(tmp_path, 0)


def test_a_batch_must_divide_among_the_devices():
    schema = declared(sorted((ROOT / "notebooks").glob("0[1-5]_*.ipynb")))
    assert load([], [("devices", "4"), ("num_nodes", "4")], schema)["num_nodes"] == 4
    with pytest.raises(ParamsError, match="-p devices: batch_size counts the pairs of all devices"):
        load([], [("devices", "3")], schema)
    with pytest.raises(ParamsError, match="debias_batch_size counts"):
        load([], [("devices", "3"), ("batch_size", "60")], schema)


# ---- several machines ----


@pytest.fixture
def helper(monkeypatch):
    """Machine 1 of 2, as a process of this machine."""
    for port in range(20000 + os.getpid() % 10000, 32000, 2):
        with socket.socket() as one, socket.socket() as two:
            if one.connect_ex(("127.0.0.1", port)) and two.connect_ex(("127.0.0.1", port + 1)):
                break
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SERVE], cwd=ROOT, **pipes)
    yield process
    process.kill()
    process.communicate()


def test_two_machines_train_as_two_processes_of_one(tiny_store, tmp_path, pair, helper):
    """Which also says that the run that was killed ended with the numbers of one that was not."""
    with distributed.lead(2):
        history = train(fresh(tiny_store), tiny_store, replace(CONFIG, num_nodes=2), tmp_path)
    shown, error = helper.communicate(timeout=30)
    assert helper.returncode == 0 and shown.count("\n") == 1 and not error, error
    pd.testing.assert_frame_equal(without_time(history), without_time(pair.history))


def test_a_failed_run_ends_the_helper(helper):
    with pytest.raises(ZeroDivisionError), distributed.lead(2):
        raise ZeroDivisionError
    assert helper.wait(timeout=30) == 1


def test_a_helper_does_not_outlive_machine_0(helper):
    leader = subprocess.Popen([sys.executable, "-c", LEAD], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert leader.stdout.readline() == "leads\n"
    helper.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        helper.wait(timeout=1)
    leader.kill()
    leader.communicate()
    error = helper.communicate(timeout=30)[1]
    assert "127.0.0.1: machine 0 is gone" in error and "frame #" not in error and helper.returncode == 1


def test_several_machines_need_an_address_and_machine_0(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConnectionError, match="set MASTER_ADDR"):
        distributed.serve(1, 2, 1)


if __name__ == "__main__":
    steps(Path(sys.argv[1]), Path(sys.argv[2]))
