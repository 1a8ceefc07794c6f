"""A user's system in one Python file: through all five notebooks, its game played fairly, killed and resumed."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from recipe_lib.causal.debiasing import VARIANTS
from recipe_lib.systems import methods
from recipe_lib.systems.base import SystemConfig
from recipe_lib.systems.registry import build, system_class
from recipe_lib.systems.saving import load_system
from recipe_lib.training.fit import TrainingConfig, TrainingTask, train
from tests.training.test_fit import killed_after

ROOT = Path(__file__).parents[2]
FILE = str(Path(__file__).with_name("my_system.py"))
CONFIG = TrainingConfig(
    epochs=2, batch_size=32, crop_size=48, optimizer="adamw", learning_rate=5e-3, lr_schedule="cosine", seed=5
)


@pytest.fixture
def config(tiny_store) -> SystemConfig:
    classes = len(tiny_store.classes.names)
    return SystemConfig(tiny_store.card["vocabulary"], classes, method="mine", system_file=FILE, embed_dim=16)


def fresh(config):
    torch.manual_seed(0)
    return build(config)


def test_through_all_five_notebooks_by_a_parameter_file_with_every_variant(tmp_path):
    """No edit anywhere but in the two files: causal module, dictionary, controls and evaluation take it as it is."""
    params = tmp_path / "mine.yaml"
    lines = ["study: mine", "system: mine", "method: mine", f'system_file: "{FILE}"', 'system_args: ["hidden: 8"]']
    lines += ["epochs: 1", "debias_epochs: 1", f"variants: [{', '.join(VARIANTS)}]"]
    params.write_text("\n".join(lines))
    run = [sys.executable, "-m", "recipe_lib.runner.run", "params/smoke.yaml", str(params)]
    done = subprocess.run([*run, "--outputs", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    results = pd.read_csv(tmp_path / "out/mine/results.csv")
    assert set(results["system"]) == {"mine"}
    assert {"baseline", *VARIANTS} <= set(results["variant"])
    history = pd.read_csv(tmp_path / "out/mine/02_baseline_training/history.csv")
    assert {"retrieval", "critic", "alignment"} <= set(history.columns)


def test_critic_and_encoders_train_apart(tiny_store, config, tmp_path):
    """In one's turn the other stands still, whatever the losses reach."""
    system = fresh(config)
    start = {name: value.clone() for name, value in system.state_dict().items()}

    class Leaking(type(system)):
        def losses(self, step):
            trains = {name for name, p in self.named_parameters() if p.requires_grad}
            names = {name for name, _ in self.named_parameters()}
            critics = {name for name in names if name.startswith("objectives.")}
            assert trains == (critics if step.player == "critic" else names - critics), step.player
            if step.player == "main":
                return {}
            image = self.encode_images(step.batch).embedding  # not detached
            return {"critic": self.objectives["critic"](image).square().mean(), "retrieval": image.sum() * 0}

    system.__class__ = Leaking
    history = train(system, tiny_store, replace(CONFIG, epochs=1), tmp_path)
    moved = {name for name, value in system.named_parameters() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if name.startswith("objectives.critic")}
    assert history["critic"].iloc[0] > 0


def test_every_parameter_has_one_player(tiny_store, config):
    system = fresh(config)
    assert not TrainingTask(system, CONFIG).automatic_optimization and list(system.players()) == ["critic", "main"]
    critic, main = system.players().values()
    assert not {id(p) for p in critic} & {id(p) for p in main}
    assert len(critic) + len(main) == len(list(system.parameters()))


def test_players_learn_and_critics_are_no_part_of_the_model(tiny_store, config, tmp_path):
    system = fresh(config)
    history = train(system, tiny_store, replace(CONFIG, epochs=6), tmp_path)
    assert history["retrieval"].iloc[-1] < history["retrieval"].iloc[0]
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names and not any(name.startswith("objectives.") for name in names)
    assert all(name.startswith("objectives.") for name in load_file(tmp_path / "objectives.safetensors"))
    again = load_system(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in system.state_dict().items())


def test_kill_9_and_resume_restore_every_player(tiny_store, config, tmp_path, capsys):
    four = replace(CONFIG, epochs=4)
    train(fresh(config), tiny_store, four, tmp_path / "whole")
    killed_after(2, tiny_store, config, four, tmp_path / "killed")
    train(fresh(config), tiny_store, four, tmp_path / "killed")
    assert "resuming" in capsys.readouterr().out
    for name in ("model", "objectives"):
        whole, resumed = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "killed"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), name


@pytest.mark.parametrize(
    ("method", "file", "word"),
    [
        ("hit", "", "no such system; there are acme, adamine, captions, dar, ht, ht_sentence, je, r2gan, tnlbt"),
        ("ours", FILE, "has no such subclass of System; it has mine"),
        ("mine", "no/such/file.py", "no such file"),
    ],
)
def test_unknown_systems_are_named(method, file, word):
    with pytest.raises(ValueError, match=word):
        system_class(method, file)


def test_a_broken_file_and_unknown_arguments_say_so_in_one_line(config, tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    with pytest.raises(ValueError, match=r"cannot be imported \(ModuleNotFoundError"):
        system_class("mine", str(tmp_path / "broken.py"))
    with pytest.raises(ValueError, match="mine has alignment, hidden"):
        build(replace(config, system_args=("aligment: 1",)))


def test_systems_load_lazily():
    assert {"ht", "dar"} <= set(methods())
    code = "import sys; from recipe_lib.systems.registry import system_class; system_class('ht'); "
    code += "sys.exit('open_clip' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
