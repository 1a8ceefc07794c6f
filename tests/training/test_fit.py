import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import ReduceLROnPlateau

from recipe_lib import previous
from recipe_lib.causal.debiasing import VARIANTS
from recipe_lib.data.loading import Draw, StudyDataset
from recipe_lib.evaluation.scores import encode
from recipe_lib.losses import circle_loss, triplet_loss
from recipe_lib.retrieval.metrics import evaluate
from recipe_lib.systems.attach import attach
from recipe_lib.systems.base import Step, parameter_table
from recipe_lib.systems.captions import bare_towers
from recipe_lib.systems.ht import HT
from recipe_lib.systems.registry import build
from recipe_lib.systems.saving import load_system
from recipe_lib.training import fit as training
from recipe_lib.training.fit import (
    TrainingConfig,
    best_epoch,
    learning_rate,
    load_training,
    pair_loss,
    train,
    validate,
)

CONFIG = TrainingConfig(
    epochs=3, batch_size=32, crop_size=48, optimizer="adamw", learning_rate=2e-3, lr_schedule="cosine", seed=5
)
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from recipe_lib.data.store import Store
from recipe_lib.systems.base import System, SystemConfig
from recipe_lib.systems.registry import build
from recipe_lib.training.fit import TrainingConfig, train

data, config, training, out = sys.argv[1:]
torch.manual_seed(0)
system = build(SystemConfig.from_dict(json.loads(config)))
train(system, Store(Path(data)), TrainingConfig(**json.loads(training)), Path(out))
"""


def fresh(config):
    torch.manual_seed(0)
    return build(config)


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
    from recipe_lib.retrieval.metrics import cross_modal_ranks

    recall = float((cross_modal_ranks(found.embedding, found.recipes)[0] <= 1).double().mean())
    assert recall == pytest.approx(history["val_i2r_recall_1"].max(), abs=1.5 / 24), "bf16 or batch order may move one"
    best = history.loc[history["val_i2r_recall_1"].idxmax()]
    again = validate(loaded, tiny_store, CONFIG, tmp_path)
    assert again == {name: pytest.approx(best[name]) for name in again} and "val_r2i_medr" in again
    assert validate(fresh(tiny_config), tiny_store, CONFIG, tmp_path) != again
    assert load_training(tmp_path) == replace(CONFIG, epochs=8)


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


def killed_after(epoch, store, config, training, folder):
    """Train in a process of its own that is killed with -9 when it has said that an epoch is done."""
    values = [str(store.folder), json.dumps(config.to_dict()), json.dumps(asdict(training)), str(folder)]
    command = [sys.executable, "-u", "-c", SCRIPT, *values]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith(f"epoch {epoch:>3}"):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "model.safetensors").exists(), "nothing that looks finished"


def test_kill_9_and_resume_end_with_the_same_numbers(tiny_store, tiny_config, tmp_path, capsys):
    """With other worker processes too: they change no number."""
    config = replace(CONFIG, epochs=4)
    killed_after(2, tiny_store, tiny_config, config, tmp_path / "killed")
    shutil.copytree(tmp_path / "killed", tmp_path / "with workers")
    train(fresh(tiny_config), tiny_store, config, tmp_path / "whole")
    capsys.readouterr()
    whole = load_file(tmp_path / "whole/model.safetensors")
    for name, workers in (("killed", 0), ("with workers", 2)):
        train(fresh(tiny_config), tiny_store, replace(config, num_workers=workers), tmp_path / name)
        said = capsys.readouterr().out
        assert "resuming" in said and "epoch   1" not in said and "epoch   4" in said
        assert without_time(tmp_path / "whole").equals(without_time(tmp_path / name))
        resumed = load_file(tmp_path / name / "model.safetensors")
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
    code = real = training.code_digest(training.fit, training.segment_features, HT)
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


def test_text_only_recipes_train_the_recipe_encoder(tiny_store, tiny_config, tmp_path, monkeypatch):
    """Every one is taken, and alone they move the recipe encoder: here the pairs are worth nothing."""
    system, rows, losses_of = fresh(tiny_config), {True: [], False: []}, HT.losses

    def losses(self, step):
        paired = step.batch.images is not None
        rows[paired].append(step.batch.rows.tolist())
        losses = losses_of(self, step)
        assert paired or set(losses) == {"self_supervised"}
        return {name: loss * (not paired) for name, loss in losses.items()}

    monkeypatch.setattr(HT, "losses", losses)
    start = {name: value.clone() for name, value in system.named_parameters()}
    train(system, tiny_store, replace(CONFIG, epochs=1, optimizer="adam"), tmp_path)
    assert len(rows[True]) == len(rows[False]) == 3 and set().union(*rows[False]) == set(range(20))
    moved = {name.split(".")[0] for name, value in system.named_parameters() if not torch.equal(value, start[name])}
    assert moved == {"recipe_encoder", "projections"}
    monkeypatch.undo()
    off = replace(CONFIG, epochs=1, weights={"self_supervised": 0.0})
    assert "self_supervised" not in train(fresh(tiny_config), tiny_store, off, tmp_path / "off")


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


def test_the_margin_grows_by_whole_epochs_up_to_its_value():
    steps = replace(CONFIG, margin=0.3, margin_start=0.05, margin_step=0.1)
    epochs = (0, 0.99, 1, 2.5, 3, 100)
    assert [steps.margin_at(epoch) for epoch in epochs] == pytest.approx([0.05, 0.05, 0.15, 0.25, 0.3, 0.3])
    assert [CONFIG.margin_at(epoch) for epoch in (0, 50)] == [0.3, 0.3], "without a step it stands still"
    a, b = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pair_loss(steps, 1.5)(a, b), triplet_loss(a, b, margin=steps.margin_at(1.5)))


def test_a_config_is_gathered_from_parameters_by_name_and_survives_its_file(tmp_path):
    parameters = {"epochs": 7, "mining": "non_zero", "classifier_weight": 0.5, "segment_weight": 2, "study": "kitchen"}
    parameters |= {"debias_epochs": 3, "debias_optimizer": "adamw", "name_weight": "text"}
    config = TrainingConfig.gather(parameters, seed=9, epochs=8)
    weights = {"classifier": 0.5, "segment": 2.0}
    assert config == TrainingConfig(epochs=8, mining="non_zero", seed=9, weights=weights), "facts win"
    debias = config.regather(parameters | {"z_weight": 0.1}, "debias_", seed=10)
    assert debias == replace(config, epochs=3, optimizer="adamw", seed=10, weights=weights | {"z": 0.1})
    assert debias.weight("z") == 0.1 and debias.weight("retrieval") == 1
    (tmp_path / "training.json").write_text(json.dumps(asdict(debias)))
    assert load_training(tmp_path) == debias


def test_learning_rate_schedules():
    step = replace(CONFIG, lr_schedule="step", learning_rate=1.0, lr_step_epochs=30)
    assert [learning_rate(step, t) for t in (0, 29.9, 30, 60)] == pytest.approx([1, 1, 0.1, 0.01])
    gentle = replace(step, lr_factor=0.5, lr_step_epochs=1)
    assert [learning_rate(gentle, t) for t in (0, 1, 2.5, 3)] == [1, 0.5, 0.25, 0.125], "exponential decay"
    cosine = replace(CONFIG, lr_schedule="cosine", learning_rate=1.0, epochs=10, warmup_epochs=2.0)
    assert learning_rate(cosine, 0) < 0.01 and learning_rate(cosine, 10) == pytest.approx(0)
    assert learning_rate(cosine, 5) == pytest.approx(0.5) and learning_rate(cosine, 1) == pytest.approx(
        0.505 * 0.5 * (1 + math.cos(math.pi / 10))
    )


@pytest.mark.parametrize("select_by", ["i2r_recall_10", "r2i_medr"])
@pytest.mark.parametrize("patience", [1, 3])
def test_plateau_is_that_of_torch(select_by, patience):
    """From the history alone, after each epoch of a noisy one."""
    scores = (np.random.default_rng(0).integers(0, 12, 60) + np.minimum(np.arange(60), 20) / 4).tolist()
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    mode = "min" if "medr" in select_by else "max"
    # eps: torch takes no smaller steps than it.
    torchs = ReduceLROnPlateau(optimizer, mode, 0.5, patience, threshold=0, threshold_mode="abs", eps=0)
    options = {"lr_step_epochs": patience, "lr_factor": 0.5, "select_by": select_by, "learning_rate": 1.0}
    config, rates = replace(CONFIG, lr_schedule="plateau", **options), []
    for epoch in range(60):
        rates.append(learning_rate(config, epoch + 0.5, scores[:epoch]))
        assert rates[-1] == optimizer.param_groups[0]["lr"]
        optimizer.step()
        torchs.step(scores[epoch])
    assert len(set(rates)) > 3


def test_the_best_epoch_is_the_first_of_equals():
    assert best_epoch([0.1, 0.3, 0.3, 0.2], "i2r_recall_1") == 1 and best_epoch([5.0, 2.5, 3.0, 2.5], "r2i_medr") == 1


STOPS = replace(
    CONFIG, epochs=40, learning_rate=1e-6, select_by="r2i_medr", patience=3
)  # so slow that nothing gets better


def test_training_stops_out_of_patience_and_a_killed_one_stops_there_too(tiny_store, tiny_config, tmp_path):
    config = replace(STOPS, lr_schedule="plateau", lr_step_epochs=1, lr_factor=0.5)
    history = train(fresh(tiny_config), tiny_store, config, tmp_path / "whole")
    best = best_epoch(history["val_r2i_medr"], "r2i_medr")
    assert len(history) == best + 1 + 3 < 40
    killed_after(len(history) - 2, tiny_store, tiny_config, config, tmp_path / "in the middle")
    # After the last checkpoint, before anything that looks finished.
    shutil.copytree(tmp_path / "whole", tmp_path / "at the end")
    for name in ("model.safetensors", "history.csv"):
        (tmp_path / "at the end" / name).unlink()
    whole = load_file(tmp_path / "whole/model.safetensors")
    for name in ("in the middle", "at the end"):
        system = fresh(tiny_config)
        again = train(system, tiny_store, config, tmp_path / name)
        pd.testing.assert_frame_equal(again.drop(columns="seconds"), history.drop(columns="seconds"))
        assert all(torch.equal(whole[name], value) for name, value in system.state_dict().items())


def test_another_score_chooses_the_checkpoint(tiny_store, tiny_config, tmp_path):
    system = fresh(tiny_config)
    history = train(system, tiny_store, replace(CONFIG, epochs=5, select_by="r2i_recall_10"), tmp_path)
    found = encode(system.eval(), tiny_store.split("val"), crop=48)
    rows = {row["direction"]: row for row in evaluate(found.embedding, found.recipes, candidates=24)}
    assert rows["r2i"]["recall_10"] == pytest.approx(history["val_r2i_recall_10"].max(), abs=1.5 / 24)


def test_what_is_frozen_is_trained_by_nobody(tiny_store, tiny_config, tmp_path):
    """Through Lightning's own switching between training and validation, and again where debiasing is attached."""
    config = replace(tiny_config, frozen=("conv1", "bn1", "layer1"))
    baseline = fresh(config)
    before = {name: value.clone() for name, value in baseline.state_dict().items()}
    train(baseline, tiny_store, replace(CONFIG, weight_decay=0.5), tmp_path / "baseline")
    system = attach(load_system(tmp_path / "baseline"), VARIANTS["equal_compute"])
    train(system, tiny_store, replace(CONFIG, weight_decay=0.5), tmp_path / "more")
    frozen = tuple(f"image_encoder.backbone.{part}." for part in config.frozen)
    for after in (load_system(tmp_path / "baseline"), system):
        moved = {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
        assert moved and not [name for name in moved if name.startswith(frozen)]
    assert any(name.startswith("image_encoder.backbone.layer2") and "running" in name for name in moved)
    table = parameter_table(system, 4)
    assert table.loc["image_encoder.backbone.layer1.0", "trainable"] == 0 < table["frozen"]["total"]


def test_nothing_trained_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trained system here"):
        load_system(tmp_path)


# ---- CLIP towers, descriptions, segments ----

CLIP = replace(CONFIG, crop_size=56, loss="circle", margin=0.25, precision="32-true")


def test_every_level_learns_and_no_tower_moves(clip_store, clip_config, tmp_path):
    system = fresh(clip_config)
    before = {k: v.clone() for k, v in system.state_dict().items()}
    history = train(system, clip_store, replace(CLIP, epochs=4), tmp_path / "a", kept=tmp_path)
    for level in ("retrieval", "segment", "description", "self_supervised"):
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
    assert history["segment"].iloc[-1] < history["segment"].iloc[0]
    assert not list(tmp_path.glob("segments-*.npy")), "they change at every step: nothing to keep"


@pytest.mark.parametrize("there", [[0, 2, 3], []])
@pytest.mark.parametrize("loss", ["circle", "triplet"])
def test_photos_without_segments_are_no_pairs(clip_store, clip_config, loss, there):
    batch = StudyDataset(clip_store.split("train"), 56, descriptions=True, segments=2)[Draw(np.arange(4), True, 0)]
    system, between = fresh(replace(clip_config, dropout=0.0)), pair_loss(replace(CLIP, loss=loss))
    batch.segment_mask[[i for i in range(4) if i not in there]] = False
    step = Step(batch, between, lambda _: 1.0, lambda *parts: parts, lambda _: None)
    losses = system.losses(step)
    assert all(torch.isfinite(value) for value in losses.values())
    segments = system.encode_segments(batch.segments, batch.segment_mask)[there].detach()
    recipes = system.encode_recipes(batch.recipes).embedding[there].detach()
    assert losses["segment"].item() == pytest.approx(float(between(segments, recipes)) if there else 0.0, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "over"), [("circle", "batch"), ("circle_per_query", "query"), ("circle_released", "triangle")]
)
def test_the_circle_losses_by_name(loss, over):
    a, b = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    found = pair_loss(replace(CLIP, loss=loss, circle_gamma=8.0))(a, b)
    assert torch.equal(found, circle_loss(a, b, margin=0.25, gamma=8.0, over=over))


def test_weights_of_the_levels_take_them_out(clip_store, clip_config, tmp_path):
    off = replace(CLIP, epochs=1, weights={"segment": 0.0, "description": 0.0, "self_supervised": 0.0})
    history = train(fresh(clip_config), clip_store, off, tmp_path)
    assert not {"segment", "description", "self_supervised"} & set(history) and history["retrieval"][0] > 0


def test_towers_learn_to_pair_photos_with_captions(clip_store, clip_config, tmp_path):
    torch.manual_seed(0)
    towers = bare_towers(build(clip_config))
    history = train(towers, clip_store, replace(CLIP, epochs=4), tmp_path)
    assert history["retrieval"].iloc[-1] < 0.9 * history["retrieval"].iloc[0]
    assert "self_supervised" not in history, "a caption has no parts, so text-only recipes train nothing"


def test_a_killed_training_of_clip_goes_on(clip_store, clip_config, tmp_path):
    whole = train(fresh(clip_config), clip_store, CLIP, tmp_path / "whole")
    killed_after(2, clip_store, clip_config, CLIP, tmp_path / "killed")
    again = train(fresh(clip_config), clip_store, CLIP, tmp_path / "killed")
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), whole.drop(columns="seconds"))
