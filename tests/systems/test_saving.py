import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from recipe_lib.causal.debiasing import VARIANTS
from recipe_lib.systems.attach import attach
from recipe_lib.systems.registry import build
from recipe_lib.systems.saving import load_system, save_system
from recipe_lib.training.fit import TrainingConfig, train

CONFIG = TrainingConfig(epochs=2, batch_size=32, crop_size=48, optimizer="adamw", learning_rate=2e-3, seed=5)
BACKBONE = "image_encoder.backbone."


@pytest.fixture
def baseline(tiny_config):
    torch.manual_seed(0)
    return build(replace(tiny_config, frozen=("all",)))


def test_what_never_trains_is_written_once(baseline, tiny_store, tmp_path):
    """By the baseline; checkpoints leave it out, variants link to it."""
    before, after = tmp_path / "baseline", tmp_path / "variant"
    train(baseline, tiny_store, CONFIG, before)
    frozen, model = load_file(before / "frozen.safetensors"), load_file(before / "model.safetensors")
    assert frozen.keys() == {n for n, p in baseline.named_parameters() if n.startswith(BACKBONE)}
    assert not frozen.keys() & model.keys() and frozen.keys() | model.keys() == baseline.state_dict().keys()
    checkpoint = torch.load(before / "last.ckpt", weights_only=True)
    (best,) = [state["best"] for state in checkpoint["callbacks"].values() if "best" in state]
    assert not frozen.keys() & best.keys()
    assert {name.removeprefix("system.") for name in checkpoint["state_dict"]} == model.keys()
    train(attach(load_system(before), VARIANTS["equal_compute"]), tiny_store, CONFIG, after, kept=before)
    assert os.path.samefile(before / "frozen.safetensors", after / "frozen.safetensors")
    variant = load_system(after).state_dict()
    assert all(torch.equal(variant[name], value) for name, value in frozen.items())
    assert not torch.equal(variant["image_encoder.fc.weight"], model["image_encoder.fc.weight"])


def test_without_hard_links_it_is_a_copy(baseline, tmp_path, monkeypatch):
    for name in ("baseline", "variant"):
        (tmp_path / name).mkdir()
    save_system(baseline, tmp_path / "baseline")

    def refused(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refused)
    save_system(baseline, tmp_path / "variant", tmp_path / "baseline")
    files = [tmp_path / name / "frozen.safetensors" for name in ("baseline", "variant")]
    assert not os.path.samefile(*files) and files[0].read_bytes() == files[1].read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_other_frozen_weights_are_not_linked(baseline, tiny_config, tmp_path):
    for name in ("baseline", "other"):
        (tmp_path / name).mkdir()
    save_system(baseline, tmp_path / "baseline")
    torch.manual_seed(1)
    other = build(baseline.config)
    save_system(other, tmp_path / "other", tmp_path / "baseline")
    again = load_system(tmp_path / "other").state_dict()
    assert all(torch.equal(again[name], value) for name, value in other.state_dict().items())
    shutil.copy(tmp_path / "baseline/frozen.safetensors", tmp_path / "other/frozen.safetensors")
    with pytest.raises(ValueError, match=r"other/frozen.safetensors: not the frozen weights of model.safetensors"):
        load_system(tmp_path / "other")
    (tmp_path / "other/frozen.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"frozen.safetensors"):
        load_system(tmp_path / "other")


def test_a_system_that_trains_whole_is_one_file(tiny_config, tmp_path):
    save_system(build(tiny_config), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "system.json"}
    assert json.loads((tmp_path / "system.json").read_text())["frozen"] == []
