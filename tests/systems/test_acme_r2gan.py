"""ACME and R2GAN: what their losses are made of, whom they move, at the papers' size, and through the notebooks."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from recipe_lib.data.loading import Draw, StudyDataset
from recipe_lib.losses import category_loss, nearest_triplet_loss, picture_triplet_loss, triplet_loss
from recipe_lib.objectives.discriminator import as_pictures
from recipe_lib.runner.params import declared, load
from recipe_lib.systems.base import Step, SystemConfig, parameter_table
from recipe_lib.systems.registry import build
from recipe_lib.systems.saving import load_system, save_system
from recipe_lib.training.fit import TrainingConfig
from tests.systems.test_recurrent import LSTMS, PHOTO, RECIPE, WORDS

ROOT = Path(__file__).parents[2]
SMALL = ("instruction_dim: 12", "picture: 16", "channels: 4", "code: 8", "noise: 4")
ARGS = {"acme": (*SMALL, "hidden: [8]"), "r2gan": SMALL}


def fresh(config, method, *more, **changes):
    torch.manual_seed(0)
    return build(replace(config, method=method, system_args=(*ARGS[method], *more), num_categories=5, **changes))


@pytest.fixture
def batch(tiny_store):
    batch = StudyDataset(tiny_store.split("train"), 48)[Draw(np.arange(8), True, 0)]
    batch.category = torch.tensor([0, 1, -1, -1, 2, 2, 0, 1])
    return batch


def step_of(batch, player="main", figures=None, chunk=0):
    loss, log = partial(triplet_loss, mining="non_zero"), ({} if figures is None else figures).update
    return Step(batch, loss, lambda _: 1.0, lambda *parts: parts, log, player=player, chunk=chunk, shared={})


def test_the_head_does_not_wait_with_a_frozen_backbone(tiny_config):
    system = fresh(tiny_config, "acme")
    system.train_parts(backbone=False, rest=True)
    assert all(part.training for part in system.image_encoder.fc.modules()), "its statistics belong to it"
    assert not any(part.training for part in system.image_encoder.backbone.modules())
    system.train_parts(backbone=True, rest=False)
    assert not system.image_encoder.fc.training and system.image_encoder.backbone.training


@pytest.mark.parametrize("method", ARGS)
@pytest.mark.parametrize("chunk", [0, 3])
def test_gradients_stay_with_the_player_whose_turn_it_is(tiny_config, batch, method, chunk):
    """As in training: the others' parameters are held fixed, and each of one's own is moved."""
    system = fresh(tiny_config, method)
    players = system.players()
    ids = [id(p) for own in players.values() for p in own]
    assert len(ids) == len(set(ids)) == len(list(system.parameters())) and list(players)[-1] == "main"
    for player, own in players.items():
        mine = {id(p) for p in own}
        for p in system.parameters():
            p.requires_grad_(id(p) in mine).grad = None
        losses = system.losses(step_of(batch, player, chunk=chunk))
        torch.stack([*losses.values()]).sum().backward()
        reached = {id(p) for p in system.parameters() if p.grad is not None}
        assert reached == mine, player
    for p in system.parameters():
        p.requires_grad_(True).grad = None
    for player in list(players)[:-1]:  # nor, with nothing held fixed, do the encoders feel an opponent
        torch.stack([*system.losses(step_of(batch, player)).values()]).sum().backward()
    encoders = [*system.image_encoder.parameters(), *system.recipe_encoder.parameters()]
    assert all(p.grad is None for p in encoders)


def test_acme_by_hand(tiny_config, batch):
    system = fresh(tiny_config, "acme").eval()
    torch.manual_seed(1)
    figures = {}
    losses = system.losses(step_of(batch, figures=figures))
    image, recipes = system.encode_images(batch), system.encode_recipes(batch.recipes)
    assert losses["retrieval"].item() == pytest.approx(
        nearest_triplet_loss(image.embedding, recipes.embedding, 0.3).item(), rel=1e-5
    )
    # Before the head: tanh of the encoders' own last layer.
    joined = torch.cat(recipes.components, 1)
    before = torch.tanh(F.linear(joined, *system.recipe_encoder.fc[0].parameters()))
    assert losses["alignment"].item() == pytest.approx(-system.objectives["critic"](before).mean().item(), rel=1e-5)
    unit = image.embedding / image.embedding.norm(dim=1, keepdim=True)
    p, kinds = torch.sigmoid(system.objectives["ingredients"](unit)), system.objectives["categories"](unit)
    told = [F.binary_cross_entropy(p[i], batch.labels[i]).item() for i in range(8)]
    for i, category in enumerate(batch.category.tolist()):
        told[i] += -kinds[i].log_softmax(0)[category].item() if category >= 0 else 0.0
    assert float(figures["game_ingredients"]) == pytest.approx(np.mean(told), rel=1e-4)


def test_the_discriminator_learns_categories_from_photos(tiny_config, batch):
    """The code trains that branch nowhere; nothing of a painted picture's category moves it."""
    system = fresh(tiny_config, "acme")
    step = step_of(batch, "discriminator")
    still = system.still(step)
    branch = system.objectives["discriminator"].category[1].weight
    system.losses(step)["discriminator"].backward()
    judge = system.objectives["discriminator"]
    assert torch.equal(still.photos, as_pictures(batch.images, 16))
    expected = category_loss(judge.category(judge.features(still.photos)), batch.category)
    (slope,) = torch.autograd.grad(expected, branch)
    assert slope.abs().max() > 0
    torch.testing.assert_close(branch.grad, slope, rtol=1e-4, atol=1e-6)


