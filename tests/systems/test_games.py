"""Games are honest: who moves in whose turn, what a loss is made of, what is saved, resumed and said."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from recipe_lib.causal.debiasing import VARIANTS
from recipe_lib.data.loading import Draw, StudyDataset
from recipe_lib.losses import circle_loss, triplet_loss
from recipe_lib.objectives.critic import critic_loss
from recipe_lib.runner.params import declared, load
from recipe_lib.systems.attach import attach
from recipe_lib.systems.base import Step, System, SystemConfig, parameter_table
from recipe_lib.systems.games import balanced
from recipe_lib.systems.registry import build
from recipe_lib.systems.saving import load_system
from recipe_lib.training.fit import TrainingConfig, TrainingTask, train
from tests.training.test_fit import killed_after, without_time

CONFIG = TrainingConfig(
    epochs=2, batch_size=32, crop_size=48, optimizer="adamw", learning_rate=2e-3, lr_schedule="cosine", seed=5,
    mining="hardest", weights={"alignment": 0.05, "translation": 0.02},
)  # fmt: skip
SMALL = ("picture: 16", "channels: 4", "code: 8", "noise: 4", "hidden: [8]")
DECODER = (*SMALL, "decoder_layers: 1", "decoder_heads: 2")


def fresh(config):
    torch.manual_seed(0)
    return build(config)


@pytest.fixture
def tnlbt(tiny_config) -> SystemConfig:
    return replace(tiny_config, method="tnlbt", system_args=DECODER)


@pytest.fixture
def batch(tiny_store):
    return StudyDataset(tiny_store.split("train"), 48, visible=True)[Draw(np.arange(8), True, 0)]


def step_of(batch, player="main", weights=lambda _: 1.0, figures=None, **more):
    log = ({} if figures is None else figures).update
    return Step(batch, triplet_loss, weights, lambda *parts: parts, log, player=player, shared={}, **more)


# ---- who moves ----


def test_every_parameter_has_one_player(tnlbt):
    system = fresh(tnlbt)
    players = system.players()
    assert list(players) == ["critic", "discriminator", "main"], "opponents move first"
    ids = [id(p) for own in players.values() for p in own]
    assert len(ids) == len(set(ids)) == len(list(system.parameters()))
    for name in ("critic", "discriminator"):
        assert [id(p) for p in players[name]] == [id(p) for p in system.objectives[name].parameters()]
    main = {id(p) for p in players["main"]}
    assert all(
        id(p) in main for name in ("generator", "ingredients", "decoder") for p in system.objectives[name].parameters()
    )


@pytest.mark.parametrize("player", ["critic", "discriminator", "main"])
def test_gradients_stay_with_the_player_whose_turn_it_is(tnlbt, batch, player):
    """Even where nothing is held fixed from outside, an opponent's loss reaches nobody else."""
    system = fresh(tnlbt)
    losses = system.losses(step_of(batch, player))
    torch.stack([*losses.values()]).sum().backward()
    reached = {name for name, p in system.named_parameters() if p.grad is not None and p.grad.any()}
    if player != "main":
        assert reached and all(name.startswith(f"objectives.{player}.") for name in reached)
    else:
        parts = ("image_encoder.", "recipe_encoder.", "projections.", "objectives.generator.", "objectives.decoder.")
        assert all(any(name.startswith(part) for name in reached) for part in (*parts, "objectives.ingredients."))


def test_only_the_player_moves(tiny_store, tnlbt, tmp_path, monkeypatch):
    """Through Lightning: after each optimizer's step exactly its own parameters are others."""
    system, moves = fresh(tnlbt), []
    losses_of = type(system).losses
    last = {name: p.detach().clone() for name, p in system.named_parameters()}

    def losses(self, step):
        moves.append((step.player, {name for name, p in self.named_parameters() if not torch.equal(p, last[name])}))
        last.update({name: p.detach().clone() for name, p in self.named_parameters()})
        return losses_of(self, step)

    monkeypatch.setattr(type(system), "losses", losses)
    train(system, tiny_store, replace(CONFIG, epochs=1, optimizer="adam"), tmp_path)
    players = [player for player, _ in moves]
    assert players[:4] == ["critic", "discriminator", "main", "critic"]
    for (player, _), (_, moved) in pairwise(moves):
        opponent = {name for name in moved if name.startswith(("objectives.critic.", "objectives.discriminator."))}
        if player == "main":
            assert not opponent
        else:
            assert moved == opponent and all(name.startswith(f"objectives.{player}.") for name in moved)


