"""A small study that has learnt a little, in an outputs folder of its own; its dishes as they were before any JPEG."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipe_lib.causal.debiasing import VARIANTS
from recipe_lib.data.store import Store
from recipe_lib.kitchen.model import KitchenConfig, cook
from recipe_lib.systems.attach import attach
from recipe_lib.systems.base import SystemConfig
from recipe_lib.systems.registry import build
from recipe_lib.systems.saving import save_system
from recipe_lib.training.fit import TrainingConfig, train

TRAINING = TrainingConfig(
    epochs=6, batch_size=32, crop_size=48, optimizer="adamw", learning_rate=5e-3, lr_schedule="cosine", seed=5,
    weights={"classifier": 1.0},
)  # fmt: skip
SIZES = {"classifier_dim": 16, "classifier_heads": 2, "classifier_feedforward": 32}


@pytest.fixture(scope="session")
def outputs(tiny_store, tmp_path_factory) -> Path:
    """outputs/ with one study, "tiny": baseline, debiased (with its term made long enough to matter) and oracle."""
    root = tmp_path_factory.mktemp("outputs of searches")
    study = root / "tiny"
    shutil.copytree(tiny_store.folder, study / "01_data_preparation" / "data")
    store, classes = Store(study / "01_data_preparation" / "data"), len(tiny_store.classes.names)
    torch.manual_seed(0)
    config = SystemConfig(
        tiny_store.card["vocabulary"], classes, image_model="test_resnet", embed_dim=16, recipe_dim=16,
        recipe_layers=1, recipe_heads=2, recipe_feedforward=32, dropout=0.0,
    )  # fmt: skip
    baseline = build(config)
    train(baseline, store, TRAINING, study / "02_baseline_training")
    for name in ("debiased", "oracle"):
        folder = study / "04_debiasing_training" / name
        system = attach(baseline, VARIANTS[name].tuned(SIZES), torch.randn(classes, 16))
        train(system, store, replace(TRAINING, epochs=1), folder)
        with torch.no_grad():
            system.adjustment.value.weight *= 3
        save_system(system, folder)
    return root


@pytest.fixture
def study(outputs, monkeypatch) -> Path:
    """Folder of the study; what was indexed in it is gone."""
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(outputs))
    shutil.rmtree(outputs / "tiny" / "search", ignore_errors=True)
    return outputs / "tiny"


@pytest.fixture(scope="session")
def dishes() -> dict[str, np.ndarray]:
    """Photos of the kitchen of `tiny_store` as drawn, by id of the recipe."""
    recipes = cook(KitchenConfig(train=96, val=24, test=30, text_only=20, seed=3))
    return {recipe.id: recipe.images[0] for recipe in recipes if recipe.images}
