import json
from dataclasses import replace

import pytest
import torch

from recipe_lib.causal.debiasing import VARIANTS, Debiasing
from recipe_lib.data.clip_text import clip_ids
from recipe_lib.data.loading import Draw, StudyDataset
from recipe_lib.encoders.recipe import COMPONENTS
from recipe_lib.losses import asymmetric_loss, triplet_loss
from recipe_lib.systems.attach import attach
from recipe_lib.systems.base import SystemConfig, parameter_table
from recipe_lib.systems.captions import bare_towers, set_towers
from recipe_lib.systems.registry import build

SMALL = {"classifier_dim": 16, "classifier_heads": 2, "classifier_feedforward": 32}


def test_a_config_is_gathered_from_parameters_by_name():
    parameters = {"embed_dim": 32, "frozen": ["conv1"], "system_args": ["a: 1"], "vocabulary": 3, "epochs": 9}
    config = SystemConfig.gather(parameters, vocabulary=7, num_classes=5)
    assert config == SystemConfig(7, 5, embed_dim=32, frozen=("conv1",), system_args=("a: 1",)), "facts win"
    attached = replace(config, debiasing=VARIANTS["soft"])
    assert SystemConfig.from_dict(json.loads(json.dumps(attached.to_dict()))) == attached


@pytest.fixture
def batch(tiny_store):
    rows = torch.arange(6).numpy()
    return StudyDataset(tiny_store.split("train"), 48, visible=True)[Draw(rows, True, 0)]


@pytest.fixture
def baseline(tiny_config):
    torch.manual_seed(0)
    return build(tiny_config).eval()


def grown(baseline, name, **changes):
    torch.manual_seed(1)
    dictionary = torch.randn(20, 16, generator=torch.Generator().manual_seed(2))
    return attach(
        baseline, replace(VARIANTS[name], **SMALL, **changes), dictionary, torch.linspace(0.1, 0.9, 20)
    ).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_starts_where_the_baseline_stopped(baseline, batch, name):
    system = grown(baseline, name)
    images, before = system.encode_images(batch), baseline.encode_images(batch)
    assert torch.equal(images.embedding, before.embedding)
    assert torch.equal(system.encode_recipes(batch.recipes).embedding, baseline.encode_recipes(batch.recipes).embedding)
    adds = bool(VARIANTS[name].weights) and VARIANTS[name].sides
    assert (images.z.abs().max() > 0) == (adds in ("image", "both")), "only what adds a term has one"
    recipes = system.encode_recipes(batch.recipes).embedding
    moved = system.adjusted_recipes(recipes, batch.labels) - recipes
    assert (moved.abs().max() > 0) == (adds in ("text", "both"))
    assert (images.logits is not None) == VARIANTS[name].classifier


def test_a_users_part_is_taken_over_whatever_its_name_begins_with(tiny_config, baseline, monkeypatch):
    def mine(*args):
        torch.manual_seed(5)
        system = build(*args)
        system.prior_net = torch.nn.Linear(2, 2)
        return system

    monkeypatch.setattr("recipe_lib.systems.attach.build", mine)
    baseline.prior_net = torch.nn.Linear(2, 2)
    assert torch.equal(grown(baseline, "marginal").prior_net.weight, baseline.prior_net.weight)


def test_a_recipes_own_ingredients_are_its_z(baseline, batch):
    system = grown(baseline, "two_sided")
    recipes, wv = torch.zeros(len(batch.labels), system.config.embed_dim), system.adjustment.value
    z = system.adjusted_recipes(recipes, batch.labels)
    for row, labels in enumerate(batch.labels):
        own = system.adjustment.dictionary[labels > 0]
        torch.testing.assert_close(z[row], wv(own).mean(0) if len(own) else torch.zeros_like(z[row]))


def test_the_classifier_is_asked_only_for_what_shows(baseline, batch):
    system = grown(baseline, "visible")
    asked = system.asked(batch)
    assert torch.equal(asked == 0, (batch.labels > 0) & (batch.visible == 0)) and (asked == 0).any()
    logits = torch.randn(batch.labels.shape, requires_grad=True, generator=torch.Generator().manual_seed(0))
    asymmetric_loss(logits, batch.labels, 2.0, 0.0, asked).backward()
    assert torch.equal(logits.grad == 0, asked == 0), "no gradient from what cannot be seen"
    seen = torch.linspace(0, 1, 20)
    torch.manual_seed(1)
    elsewhere = attach(baseline, replace(VARIANTS["visible"], **SMALL), torch.zeros(20, 16), None, seen)
    assert torch.equal(elsewhere.asked(replace(batch, visible=None)), seen), "where nobody knows, by the class"
    assert grown(baseline, "debiased").asked(batch) is None