def test_without_a_weight_an_opponent_does_not_play(tiny_store, tnlbt, tmp_path):
    system = fresh(tnlbt)
    before = {name: value.clone() for name, value in system.state_dict().items()}
    history = train(
        system, tiny_store, replace(CONFIG, epochs=1, weights={"alignment": 0.0, "translation": 0.0}), tmp_path
    )
    assert not {"critic", "discriminator", "alignment", "translation"} & set(history)
    moved = {name for name, value in system.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not any(name.startswith("objectives.") for name in moved)


# ---- what the losses are ----


def test_losses_by_hand(tnlbt, batch):
    """Each part again from what the modules give, one row at a time."""
    system = fresh(replace(tnlbt, system_args=SMALL)).eval()  # the code is its mean, BatchNorm reads no other row
    system.objectives["generator"].noise = 0
    first = system.objectives["generator"].first
    system.objectives["generator"].first = torch.nn.Linear(first.in_features - 4, first.out_features, bias=False)
    figures = {}
    with torch.no_grad():
        losses = system.losses(step_of(batch, figures=figures))
        image, recipe = system.encode_images(batch).embedding, system.encode_recipes(batch.recipes).embedding
        scores, pictures, told = [], [], []
        for i in range(8):
            scores.append(-float(system.objectives["critic"](recipe[i : i + 1])))
            painted = system.objectives["generator"](recipe[i : i + 1])
            p = torch.sigmoid(system.objectives["discriminator"](painted.pictures, painted.mean))
            divergence = 0.5 * (painted.mean**2 + painted.log_variance.exp() - 1 - painted.log_variance).mean()
            pictures.append(float(-p.log() + 2 * divergence))
            q = torch.sigmoid(system.objectives["ingredients"](image[i]))
            told.append(float(F.binary_cross_entropy(q, batch.labels[i])))
    assert float(losses["alignment"]) == pytest.approx(np.mean(scores), rel=1e-4)
    assert float(figures["game_picture"]) == pytest.approx(np.mean(pictures), rel=1e-4)
    assert float(figures["game_ingredients"]) == pytest.approx(np.mean(told), rel=1e-4)
    assert float(losses["translation"]) == pytest.approx(2 * min(np.mean(pictures), np.mean(told)), rel=1e-4)
    assert float(losses["retrieval"]) == pytest.approx(float(triplet_loss(image, recipe)), rel=1e-4)


def test_opponents_losses_by_hand(tnlbt, batch):
    system = fresh(replace(tnlbt, system_args=SMALL)).eval()
    figures = {}
    still = system.still(step_of(batch))
    torch.manual_seed(4)
    found = system.losses(step_of(batch, "critic", figures=figures, **{}))["critic"]
    torch.manual_seed(4)
    torch.randn(8, 4)  # the generator's noise
    image, recipe = system.encode_images(batch).embedding, system.encode_recipes(batch.recipes).embedding
    loss, gap, slope = critic_loss(system.objectives["critic"], image, recipe)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    assert (float(figures["game_gap"]), float(figures["game_slope"])) == pytest.approx(
        (float(gap), float(slope)), rel=1e-5
    )
    step = step_of(batch, "discriminator", figures=figures)
    step.shared["still"] = still
    loss = system.losses(step)["discriminator"]
    naive = []
    for i in range(8):
        photo = F.interpolate(batch.images[i : i + 1] / 127.5 - 1, (16, 16), mode="bilinear", antialias=True)
        judge = system.objectives["discriminator"]
        p, q = (
            torch.sigmoid(judge(x, still.painted.mean[i : i + 1])) for x in (photo, still.painted.pictures[i : i + 1])
        )
        naive.append(float(-p.log() - (1 - q).log()))
    assert float(loss) == pytest.approx(np.mean(naive), rel=1e-3)


def test_balanced_losses_weigh_alike():
    a, b = (torch.tensor(value, requires_grad=True) for value in (6.0, 1.5))
    total = balanced(a * 1.0, b * 1.0)
    total.backward()
    assert float(total) == pytest.approx(3.0) and float(a.grad) == pytest.approx(0.25) and float(b.grad) == 1.0
    assert torch.isfinite(balanced(torch.zeros(()), torch.ones(())))


def test_hardest_negatives_are_mined_between_photo_and_recipe_alone(tnlbt, batch):
    """Components meet all negatives, with the same margin, and the loss may be one without mining."""
    system = fresh(tnlbt)
    components = system.encode_recipes(batch.recipes).components
    hardest = system.self_supervised_loss(components, partial(triplet_loss, margin=0.2, mining="hardest"))
    torch.testing.assert_close(
        hardest, System.self_supervised_loss(system, components, partial(triplet_loss, margin=0.2))
    )
    circle = partial(circle_loss, margin=0.25)
    torch.testing.assert_close(
        system.self_supervised_loss(components, circle), System.self_supervised_loss(system, components, circle)
    )


def test_the_true_labels_of_an_oracle_do_not_reach_the_game(tnlbt, batch):
    """z may be made of the labels that the photo is to tell."""
    dictionary = torch.randn(20, 16, generator=torch.Generator().manual_seed(2))
    system = attach(fresh(tnlbt), VARIANTS["oracle"], dictionary).eval()
    torch.nn.init.normal_(system.adjustment.value.weight)
    still = [system.still(step_of(replace(batch, labels=x))).image for x in (batch.labels, 1 - batch.labels)]
    assert torch.equal(*still) and system.encode_images(batch).z.abs().max() > 0


@pytest.mark.parametrize("method", ["tnlbt", "acme", "r2gan"])
def test_every_variant_attaches_and_plays_on(tiny_config, batch, method):
    """With the baseline's weights, opponents among them; whatever is attached, all players have their turns."""
    arguments = SMALL if method != "r2gan" else SMALL[:-1]
    baseline = fresh(replace(tiny_config, method=method, system_args=arguments)).eval()
    small = {"classifier_dim": 16, "classifier_heads": 2, "classifier_feedforward": 32}
    for name, variant in VARIANTS.items():
        torch.manual_seed(1)
        dictionary, prior = torch.randn(20, baseline.recipe_encoder.dim), torch.linspace(0.1, 0.9, 20)
        system = attach(baseline, replace(variant, **small), dictionary, prior).eval()
        assert torch.equal(system.encode_images(batch).embedding, baseline.encode_images(batch).embedding), name
        step = step_of(batch, weights=lambda loss: 0.0 if loss == "category" else 1.0)
        for player in system.players():
            losses = system.losses(step._replace(player=player))
            assert losses and all(torch.isfinite(loss) for loss in losses.values()), (name, player)


# ---- the generator ----


def test_a_fused_condition_is_for_training_alone(tnlbt, batch):
    """Embeddings, so retrieval, are the same whatever the decoder does; pictures are not."""
    system = fresh(tnlbt).eval()
    image, recipes = system.encode_images(batch), system.encode_recipes(batch.recipes)
    own, alone = system.paint(image, recipes), system.paint(image._replace(features=None), recipes)
    assert own.shape == (8, 3, 16, 16) and own.min() >= 0 and own.max() <= 1
    assert torch.equal(own, system.paint(image, recipes)) and not torch.equal(own, alone)
    with torch.no_grad():
        for p in system.objectives["decoder"].parameters():
            p.zero_()
    assert not torch.equal(system.paint(image, recipes), own)
    assert torch.equal(system.encode_images(batch).embedding, image.embedding)
    plain = fresh(replace(tnlbt, system_args=SMALL)).eval()
    assert torch.equal(plain.condition(image, recipes), recipes.embedding)


# ---- what is left behind ----


def test_it_learns_and_opponents_are_no_part_of_the_model(tiny_store, tnlbt, tmp_path):
    system = fresh(tnlbt)
    history = train(system, tiny_store, replace(CONFIG, epochs=3, mining="all"), tmp_path)
    assert history["retrieval"].iloc[-1] < 0.9 * history["retrieval"].iloc[0]
    assert history["critic"].iloc[-1] < history["critic"].iloc[0]
    assert history["game_ingredients"].iloc[-1] < history["game_ingredients"].iloc[0]
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names and not any(name.startswith("objectives.") for name in names)
    kept = {name.split(".")[1] for name in load_file(tmp_path / "objectives.safetensors")}
    assert kept == {"critic", "discriminator", "generator", "ingredients", "decoder"}
    again = load_system(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in system.state_dict().items())


def test_kill_9_and_resume_restore_every_player(tiny_store, tnlbt, tmp_path, capsys):
    """With gradient caching and its replayed random numbers too."""
    two = replace(CONFIG, chunk=16)
    train(fresh(tnlbt), tiny_store, two, tmp_path / "whole")
    killed_after(1, tiny_store, tnlbt, two, tmp_path / "killed")
    train(fresh(tnlbt), tiny_store, two, tmp_path / "killed")
    assert "resuming" in capsys.readouterr().out
    assert without_time(tmp_path / "whole").equals(without_time(tmp_path / "killed"))
    for name in ("model", "objectives"):
        whole, resumed = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "killed"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), name


