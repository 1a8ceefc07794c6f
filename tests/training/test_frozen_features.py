from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from recipe_lib.causal.debiasing import VARIANTS
from recipe_lib.data.loading import Draw, StudyDataset
from recipe_lib.evaluation.scores import encode
from recipe_lib.systems.attach import attach
from recipe_lib.systems.registry import build
from recipe_lib.systems.saving import load_system
from recipe_lib.training.fit import TrainingConfig, train, validate
from recipe_lib.training.frozen_features import with_features

CONFIG = TrainingConfig(
    epochs=2, batch_size=32, crop_size=48, optimizer="adamw", learning_rate=2e-3, lr_schedule="cosine", seed=5
)


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs" / "frozen"


@pytest.fixture
def system(tiny_config):
    torch.manual_seed(0)
    return build(replace(tiny_config, frozen=("all",), frozen_views=3))


def test_views_are_what_training_epochs_would_show(system, tiny_store):
    split = tiny_store.split("train")
    dataset = with_features(system, StudyDataset(split, 48, augment=True, seed=7))
    (features,) = dataset.features
    assert features.shape[:2] == (96, 3) and features.dtype == np.float16
    live = StudyDataset(split, 48, augment=True, seed=0)
    for view in range(3):
        images = live[Draw(np.arange(64), True, view)].images
        expected = system.eval().image_encoder.features(images).detach()
        torch.testing.assert_close(torch.from_numpy(features[:64, view]).float(), expected, atol=5e-3, rtol=5e-3)
    assert not np.array_equal(features[:, 0], features[:, 1])
    batch, again, other = (dataset[Draw(np.array([3, 8, 5]), True, epoch)].images for epoch in (0, 0, 4))
    assert torch.equal(batch, again) and not torch.equal(batch, other)
    assert all(any(np.array_equal(x, view) for view in features[row]) for x, row in zip(batch, (3, 8, 5), strict=True))


def test_photos_with_other_surroundings_are_views_too(system, tiny_store):
    dataset = StudyDataset(tiny_store.split("train"), 48, augment=True, seed=7, swap=0.5)
    plain, swapped = with_features(system, dataset).features
    live = StudyDataset(tiny_store.split("train"), 48, augment=True, seed=0, swap=1.0)
    expected = system.eval().image_encoder.features(live[Draw(np.arange(64), True, 1)].images).detach()
    torch.testing.assert_close(torch.from_numpy(swapped[:64, 1]).float(), expected, atol=5e-3, rtol=5e-3)
    rows = np.arange(96)
    batch = dataset[Draw(rows, True, 0)].images.numpy()
    own = [any(np.array_equal(x, view) for view in plain[row]) for x, row in zip(batch, rows, strict=True)]
    lent = [any(np.array_equal(x, view) for view in swapped[row]) for x, row in zip(batch, rows, strict=True)]
    assert np.array_equal(own, ~np.array(lent)) and 30 < sum(lent) < 66
    dataset.swap = 0.25  # another share takes the same views
    assert [x.filename for x in with_features(system, dataset).features] == [plain.filename, swapped.filename]
    dataset.swap_strata = np.arange(96) // 2  # each photo has one lender, its pair
    _, placebo = with_features(system, dataset).features
    live.swap_strata = dataset.swap_strata
    expected = system.image_encoder.features(live[Draw(np.arange(64), True, 0)].images).detach()
    torch.testing.assert_close(torch.from_numpy(placebo[:64, 0]).float(), expected, atol=5e-3, rtol=5e-3)
    assert placebo.filename != swapped.filename


def test_they_are_made_once_for_the_photos_and_the_weights(system, tiny_store, outputs, monkeypatch):
    split = tiny_store.split("val")

    def file():
        return with_features(system, StudyDataset(split, 48)).features[0].filename

    first = file()
    monkeypatch.setattr("recipe_lib.training.frozen_features._write", lambda *_: pytest.fail("they are there"))
    system.image_encoder.fc.weight.data += 1  # it is no part of what is frozen
    assert file() == first and len(list(outputs.glob("*.npy"))) == 1 and not list(outputs.glob("*.partial"))
    monkeypatch.undo()
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(outputs.parent))
    next(system.image_encoder.backbone.parameters()).data += 1
    assert file() != first
    assert with_features(system, StudyDataset(split, 40)).features[0].filename not in (first, file())
    weights = system.state_dict()
    strided = build(replace(system.config, image_model_args=("output_stride: 16",)))
    strided.load_state_dict(weights)  # the same weights, other maps
    assert with_features(strided, StudyDataset(split, 48)).features[0].filename != file()


def test_training_on_them_never_runs_the_backbone(system, tiny_store, tmp_path, monkeypatch):
    history = train(system, tiny_store, CONFIG, tmp_path / "first")
    trained = load_system(tmp_path / "first")
    assert validate(trained, tiny_store, CONFIG, tmp_path)["val_i2r_medr"] == pytest.approx(
        history.loc[history["val_i2r_recall_1"].idxmax(), "val_i2r_medr"]
    )
    scored = encode(trained, tiny_store.split("val"), crop=48)
    live = encode(build_live(trained), tiny_store.split("val"), crop=48)
    torch.testing.assert_close(scored.embedding, live.embedding, atol=5e-3, rtol=5e-3)
    torch.manual_seed(0)
    again = build(system.config)
    monkeypatch.setattr(type(again.image_encoder.backbone), "forward_features", lambda *_: pytest.fail("it ran"))
    repeated = train(again, tiny_store, CONFIG, tmp_path / "again")
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), repeated.drop(columns="seconds"))


def build_live(system):
    live = build(replace(system.config, frozen_views=0))
    live.load_state_dict(system.state_dict())
    return live


def test_the_causal_module_reads_maps_from_them(system, tiny_store, tmp_path):
    dictionary = torch.randn(20, 16)
    small = {"classifier_dim": 16, "classifier_heads": 2, "classifier_feedforward": 32}
    for name in ("debiased", "swap_debiased"):
        variant = attach(system, replace(VARIANTS[name], **small), dictionary)
        history = train(variant, tiny_store, CONFIG, tmp_path / name)
        assert np.isfinite(history["classifier"]).all() and history["z_norm"].min() > 0