def test_the_head_is_shared_and_saved_once(tiny_config, batch, tmp_path):
    system = fresh(tiny_config, "acme")
    heads = [encoder.fc[2] for encoder in (system.recipe_encoder, system.image_encoder)]
    names = [name for name in system.state_dict() if ".fc.2.linear." in name]
    assert names == ["recipe_encoder.fc.2.linear.weight", "recipe_encoder.fc.2.linear.bias"]
    x = torch.randn(6, 16)
    assert torch.equal(heads[0](x), heads[1](x))
    with torch.no_grad():
        heads[0].gain.mul_(2)
    assert torch.equal(heads[0](x), heads[1](x)), "in training, by the batch's own statistics"
    system.losses(step_of(batch))
    save_system(system, tmp_path)
    again = load_system(tmp_path)
    assert torch.equal(again.encode_images(batch).embedding, system.eval().encode_images(batch).embedding)
    assert not torch.equal(heads[0](x), heads[1](x)), "each side has running statistics of its own"


def test_the_codes_habits_are_named(tiny_config, batch):
    """A head that no optimizer holds, and one that is never evaluated."""
    random = fresh(tiny_config, "acme", "head: random")
    main = {id(p) for p in random.players()["main"]}
    assert not main & {id(p) for p in random.recipe_encoder.fc[2].parameters()}
    system = fresh(tiny_config, "acme", "statistics: batch").eval()
    whole = system.encode_images(batch).embedding
    part = system.encode_images(batch.part(slice(0, 4))).embedding
    assert not torch.allclose(whole[:4], part), "what else is in the batch decides"
    fine = fresh(tiny_config, "acme").eval()
    parts = fine.encode_images(batch).embedding[:4], fine.encode_images(batch.part(slice(0, 4))).embedding
    torch.testing.assert_close(*parts, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"statistics: 'mean' is not in \[running\|batch\]"):
        fresh(tiny_config, "acme", "statistics: mean")


