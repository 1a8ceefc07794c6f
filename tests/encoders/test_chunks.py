"""Gradient caching is exact: vectors, gradients, random numbers, statistics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from recipe_lib.data.loading import Draw, StudyDataset
from recipe_lib.encoders.chunks import in_chunks, resting_statistics
from recipe_lib.systems.base import Step
from recipe_lib.systems.registry import build
from recipe_lib.training.fit import TrainingConfig, pair_loss

VIT = {"image_model": "test_vit", "image_model_args": ("img_size: 48",)}  # LayerNorm: no row depends on another
GAME = ("picture: 16", "channels: 4", "code: 8", "noise: 4", "hidden: [8]")
RUNS = [("triplet", "hardest", chunk) for chunk in (4, 31, 32)]
RUNS += [("triplet", "all", 5), ("triplet", "non_zero", 5), ("circle", "all", 5)]


def gradients(system, batch, chunk, loss="triplet", mining="all", player="main"):
    """Of each parameter, with what the step logged."""
    training = TrainingConfig(loss=loss, mining=mining)
    torch.manual_seed(3)
    system.zero_grad()
    figures = {}
    step = Step(
        batch, pair_loss(training), lambda _: 1.0, lambda *parts: parts, figures.update, player=player, chunk=chunk,
        shared={},
    )  # fmt: skip
    losses = system.losses(step)
    torch.stack([*losses.values()]).sum().backward()
    found = {name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None}
    return found, {name: float(value.detach()) for name, value in losses.items()}


@pytest.fixture
def batch(tiny_store):
    return StudyDataset(tiny_store.split("train"), 48, visible=True)[Draw(np.arange(32), True, 0)]


def double(config):
    torch.manual_seed(0)
    return build(config).double().train()


def same(a, b, within):
    assert a.keys() == b.keys() and a
    scale = max(float(gradient.abs().max()) for gradient in a.values())
    worst = max(float((a[name] - b[name]).abs().max()) for name in a) / scale
    assert worst < within, f"gradients differ by {worst}"


@pytest.mark.parametrize(("loss", "mining", "chunk"), RUNS)
def test_gradients_are_those_of_the_whole_batch(tiny_config, batch, loss, mining, chunk):
    system = double(replace(tiny_config, dropout=0.0, **VIT))
    whole, losses = gradients(system, batch, 0, loss, mining)
    cached, again = gradients(system, batch, chunk, loss, mining)
    same(whole, cached, 1e-9)
    assert again == pytest.approx(losses, abs=1e-9) and {"retrieval", "self_supervised"} <= losses.keys()
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-3


def test_text_only_recipes_go_in_chunks_too(tiny_config, batch):
    system = double(replace(tiny_config, dropout=0.0))
    text = replace(batch, images=None, labels=None, visible=None)
    same(gradients(system, text, 0)[0], gradients(system, text, 7)[0], 1e-9)


def test_statistics_and_random_numbers_are_those_of_one_pass(tiny_config, batch):
    """Dropout is drawn once more with the same numbers; what comes after draws as if nothing had been replayed."""
    system = double(tiny_config)
    seen, after = [], []

    def encode(rows):
        out = system.encode_recipes(batch.part(rows).recipes).embedding
        seen.append(out.detach())
        return out, system.encode_images(batch.part(rows)).embedding, None

    norm = next(m for m in system.modules() if isinstance(m, nn.BatchNorm2d))
    runs = []
    for replay in (False, True):
        norm.reset_running_stats()
        torch.manual_seed(1)
        recipe, image, nothing = in_chunks(encode, 32, 8, module=system, where="cpu")
        assert nothing is None and len(recipe) == len(image) == 32
        statistics = norm.running_mean.clone()
        if replay:
            (recipe.sum() + image.sum()).backward()
        runs.append(norm.running_mean.clone())
        after.append(torch.rand(1))
        assert torch.equal(norm.running_mean, statistics) and norm.momentum == 0.1
    assert torch.equal(*runs) and torch.equal(*after)
    first, second = seen[4:8], seen[8:]
    assert len(second) == 4 and all(torch.equal(a, b) for a, b in zip(first, reversed(second), strict=True))
    assert not torch.equal(first[0], seen[4].flip(0))


def test_one_chunk_is_one_plain_pass():
    calls = []
    in_chunks(lambda rows: calls.append(rows), 8, 8, module=nn.Identity(), where="cpu")
    in_chunks(lambda rows: calls.append(rows), 8, 0, module=nn.Identity(), where="cpu")
    assert calls == [slice(None)] * 2


def test_resting_statistics_come_back_after_an_error():
    norm = nn.BatchNorm1d(3, momentum=0.3)
    with pytest.raises(ValueError), resting_statistics(norm):
        norm(torch.randn(4, 3))
        assert torch.equal(norm.running_mean, torch.zeros(3))
        raise ValueError
    assert norm.momentum == 0.3


@pytest.mark.parametrize("layers", [0, 1])
def test_a_game_in_chunks_has_the_gradients_of_the_whole_batch(tiny_config, batch, layers):
    """Encoders, generator and cross decoder; without noise, which is drawn chunk by chunk."""
    arguments = (*GAME, f"decoder_layers: {layers}", "decoder_heads: 2")
    system = double(replace(tiny_config, method="tnlbt", system_args=arguments, dropout=0.0, **VIT))
    without_chance(system)
    whole, losses = gradients(system, batch, 0, mining="hardest")
    cached, again = gradients(system, batch, 5, mining="hardest")
    same(whole, cached, 1e-9)
    assert {
        "retrieval",
        "self_supervised",
        "alignment",
        "translation",
    } == losses.keys() and again.keys() == losses.keys()
    for player in ("critic", "discriminator"):
        parts = [gradients(system, batch, chunk, player=player)[0] for chunk in (0, 5)]
        same(*parts, 1e-9)


def without_chance(system):
    """No code around its mean, no noise, and normalisation by running statistics: what no chunk decides."""
    for name in ("generator", "discriminator"):
        system.objectives[name].eval()
        for module in system.objectives[name].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    system.objectives["generator"].noise = 0
    first = system.objectives["generator"].first
    system.objectives["generator"].first = nn.Linear(first.in_features - 4, first.out_features, bias=False).double()