def test_two_devices_play_in_chunks_as_without(tiny_store, tnlbt, tmp_path):
    """Where no row depends on another (LayerNorm, no dropout, no pictures) the figures are those of whole shares."""
    config = replace(tnlbt, dropout=0.0, image_model="test_vit", image_model_args=("img_size: 48",))
    two = replace(CONFIG, epochs=1, devices=2, weights={"alignment": 0.05, "translation": 0.0})
    whole, chunked = (
        train(fresh(config), tiny_store, replace(two, chunk=chunk), tmp_path / str(chunk)).drop(columns="seconds")
        for chunk in (0, 8)
    )
    pd.testing.assert_frame_equal(whole, chunked, rtol=1e-3)
    assert {"critic", "alignment"} <= set(whole) and "discriminator" not in whole


def test_a_collapsed_game_is_seen_and_said(tiny_store, tnlbt, tmp_path, capsys):
    """A generator that paints one picture, against which the discriminator cannot lose."""
    system = fresh(tnlbt)
    with torch.no_grad():
        for p in system.objectives["generator"].paint.parameters():
            p.zero_()
    for p in system.objectives["generator"].parameters():
        p.requires_grad_(False)
    history = train(system, tiny_store, replace(CONFIG, epochs=1), tmp_path)
    said = capsys.readouterr().out
    assert history["game_spread"].max() < 0.01 and said.count("the game collapsed: painted pictures differ 0.000") == 1
    assert system.remarks({"discriminator": 0.01, "game_spread": 0.9})[0].startswith("the game is lost")
    assert system.remarks({"discriminator": 1.1, "game_spread": 0.9}) == system.remarks({}) == []