def test_debiased_z_equals_the_formula(baseline, batch):
    system = grown(baseline, "debiased")
    images = system.encode_images(batch)
    p = torch.sigmoid(images.logits).detach()
    values = system.adjustment.value(system.adjustment.dictionary)
    for b in range(6):
        kept = {k: float(p[b, k]) for k in range(20) if p[b, k] >= 0.5}
        total = sum(kept.values())
        expected = sum((x / total * values[k] for k, x in kept.items()), torch.zeros(16))
        torch.testing.assert_close(images.z[b], expected, rtol=1e-4, atol=1e-5)


def test_weights_of_each_kind(baseline):
    logits, labels = torch.tensor([[0.0, 2.0, -2.0] + [-9.0] * 17]), torch.eye(20)[:1]
    hard = grown(baseline, "debiased").weights(logits, None, 1)
    soft = grown(baseline, "soft").weights(logits, None, 1)
    calibrated = grown(baseline, "calibrated").weights(logits, None, 1)
    assert hard[0, 2] == 0 and soft[0, 2] > calibrated[0, 2] > 0
    assert float(grown(baseline, "calibrated").probabilities(torch.zeros(1))) == pytest.approx(0.2)
    assert torch.equal(grown(baseline, "oracle").weights(None, labels, 1), labels)
    assert torch.unique(grown(baseline, "marginal").weights(logits, labels, 3), dim=0).shape == (1, 20)
    with pytest.raises(ValueError, match="true ingredients"):
        grown(baseline, "oracle").weights(None, None, 1)


def test_only_the_oracle_reads_labels(baseline, batch):
    for name in VARIANTS:
        system = grown(baseline, name)
        told, lied = (system.encode_images(replace(batch, labels=x)).z for x in (batch.labels, batch.labels.flip(0)))
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
    torch.testing.assert_close(baseline.self_supervised_loss(features.components, triplet_loss), sum(losses) / 6)


def test_config_survives_json(tiny_config):
    config = replace(tiny_config, image_model_args=("output_stride: 16",), debiasing=Debiasing(classifier=True))
    assert SystemConfig.from_dict(config.to_dict()) == config


def test_attaching_to_another_architecture_is_an_error(baseline):
    baseline.config = replace(baseline.config, recipe_dim=32)
    with pytest.raises(RuntimeError):
        attach(baseline, VARIANTS["equal_compute"])


# ---- CLIP towers with adapters ----


@pytest.fixture
def clip_batch(clip_store):
    rows = torch.arange(6).numpy()
    features = torch.randn(96, 3, 128, generator=torch.Generator().manual_seed(0)).numpy()
    return StudyDataset(clip_store.split("train"), 56, descriptions=True, segments=features, visible=True)[
        Draw(rows, True, 0)
    ]


def test_the_joint_space_is_clips_own(dar, clip_batch):
    photo = dar.image_encoder
    expected = photo.tower.pool(photo.tower(clip_batch.images, photo.adapters))
    assert torch.equal(dar.encode_images(clip_batch).embedding, expected)
    text = dar.description_encoder
    assert torch.equal(
        dar.encode_descriptions(clip_batch.descriptions), text.tower(clip_batch.descriptions, text.adapters)
    )
    assert dar.config.embed_dim == dar.recipe_encoder.dim == 128, "whatever the configuration said"
    again = build(SystemConfig.from_dict(dar.config.to_dict()))
    again.load_state_dict(dar.state_dict())


@pytest.mark.parametrize(
    ("adapters", "photos", "texts"), [("both", 1, 1), ("image", 1, 0), ("text", 0, 1), ("none", 0, 0)]
)
def test_adapters_by_side(clip_config, adapters, photos, texts):
    system = build(replace(clip_config, adapters=adapters, segment_encoder="adapted"))
    own = {name.split(".")[0] for name, p in system.named_parameters() if "adapters" in name and p.requires_grad}
    expected = {"image_encoder", "segment_encoder"} if photos else set()
    expected |= {"recipe_encoder", "description_encoder"} if texts else set()
    assert own == expected


def adapters_at(width, bottleneck):
    """Two after each of twelve blocks."""
    return 24 * (2 * width * bottleneck + bottleneck + width)


# By part, the released code trains exactly these: 34.8 M with a reduction of 4, 41.9 M with segment adapters too.
SENTENCES = 2 * (2 * (4 * 512 * 513 + 2 * 512 * 2048 + 2048 + 512 + 4 * 512) + 50 * 512)
MERGER, PROJECTIONS = 3 * 512 * 512 + 512, 6 * 512 * 513


