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

from recipe_lib.evaluation import encode
from recipe_lib.losses import circle_loss
from recipe_lib.models import RetrievalSystem, bare_towers
from recipe_lib.retrieval import evaluate
from recipe_lib.saving import load_system
from recipe_lib.training import TrainingConfig, learning_rate, pair_loss, train

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


def test_without_an_epoch_the_system_is_left_as_it_is(tiny_store, tiny_config, tmp_path):
    system = fresh(tiny_config)
    before = {k: v.clone() for k, v in system.state_dict().items()}
    history = train(system, tiny_store, replace(CONFIG, epochs=0), tmp_path)
    saved = load_system(tmp_path).state_dict()
    assert saved.keys() == before.keys() and all(torch.equal(saved[k], v) for k, v in before.items())
    trained = train(fresh(tiny_config), tiny_store, replace(CONFIG, epochs=1), tmp_path / "trained")
    kept = pd.read_csv(tmp_path / "history.csv")
    assert set(history.columns) == set(kept.columns) == set(trained.columns) and len(history) == len(kept) == 0


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
    for part in ("image_encoder.adapters", "recipe_encoder.adapters", "description_encoder."):
        assert [name for name in moved if name.startswith(part)], part
    assert len(list(tmp_path.glob("segments-train-*.npy"))) == 1


def test_adapted_segments_learn(clip_store, clip_config, tmp_path):
    system = fresh(replace(clip_config, segment_encoder="adapted", segments=2))
    before = {k: v.clone() for k, v in system.state_dict().items() if k.startswith("segment_encoder.")}
    history = train(system, clip_store, replace(CLIP, epochs=3), tmp_path)
    after = load_system(tmp_path).state_dict()
    assert before and not any(torch.equal(v, after[k]) for k, v in before.items())
    assert history["segments"].iloc[-1] < history["segments"].iloc[0]
    assert not list(tmp_path.glob("segments-*.npy")), "they change at every step: nothing to keep"


@pytest.mark.parametrize(
    ("loss", "over"), [("circle", "batch"), ("circle_per_query", "query"), ("circle_released", "triangle")]
)
def test_the_circle_losses_by_name(loss, over):
    a, b = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    found = pair_loss(replace(CLIP, loss=loss, gamma=8.0))(a, b)
    assert torch.equal(found, circle_loss(a, b, margin=0.25, gamma=8.0, over=over))


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
