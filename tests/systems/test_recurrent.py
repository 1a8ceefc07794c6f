"""JE and AdaMine: what they are trained on, at the papers' size, and through all five notebooks."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from recipe_lib.data.categories import add_categories
from recipe_lib.data.loading import Draw, StudyDataset
from recipe_lib.data.store import Store
from recipe_lib.losses import category_loss, cosine_loss, mismatches, semantic_triplet_loss, triplet_loss
from recipe_lib.runner.params import declared, load
from recipe_lib.systems.base import Step, SystemConfig
from recipe_lib.systems.registry import build
from recipe_lib.training.fit import TrainingConfig, pair_loss, train, trained_parts

ROOT = Path(__file__).parents[2]
CONFIG = TrainingConfig(
    epochs=2, batch_size=32, crop_size=48, optimizer="adamw", learning_rate=5e-3, lr_schedule="cosine", seed=5
)


@pytest.fixture(scope="module")
def store(tiny_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled") / "data"
    shutil.copytree(tiny_store.folder, folder)
    add_categories(folder, 6)  # the six most frequent dishes; the others have none
    return Store(folder)


def fresh(store, method, *args):
    torch.manual_seed(0)
    config = SystemConfig(
        store.card["vocabulary"], 20, store.card.get("categories", {}).get("n", 0), method=method,
        image_model="test_resnet", embed_dim=16, recipe_dim=12, system_args=("instruction_dim: 10", *args),
    )  # fmt: skip
    return build(config)


def step(system, store, weights, config=CONFIG, epoch=1.5):
    rows = np.arange(12)
    batch = StudyDataset(store.split("train"), 48, category="category" in system.reads)[Draw(rows, True, 0)]
    weigh = replace(config, weights=weights)
    return Step(
        batch, pair_loss(weigh), weigh.weight, lambda *parts: parts, dict, epoch=epoch, margin=config.margin,
        mining=config.mining,
    )  # fmt: skip


def encoded(system, step):
    return system.encode_images(step.batch).embedding, system.encode_recipes(step.batch.recipes).embedding


def test_je_draws_photos_for_recipes_and_classifies_both_sides(store):
    system = fresh(store, "je").eval()
    asked = step(system, store, {"category": 0.01}, replace(CONFIG, margin=0.1))
    image, recipe = encoded(system, asked)
    losses = system.losses(asked)
    partner = mismatches(12, 0.8, torch.Generator().manual_seed(int(1.5 * 2**24)))
    torch.testing.assert_close(losses["retrieval"], cosine_loss(image, recipe, partner, 0.1))
    assert asked.batch.category.min() == -1 < asked.batch.category.max()
    expected = sum(
        category_loss(system.objectives["categories"](F.normalize(x)), asked.batch.category) for x in (image, recipe)
    )
    torch.testing.assert_close(losses["category"], expected)
    assert system.losses(asked)["retrieval"] == losses["retrieval"], "a resumed run draws the same"
    assert system.losses(asked._replace(epoch=1.6))["retrieval"] != losses["retrieval"]
    assert system.losses(asked._replace(weight=lambda name: name != "category")).keys() == {"retrieval"}


def test_adamine_has_triplets_of_instances_and_of_categories_and_its_ablations(store):
    system = fresh(store, "adamine").eval()
    for mining in ("non_zero", "all"):
        asked = step(system, store, {"semantic": 0.3}, replace(CONFIG, mining=mining))
        image, recipe = encoded(system, asked)
        instance = triplet_loss(image, recipe, 0.3, mining)
        semantic = semantic_triplet_loss(image, recipe, asked.batch.category, 0.3, mining)
        losses = system.losses(asked)
        torch.testing.assert_close(losses["retrieval"], instance)
        torch.testing.assert_close(losses["semantic"], semantic)
        assert semantic > 0 and losses.keys() == {"retrieval", "semantic"}
        alone = fresh(store, "adamine", "triplets: semantic").eval().losses(asked)
        assert alone.keys() == {"retrieval"}
        torch.testing.assert_close(alone["retrieval"], semantic)
    assert system.losses(step(system, store, {"semantic": 0.0})).keys() == {"retrieval"}


def test_half_of_adamines_batches_are_of_a_kind(store):
    from recipe_lib.training.fit import _loaders

    plain, paired = (_loaders(fresh(store, m), store, CONFIG, None, 0, 1)[0].sampler for m in ("je", "adamine"))
    assert plain.category is None
    category = store.split("train").categories
    assert (paired.category == category).all()

    def pairs(sampler):
        return sum((np.bincount(category[d.rows][category[d.rows] >= 0]) // 2).sum() for d in sampler)

    assert pairs(paired) > pairs(plain)


@pytest.mark.parametrize(("method", "word"), [("je", "category"), ("adamine", "semantic")])
def test_without_categories_it_says_what_to_do(tiny_store, method, word):
    system = fresh(tiny_store, method)
    assert system.reads == frozenset()
    with pytest.raises(ValueError, match=f"there are no categories; set categories, or {word}_weight: 0.0"):
        system.losses(step(system, tiny_store, {}))
    assert system.losses(step(system, tiny_store, {word: 0.0})).keys() == {"retrieval"}


def test_an_argument_is_checked(store):
    with pytest.raises(ValueError, match=r"'none' is not in .both.semantic."):
        fresh(store, "adamine", "triplets: none")


# ---- turns ----


def test_turns_follow_from_the_scores_alone():
    rest, backbone, both = (False, True), (True, False), (True, True)
    wait = TrainingConfig(frozen_epochs=2)
    assert [trained_parts(wait, done) for done in range(4)] == [rest, rest, both, both]
    turns = TrainingConfig(alternate=[1, 2], select_by="i2r_medr")
    scores = [
        9,
        8,
        8,
        7,
        7,
        7,
        6,
        6,
        6,
    ]  # lower is better; the first turn ends with the third score, later ones 2 after
    said = [trained_parts(turns, len(scores[:n]), scores[:n]) for n in range(len(scores) + 1)]
    assert said == [rest] * 3 + [backbone] * 3 + [rest] * 3 + [backbone]
    assert trained_parts(replace(turns, select_by="i2r_recall_1"), 2, [0.1, 0.1]) == backbone
    assert trained_parts(TrainingConfig(), 0) == both


def test_a_backbone_that_waits_stands_still_with_its_statistics(store, tmp_path):
    """Over a validation too; all else trains."""
    system = fresh(store, "je")
    start = {name: value.clone() for name, value in system.state_dict().items()}
    train(system, store, replace(CONFIG, frozen_epochs=2), tmp_path)
    moved = {name for name, value in system.state_dict().items() if not torch.equal(value, start[name])}
    assert not any(name.startswith("image_encoder.backbone.") for name in moved)
    assert {"image_encoder.fc.weight", "recipe_encoder.word.weight", "objectives.categories.weight"} <= moved


def test_turns_are_taken_in_training(store, tmp_path):
    """Without a learning rate no score is better than the first, so the third epoch is the backbone's."""
    system = fresh(store, "je")
    config = replace(CONFIG, alternate=[1, 9], learning_rate=0.0, epochs=3)
    train(system, store, config, tmp_path)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    counts = {v.item() for k, v in last["state_dict"].items() if k.endswith("num_batches_tracked")}
    assert counts == {3}, "three steps of 32 pairs, in the last epoch alone"
    state = last["optimizer_states"][0]["state"]
    assert {int(entry["step"]) for entry in state.values()} == {3, 6}, "Adam counts each part's own steps"