@pytest.mark.parametrize(
    ("bottleneck", "image", "text", "segment_encoder", "trainable"),
    [
        ({"adapter_width": 64}, 64, 64, "frozen", 23_749_632),
        ({"adapter_width": 64}, 64, 64, "adapted", 26_128_896),
        ({"adapter_reduction": 4}, 192, 128, "frozen", 34_768_896),
        ({"adapter_reduction": 4}, 192, 128, "adapted", 41_869_824),
    ],
)
def test_parameters_at_the_papers_size(bottleneck, image, text, segment_encoder, trainable):
    config = SystemConfig(
        0, 500, method="dar", descriptions="adapted", segments=4, segment_encoder=segment_encoder, **bottleneck
    )
    with torch.device("meta"):
        table = parameter_table(build(config))
    expected = {
        "image_encoder.adapters": adapters_at(768, image),
        "recipe_encoder.adapters": 3 * adapters_at(512, text),
        "description_encoder.adapters": adapters_at(512, text),
        "recipe_encoder.sentences": SENTENCES,
        "recipe_encoder.fc": MERGER,
    }
    if segment_encoder == "adapted":
        expected["segment_encoder.adapters"] = adapters_at(768, image)
    by_part = table["trainable"]
    assert {name: by_part[name] for name in expected} == expected
    assert by_part[by_part.index.str.startswith("projections.")].sum() == PROJECTIONS
    assert sum(expected.values()) + PROJECTIONS == by_part["total"] == trainable
    assert table.loc["total", "frozen"] == 149_620_737 - 1, "CLIP's without its logit scale, each tower once"


@pytest.mark.parametrize("name", VARIANTS)
def test_the_debiasing_module_attaches_to_clip_as_it_is(dar, clip_batch, name):
    dictionary = torch.randn(20, dar.recipe_encoder.dim, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(1)
    system = attach(dar, replace(VARIANTS[name], **SMALL), dictionary, torch.linspace(0.1, 0.9, 20)).eval()
    images = system.encode_images(clip_batch)
    assert torch.equal(images.embedding, dar.encode_images(clip_batch).embedding)
    assert (images.z.abs().max() > 0) == (bool(VARIANTS[name].weights) and VARIANTS[name].sides != "text")
    levels = [
        (
            s.encode_descriptions(clip_batch.descriptions),
            s.encode_segments(clip_batch.segments, clip_batch.segment_mask),
        )
        for s in (system, dar)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*levels, strict=True))


def test_towers_stay_frozen_and_are_there_once(dar):
    towers = [p for name, p in dar.named_parameters() if ".tower." in name]
    assert towers and not any(p.requires_grad for p in towers)
    assert dar.description_encoder.tower is dar.recipe_encoder.tower
    assert dar.segment_encoder.tower is dar.image_encoder.tower
    table = parameter_table(dar)
    assert table.loc["total"].sum() == sum(p.numel() for p in dar.parameters())
    assert table.loc["total", "frozen"] == sum(p.numel() for p in towers)


def test_bare_towers_are_a_copy_that_trains_and_goes_back(dar, clip_batch):
    bare = bare_towers(dar)
    image, text = dar.image_encoder.tower, dar.recipe_encoder.tower
    torch.testing.assert_close(bare.encode_images(clip_batch).embedding, image.pool(image(clip_batch.images)))
    assert all(p.requires_grad for p in bare.parameters()) and not hasattr(bare, "projections")
    features = bare.encode_recipes(clip_batch.recipes)
    assert features.components == () and features.embedding.shape == (6, text.dim)
    zero_shot = bare_towers(dar, "zero_shot")
    features = zero_shot.encode_recipes(clip_batch.recipes)
    torch.testing.assert_close(features.embedding, sum(features.components) / 3)
    before = dar.encode_images(clip_batch).embedding
    with torch.no_grad():
        bare.image_encoder.tower.visual.proj.mul_(-1)
    assert torch.equal(dar.encode_images(clip_batch).embedding, before), "a copy"
    set_towers(dar, bare)
    assert torch.equal(image.visual.proj, bare.image_encoder.tower.visual.proj)
    assert not torch.equal(dar.encode_images(clip_batch).embedding, before)


def test_a_caption_is_title_and_ingredient_lines(dar, clip_store, clip_batch):
    recipe = clip_store.split("train").recipe(2)
    lines = [line for line in recipe["ingredients"] if line.split()][:15]
    # Each line is cut at 18 tokens of its own before they are joined.
    parts = [clip_ids(text, 20)[1:-1] for text in (recipe["title"], *lines)]
    joined = [id_ for part in parts for id_ in (*clip_ids(",", 3)[1:-1], *part)][1:76]
    expected = [*clip_ids("", 2)[:1], *joined, *clip_ids("", 2)[1:]]
    ids = bare_towers(dar).recipe_encoder.captions(clip_batch.recipes)[2].tolist()
    assert ids[: len(expected)] == expected and not any(ids[len(expected) :])


def test_no_adapters_and_frozen_descriptions_train_heads_alone(clip_config):
    frozen = build(replace(clip_config, adapters="none"))
    assert not [name for name, p in frozen.named_parameters() if "adapters" in name]
    mixed = build(replace(clip_config, descriptions="frozen"))
    assert mixed.description_encoder.adapters is None and mixed.image_encoder.adapters is not None
