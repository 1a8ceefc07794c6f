import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from recipe_lib import previous, training
from recipe_lib.evaluation import encode
from recipe_lib.models import RetrievalSystem, bare_towers
from recipe_lib.retrieval import evaluate
from recipe_lib.saving import load_system
from recipe_lib.training import TrainingConfig, learning_rate, train

CONFIG = TrainingConfig(
    epochs=3, batch_size=32, crop_size=48, optimizer="adamw", learning_rate=2e-3, lr_schedule="cosine", seed=5
)
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from recipe_lib.data.store import Store
from recipe_lib.models import RetrievalSystem, SystemConfig
from recipe_lib.training import TrainingConfig, train

data, config, training, out = sys.argv[1:]
torch.manual_seed(0)
system = RetrievalSystem(SystemConfig.from_dict(json.loads(config)))
train(system, Store(Path(data)), TrainingConfig(**json.loads(training)), Path(out))
"""


def fresh(config):
    torch.manual_seed(0)
    return RetrievalSystem(config)


def without_time(folder):
    return pd.read_csv(folder / "history.csv").drop(columns="seconds")


def test_learns_and_keeps_the_best_epoch(tiny_store, tiny_config, tmp_path):
    system = fresh(tiny_config)
    history = train(system, tiny_store, replace(CONFIG, epochs=8), tmp_path)
    assert history["retrieval"].iloc[-1] < 0.7 * history["retrieval"].iloc[0]
    assert list(history["epoch"]) == list(range(1, 9))
    loaded = load_system(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, system.state_dict()[name]), name
    found = encode(loaded, tiny_store.split("val"), crop=48)
    from recipe_lib.retrieval import cross_modal_ranks

    recall = float((cross_modal_ranks(found.embedding, found.recipes)[0] <= 1).double().mean())
    assert recall == pytest.approx(history["val_i2r_recall_1"].max(), abs=1.5 / 24), "bf16 or batch order may move one"


def test_same_seed_same_numbers_another_seed_others(tiny_store, tiny_config, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train(fresh(tiny_config), tiny_store, replace(CONFIG, epochs=2, seed=seed), tmp_path / name)
    assert without_time(tmp_path / "a").equals(without_time(tmp_path / "b"))
    assert not without_time(tmp_path / "a").equals(without_time(tmp_path / "c"))


def test_kill_9_and_resume_end_with_the_same_numbers(tiny_store, tiny_config, tmp_path):
    training = {**vars(CONFIG), "epochs": 4}

    def command(out):
        data = [str(tiny_store.folder), json.dumps(tiny_config.to_dict()), json.dumps(training), str(tmp_path / out)]
        return [sys.executable, "-u", "-c", SCRIPT, *data]

    subprocess.run(command("whole"), check=True, capture_output=True)
    killed = subprocess.Popen(command("killed"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in killed.stdout:
        if line.startswith("epoch   2"):
            os.kill(killed.pid, signal.SIGKILL)
            break
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/model.safetensors").exists(), "nothing that looks finished"
    again = subprocess.run(command("killed"), check=True, capture_output=True, text=True)
    assert "resuming" in again.stdout and "epoch   1" not in again.stdout
    assert without_time(tmp_path / "whole").equals(without_time(tmp_path / "killed"))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_checkpoint_of_other_parameters_is_not_taken_up(tiny_store, tiny_config, tmp_path, capsys):
    train(fresh(tiny_config), tiny_store, replace(CONFIG, epochs=1), tmp_path)
    history = train(fresh(tiny_config), tiny_store, replace(CONFIG, epochs=1, margin=0.2), tmp_path)
    assert "training starts anew" in capsys.readouterr().out and len(history) == 1


def weights(folder):
    return (folder / "model.safetensors").read_bytes(), (folder / "history.csv").read_text()


def test_what_is_trained_is_kept_until_code_data_or_parameters_change(tiny_store, tiny_config, tmp_path, monkeypatch):
    one = replace(CONFIG, epochs=1)
    history = train(fresh(tiny_config), tiny_store, one, tmp_path)
    kept, fitted = weights(tmp_path), []
    code = real = training.code_digest(training.fit, training.segment_features, RetrievalSystem)
    monkeypatch.setattr(training, "fit", lambda *args: fitted.append(args))
    monkeypatch.setattr(training, "code_digest", lambda *_: code)
    system = fresh(tiny_config)
    again = train(system, tiny_store, replace(one, num_workers=2), tmp_path)
    pd.testing.assert_frame_equal(again, history, check_exact=True)
    assert not fitted and weights(tmp_path) == kept
    assert all(torch.equal(v, system.state_dict()[k]) for k, v in load_file(tmp_path / "model.safetensors").items())
    code = "another loss"
    train(fresh(tiny_config), tiny_store, one, tmp_path)
    assert len(fitted) == 1 and not (tmp_path / "last.ckpt").exists()
    code = real
    train(fresh(tiny_config), tiny_store, one, tmp_path)
    assert len(fitted) == 1 and weights(tmp_path) == kept, "the weights of before came back"


def test_replaced_trainings_move_aside_and_come_back(tiny_store, tiny_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(tmp_path))
    folder, aside = tmp_path / "study/02_train", tmp_path / "study/.previous/trained/02_train"
    seeds = [replace(CONFIG, epochs=1, seed=seed) for seed in (1, 2, 3)]
    train(fresh(tiny_config), tiny_store, seeds[0], folder)
    first = weights(folder)
    train(fresh(tiny_config), tiny_store, seeds[1], folder)
    second = weights(folder)
    (moved,) = aside.iterdir()
    assert weights(moved) == first != second and (moved / "last.ckpt").is_file()

    def stopped(*_):
        raise KeyboardInterrupt

    # A training that is stopped at once replaces nothing for good.
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "make_trainer", stopped)
        train(fresh(tiny_config), tiny_store, seeds[2], folder)
    assert {weights(path) for path in aside.iterdir()} == {first, second}
    capsys.readouterr()
    train(fresh(tiny_config), tiny_store, seeds[0], folder)
    said = capsys.readouterr().out
    assert said == "already trained: the weights are kept\n" and weights(folder) == first
    # When a new one is finished, the last finished one that it replaced stays.
    train(fresh(tiny_config), tiny_store, seeds[2], folder)
    assert [weights(path) for path in aside.iterdir()] == [first]


def test_a_move_that_was_cut_off_is_carried_through(tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(tmp_path))
    folder = tmp_path / "study/02_train"
    folder.mkdir(parents=True)
    for name in previous.TRAINING:
        (folder / name).write_text(json.dumps({"fingerprint": "a"}))
    aside = previous.place(folder) / "weights-a"
    aside.mkdir(parents=True)
    (folder / "history.csv").replace(aside / "history.csv")  # killed after the first file
    assert not previous.claim(folder, "a") and not aside.exists()
    assert {path.name for path in folder.iterdir()} == set(previous.TRAINING)
    assert previous.claim(folder, "b")
    assert {path.name for path in folder.iterdir()} == {"started.json"}
    assert previous.claim(folder, "a"), "what was started as b moves, a comes back"
    assert {path.name for path in folder.iterdir()} == set(previous.TRAINING)


def test_a_checkpoint_without_a_record_moves_and_is_not_deleted(tiny_store, tiny_config, tmp_path):
    (tmp_path / "last.ckpt").write_text("of an unknown training")
    train(fresh(tiny_config), tiny_store, replace(CONFIG, epochs=1), tmp_path)
    assert (tmp_path / ".previous/weights-unknown/last.ckpt").read_text() == "of an unknown training"


def test_text_only_recipes_train_the_recipe_encoder(tiny_store, tiny_config, tmp_path):
    """With and without the self-supervised loss the numbers differ: text-only batches are really taken."""
    a = train(fresh(tiny_config), tiny_store, replace(CONFIG, epochs=1), tmp_path / "a")
    b = train(fresh(tiny_config), tiny_store, replace(CONFIG, epochs=1, self_supervised_weight=0.0), tmp_path / "b")
    assert b["self_supervised"].iloc[0] == 0 < a["self_supervised"].iloc[0]


def test_a_large_validation_split_is_scored_in_ten_bags(tiny_store, tiny_config, tmp_path):
    """The same bags in every epoch, and in every run."""
    system = fresh(tiny_config)
    history = train(system, tiny_store, replace(CONFIG, epochs=2, val_candidates=10), tmp_path)
    found = encode(system.eval(), tiny_store.split("val"), crop=48)
    best = history.loc[history["val_i2r_recall_1"].idxmax()]
    bags = evaluate(found.embedding, found.recipes, candidates=10, bags=10, seed=0)
    whole = evaluate(found.embedding, found.recipes, candidates=24)
    for bag, all_of_it in zip(bags, whole, strict=True):
        for name in ("recall_1", "recall_10"):
            assert best[f"val_{bag['direction']}_{name}"] == pytest.approx(bag[name], abs=0.011), name
        assert bag["recall_10"] == 1 > all_of_it["recall_10"]


def test_learning_rate_schedules():
    step = replace(CONFIG, lr_schedule="step", learning_rate=1.0, lr_step_epochs=30)
    assert [learning_rate(step, t) for t in (0, 29.9, 30, 60)] == pytest.approx([1, 1, 0.1, 0.01])
    cosine = replace(CONFIG, lr_schedule="cosine", learning_rate=1.0, epochs=10, warmup_epochs=2.0)
    assert learning_rate(cosine, 0) < 0.01 and learning_rate(cosine, 10) == pytest.approx(0)
    assert learning_rate(cosine, 5) == pytest.approx(0.5) and learning_rate(cosine, 1) == pytest.approx(
        0.505 * 0.5 * (1 + math.cos(math.pi / 10))
    )


def test_nothing_trained_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trained system here"):
        load_system(tmp_path)


# ---- CLIP towers, descriptions, segments ----

CLIP = replace(CONFIG, crop_size=56, loss="circle", margin=0.25, precision="32-true")


def test_every_level_learns_and_no_tower_moves(clip_store, clip_config, tmp_path):
    system = fresh(clip_config)
    before = {k: v.clone() for k, v in system.state_dict().items()}
    history = train(system, clip_store, replace(CLIP, epochs=4), tmp_path / "a", kept=tmp_path)
    for level in ("retrieval", "segments", "descriptions", "self_supervised"):
        assert history[level].iloc[-1] < history[level].iloc[0], level
    after = load_system(tmp_path / "a").state_dict()
    moved = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert moved and not [name for name in moved if ".tower." in name]
    for part in ("image_encoder.adapters", "recipe_encoder.adapters", "description_encoder.", "segment_encoder."):
        assert [name for name in moved if name.startswith(part)], part
    assert len(list(tmp_path.glob("segments-train-*.npy"))) == 1


def test_weights_of_the_levels_take_them_out(clip_store, clip_config, tmp_path):
    off = replace(CLIP, epochs=1, segment_weight=0.0, description_weight=0.0, self_supervised_weight=0.0)
    history = train(fresh(clip_config), clip_store, off, tmp_path)
    assert history[["segments", "descriptions", "self_supervised"]].to_numpy().sum() == 0 < history["retrieval"][0]


def test_towers_learn_to_pair_photos_with_captions(clip_store, clip_config, tmp_path):
    torch.manual_seed(0)
    towers = bare_towers(RetrievalSystem(clip_config))
    history = train(towers, clip_store, replace(CLIP, epochs=4), tmp_path)
    assert history["retrieval"].iloc[-1] < 0.9 * history["retrieval"].iloc[0]
    assert "self_supervised" not in history, "a caption has no parts, so text-only recipes train nothing"


def test_a_killed_training_of_clip_goes_on(clip_store, clip_config, tmp_path):
    whole = train(fresh(clip_config), clip_store, CLIP, tmp_path / "whole")
    script = [sys.executable, "-c", SCRIPT, str(clip_store.folder), json.dumps(clip_config.to_dict())]
    command = [*script, json.dumps(asdict(CLIP)), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch   2"):
            process.kill()
    process.wait()
    assert not (tmp_path / "killed/model.safetensors").is_file()
    again = train(fresh(clip_config), clip_store, CLIP, tmp_path / "killed")
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), whole.drop(columns="seconds"))
