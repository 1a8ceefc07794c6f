from dataclasses import replace

import pytest
import torch

from recipe_lib.data.loading import Draw, StudyDataset
from recipe_lib.encoders.recipe import COMPONENTS
from recipe_lib.losses import triplet_loss
from recipe_lib.models import VARIANTS, Debiasing, RetrievalSystem, SystemConfig, attach

SMALL = {"classifier_dim": 16, "classifier_heads": 2, "classifier_feedforward": 32}


@pytest.fixture
def batch(tiny_store):
    rows = torch.arange(6).numpy()
    return StudyDataset(tiny_store.split("train"), 48)[Draw(rows, True, 0)]


@pytest.fixture
def baseline(tiny_config):
    torch.manual_seed(0)
    return RetrievalSystem(tiny_config).eval()


def grown(baseline, name, **changes):
    torch.manual_seed(1)
    dictionary = torch.randn(20, 16, generator=torch.Generator().manual_seed(2))
    return attach(
        baseline, replace(VARIANTS[name], **SMALL, **changes), dictionary, torch.linspace(0.1, 0.9, 20)
    ).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_starts_where_the_baseline_stopped(baseline, batch, name):
    system = grown(baseline, name)
    found, before = system.encode_images(batch.images, batch.labels), baseline.encode_images(batch.images)
    assert torch.equal(found.embedding, before.embedding)
    assert torch.equal(system.encode_recipes(batch.recipes).embedding, baseline.encode_recipes(batch.recipes).embedding)
    assert (found.z.abs().max() > 0) == bool(VARIANTS[name].weights), "only what adds a term has one"
    assert (found.logits is not None) == VARIANTS[name].classifier


def test_debiased_z_equals_the_formula(baseline, batch):
    system = grown(baseline, "debiased")
    found = system.encode_images(batch.images)
    p = torch.sigmoid(found.logits).detach()
    values = system.adjustment.value(system.adjustment.dictionary)
    for b in range(6):
        kept = {k: float(p[b, k]) for k in range(20) if p[b, k] >= 0.5}
        total = sum(kept.values())
        expected = sum((x / total * values[k] for k, x in kept.items()), torch.zeros(16))
        torch.testing.assert_close(found.z[b], expected, rtol=1e-4, atol=1e-5)


def test_weights_of_each_kind(baseline):
    logits, labels = torch.tensor([[0.0, 2.0, -2.0] + [-9.0] * 17]), torch.eye(20)[:1]
    hard = grown(baseline, "debiased").weights(logits, None, 1)
    soft = grown(baseline, "soft").weights(logits, None, 1)
    calibrated = grown(baseline, "calibrated").weights(logits, None, 1)
    assert hard[0, 2] == 0 and soft[0, 2] > calibrated[0, 2] > 0
    assert float(grown(baseline, "calibrated").probabilities(torch.zeros(1))) == pytest.approx(0.2)
    assert torch.equal(grown(baseline, "oracle").weights(None, labels, 1), labels)
    assert torch.unique(grown(baseline, "marginal").weights(logits, labels, 3), dim=0).shape == (1, 20)
    with pytest.raises(ValueError, match="true labels"):
        grown(baseline, "oracle").weights(None, None, 1)


def test_only_the_oracle_reads_labels(baseline, batch):
    for name in VARIANTS:
        system = grown(baseline, name)
        told, lied = (system.encode_images(batch.images, x).z for x in (batch.labels, batch.labels.flip(0)))
        assert torch.equal(told, lied) == (name != "oracle"), name


def test_self_supervised_loss_is_the_mean_over_ordered_pairs(baseline, batch):
    features = baseline.encode_recipes(batch.recipes)
    parts = dict(zip(COMPONENTS, features.components, strict=True))
    losses = [
        triplet_loss(parts[a], baseline.projections[f"{a}_{b}"](parts[b]), 0.3)
        for a in COMPONENTS
        for b in COMPONENTS
        if a != b
    ]
    assert len(losses) == 6
    torch.testing.assert_close(baseline.self_supervised_loss(features, 0.3), sum(losses) / 6)


def test_config_survives_json(tiny_config):
    config = replace(tiny_config, image_model_args=("output_stride: 16",), debiasing=Debiasing(classifier=True))
    assert SystemConfig.from_dict(config.to_dict()) == config


def test_attaching_to_another_architecture_is_an_error(baseline):
    baseline.config = replace(baseline.config, recipe_dim=32)
    with pytest.raises(RuntimeError):
        attach(baseline, VARIANTS["equal_compute"])