def test_betas_of_the_optimizers(tnlbt):
    optimizers = TrainingTask(fresh(tnlbt), replace(CONFIG, adam_beta1=0.5)).configure_optimizers()
    assert [o.defaults["betas"] for o in optimizers] == [(0.5, 0.999)] * 3


# ---- the papers' size, and the notebooks ----

ROOT = Path(__file__).parents[2]
HT_VIT = 129_579_776  # with 16,000 words
GAME = {"critic": 656_385, "generator": 21_018_848, "discriminator": 18_825_985, "ingredients": 784_628}
SIZES = {"tnlbt": HT_VIT + sum(GAME.values()), "tnlbt_margins_decoder": HT_VIT + sum(GAME.values()) + 18_261_504}


@pytest.mark.parametrize(("method", "total"), SIZES.items())
def test_the_papers_size(method, total):
    """No count is published; H-T's own is of its paper, the game's of ACME's layers."""
    names = ("recipe1m", f"methods/{method}", f"methods/{method}_recipe1m")
    values = load(
        [ROOT / f"params/{name}.yaml" for name in names], [], declared(sorted((ROOT / "notebooks").glob("0*")))
    )
    with torch.device("meta"):
        config = SystemConfig.gather(values, vocabulary=16_000, num_classes=500, pretrained=False)
        table = parameter_table(build(config))["trainable"]
    assert {name: table[f"objectives.{name}"] for name in GAME} == GAME and table["total"] == total
    training = TrainingConfig.gather(values)
    assert (training.batch_size, training.chunk, training.mining) == (1024, 64, "hardest")
    assert training.weights["alignment"] == 0.005 and training.weights["translation"] == 0.002
    margins = [training.margin_at(epoch) for epoch in (0, 10, 49, 60)]
    assert margins == pytest.approx([0.05, 0.1, 0.295, 0.3] if "margins" in method else [0.3] * 4)


def test_through_all_five_notebooks(tmp_path):
    """Causal module attached with its control, in chunks, with text-only recipes; pictures painted in notebook 2."""
    options = ["-p", "chunk", "16", "-p", "epochs", "1", "-p", "debias_epochs", "1"]
    options += ["-p", "system_args", json.dumps(DECODER)]
    files = ["params/smoke.yaml", "params/methods/tnlbt_margins_decoder.yaml"]
    run = [sys.executable, "-m", "recipe_lib.runner.run", *files, *options, "--outputs", str(tmp_path)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    study = tmp_path / "smoke_tnlbt_margins_decoder"
    results = pd.read_csv(study / "results.csv")
    assert {"baseline", "equal_compute", "debiased", "debiased@no_z"} <= set(results["variant"])
    for folder in ("02_baseline_training", "04_debiasing_training/debiased"):
        history = pd.read_csv(study / folder / "history.csv")
        assert {"critic", "discriminator", "alignment", "translation", "game_spread"} <= set(history)
    assert (study / "02_baseline_training/painted.png").is_file() and (
        study / "02_baseline_training/game.png"
    ).is_file()