def test_r2gan_by_hand(tiny_config, batch):
    system = fresh(tiny_config, "r2gan").eval()
    generator, judge, origin = (system.objectives[name] for name in ("generator", "discriminator", "origin"))
    generator.noise = 0
    generator.first = torch.nn.Linear(8, generator.first.out_features, bias=False)
    image, recipe = system.encode_images(batch).embedding, system.encode_recipes(batch.recipes).embedding
    v, v_i, v_r = as_pictures(batch.images, 16), generator(image).pictures, generator(recipe).pictures
    f, f_i, f_r = (judge.features(x) for x in (v, v_i, v_r))
    squares = lambda a, b: ((a - b) ** 2).mean()  # noqa: E731
    reconstruction = 0.5 * (squares(f, f_i) + squares(f_i, f_r) + squares(v, v_i) + squares(v_i, v_r))
    losses = system.losses(step_of(batch))
    expected = {
        "retrieval": triplet_loss(image, recipe, mining="non_zero"),
        "image_space": 0.1 * picture_triplet_loss(v_i.flatten(1), v_r.flatten(1), 0.1),
        "reconstruction": 0.01 * reconstruction,
        "category": sum(category_loss(system.objectives["categories"](x), batch.category) for x in (image, recipe)),
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4), name
    p, p_i, p_r = (torch.sigmoid(judge(x)) for x in (v, v_i, v_r))
    o_i, o_r = (torch.sigmoid(origin(x)) for x in (v_i, v_r))
    turns = {
        "discriminator": -p.log().mean() - ((1 - p_i).log().mean() + (1 - p_r).log().mean()) / 2,
        "origin": -o_i.log().mean() - (1 - o_r).log().mean(),
        "generator": -(p_i.log().mean() + p_r.log().mean() + (1 - o_i).log().mean() + o_r.log().mean()) / 2
        + 0.01 * reconstruction,
    }
    for player, value in turns.items():
        assert system.losses(step_of(batch, player))[player].item() == pytest.approx(value.item(), rel=1e-4), player


# ---- the papers' size, and the notebooks ----

JE = PHOTO + RECIPE
HEAD = 1024 * 1024 + 3 * 1024
ACME_GAME = {
    "critic": 656_385, "generator": 21_018_848, "discriminator": 18_825_985 + 16 * 512 * 1047 + 1047,
    "ingredients": 784_628, "categories": 1024 * 512 + 512 + 512 * 1047 + 1047,
}  # fmt: skip


@pytest.mark.parametrize(("method", "more"), [("acme", HEAD + sum(ACME_GAME.values())), ("r2gan", None)])
def test_the_papers_size(method, more):
    files = [ROOT / f"params/{name}.yaml" for name in ("recipe1m", f"methods/{method}", f"methods/{method}_recipe1m")]
    values = load(files, [], declared(sorted((ROOT / "notebooks").glob("0[1-5]_*.ipynb"))))
    with torch.device("meta"):
        config = SystemConfig.gather(values, vocabulary=WORDS, num_classes=500, num_categories=1047, pretrained=False)
        table = parameter_table(build(config))
    parts = {name.split(".")[1]: int(row.sum()) for name, row in table.iterrows() if name.startswith("objectives.")}
    if method == "acme":
        assert parts == ACME_GAME
    else:
        assert parts["discriminator"] == parts["origin"] and parts["categories"] == 1047 * 1025
        more = sum(parts.values())
    assert table.loc["total"].sum() == JE + more and LSTMS < RECIPE
    training = TrainingConfig.gather(values)
    assert (training.adam_beta1, training.batch_size) == {"acme": (0.5, 64), "r2gan": (0.9, 100)}[method]


@pytest.mark.parametrize("method", ARGS)
def test_through_all_five_notebooks(tmp_path, method):
    """With the causal module and its control."""
    options = {"recipe_dim": 16, "word_vectors": 16, "epochs": 1, "debias_epochs": 1}
    options |= {"system_args": json.dumps(ARGS[method])}
    words = [word for key, value in options.items() for word in ("-p", key, str(value))]
    run = [sys.executable, "-m", "recipe_lib.runner.run", "params/smoke.yaml", f"params/methods/{method}.yaml"]
    done = subprocess.run([*run, *words, "--outputs", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    study = tmp_path / f"smoke_{method}"
    results = pd.read_csv(study / "results.csv")
    assert {"baseline", "equal_compute", "debiased", "debiased@no_z"} <= set(results["variant"])
    for folder in ("02_baseline_training", "04_debiasing_training/debiased"):
        history = pd.read_csv(study / folder / "history.csv")
        own = {"acme": {"critic", "alignment", "translation"}, "r2gan": {"origin", "generator", "image_space"}}[method]
        assert own | {"discriminator", "game_spread"} <= set(history)
    assert (study / "02_baseline_training/painted.png").is_file()