def test_parts_are_told_apart(store):
    system = fresh(store, "je")
    system.train_parts(backbone=True, rest=False)
    trains = {name for name, p in system.named_parameters() if p.requires_grad}
    assert trains == {name for name, _ in system.named_parameters() if name.startswith("image_encoder.backbone.")}
    assert system.image_encoder.backbone.training and not system.recipe_encoder.training
    system.train_parts(backbone=True, rest=True)
    assert all(p.requires_grad for p in system.parameters()) and system.recipe_encoder.training


def test_what_is_frozen_by_name_never_trains():
    config = SystemConfig(
        30, 5, 3, method="je", image_model="test_resnet", embed_dim=8, recipe_dim=6, frozen=("conv1",)
    )
    system = build(replace(config, system_args=("instruction_dim: 6",)))
    system.train_parts(backbone=False, rest=True)
    system.train_parts(backbone=True, rest=True)
    still = {name for name, p in system.named_parameters() if not p.requires_grad}
    assert still and all(name.startswith("image_encoder.backbone.conv1") for name in still)


# ---- the papers' size, and the notebooks ----

# Recipe1M: 30,167 words of im2recipe's word2vec. ResNet-50 without its classes 23.5 M, then a linear layer of 2.1 M.
WORDS, PHOTO = 30_167, 23_508_032 + 2048 * 1024 + 1024
LSTMS = 2 * 4 * (300 * 300 + 300 * 300 + 2 * 300) + 4 * 1024 * (300 + 1024 + 2) + 4 * 1024 * (1024 + 1024 + 2)
RECIPE = WORDS * 300 + LSTMS + (600 + 1024) * 1024 + 1024


@pytest.mark.parametrize(("method", "more"), [("je", 1047 * (1024 + 1)), ("adamine", 0)])
def test_the_papers_size(method, more):
    notebooks = sorted((ROOT / "notebooks").glob("0[1-5]_*.ipynb"))
    files = [ROOT / f"params/{name}.yaml" for name in ("recipe1m", f"methods/{method}", f"methods/{method}_recipe1m")]
    values = load(files, [], declared(notebooks))
    with torch.device("meta"):
        config = SystemConfig.gather(values, vocabulary=WORDS, num_classes=500, num_categories=1047, pretrained=False)
        system = build(config)
    assert sum(p.numel() for p in system.parameters()) == PHOTO + RECIPE + more
    assert sum(p.numel() for p in system.recipe_encoder.parameters()) == RECIPE
    assert system.recipe_encoder.dim == values["word_vectors"] == 300
    TrainingConfig.gather(values)


@pytest.mark.parametrize("method", ["je", "adamine"])
def test_through_all_five_notebooks(tmp_path, method):
    """On a small kitchen: causal module attached, with its control, and a dictionary of the LSTM's word vectors."""
    small = {"recipe_dim": 16, "word_vectors": 16, "system_args": '["instruction_dim: 12"]', "epochs": 1}
    small |= {"debias_epochs": 1}
    options = [word for key, value in small.items() for word in ("-p", key, str(value))]
    run = [sys.executable, "-m", "recipe_lib.runner.run", "params/smoke.yaml", f"params/methods/{method}.yaml"]
    done = subprocess.run([*run, *options, "--outputs", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    study = tmp_path / f"smoke_{method}"
    results = pd.read_csv(study / "results.csv")
    assert {"baseline", "equal_compute", "debiased", "debiased@no_z"} <= set(results["variant"])
    for folder in ("02_baseline_training", "04_debiasing_training/debiased"):
        history = pd.read_csv(study / folder / "history.csv")
        assert history[{"je": "category", "adamine": "semantic"}[method]].gt(0).all()
    assert (study / "01_data_preparation/data/categories.csv").is_file()
