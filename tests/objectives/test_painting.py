"""Generator, discriminator and cross decoder: shapes at every size, what conditions what, naive recomputation."""

import math

import pytest
import torch

from recipe_lib.objectives.cross_decoder import CrossDecoder
from recipe_lib.objectives.discriminator import Discriminator, as_pictures, told_as
from recipe_lib.objectives.generator import Generator, Painted, doublings


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_pictures_of_every_size_and_their_judgement(size):
    torch.manual_seed(0)
    generator, discriminator = Generator(12, size, 4, code=6, noise=5), Discriminator(size, 4, code=6, categories=3)
    painted = generator(torch.randn(2, 12))
    assert painted.pictures.shape == (2, 3, size, size) and painted.pictures.abs().max() <= 1
    features = discriminator.features(painted.pictures)
    assert features.shape[2:] == (4, 4) and discriminator.category(features).shape == (2, 3)
    logits = discriminator(painted.pictures, painted.mean)
    assert logits.shape == (2,) and torch.equal(logits, discriminator.judge(features, painted.mean))
    logits.sum().backward()
    assert all(p.grad is not None for p in generator.parameters())
    assert Discriminator(size, 4, code=0)(painted.pictures.detach()).shape == (2,)


def test_acmes_sizes():
    """128 pixels: a map of 1,024 channels doubled to 64 of 64 pixels, then 32; halved from 64 up to 1,024."""
    with torch.device("meta"):
        generator, discriminator = Generator(1024), Discriminator(categories=1048)
    assert generator.first.out_features == 2 * 1024 * 16 and generator.first.in_features == 228
    assert generator.condition[0].weight.shape == (512, 1024) and generator.paint[0].weight.shape == (3, 32, 3, 3)
    convs = [m.weight.shape[:2] for m in discriminator.features if isinstance(m, torch.nn.Conv2d)]
    assert convs == [(64, 3), (128, 64), (256, 128), (512, 256), (1024, 512), (512, 1024)]


@pytest.mark.parametrize("size", [8, 48, 100])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="16, 32, 64"):
        doublings(size)


def test_the_code_is_random_in_training_and_its_mean_in_evaluation():
    torch.manual_seed(0)
    generator, condition = Generator(12, 16, 4, code=6, noise=1), torch.randn(3, 12)
    a, b = generator(condition), generator(condition)
    assert torch.equal(a.mean, b.mean) and not torch.equal(a.pictures, b.pictures)
    generator.eval()
    pictures = []
    for _ in range(2):
        torch.manual_seed(1)
        pictures.append(generator(condition).pictures)
    assert torch.equal(*pictures)


def test_divergence_by_hand():
    mean, log_variance = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = Painted(torch.zeros(3), mean, log_variance).divergence()
    for row in range(3):
        naive = [
            -0.5 * (1 + v - m**2 - math.exp(v))
            for m, v in zip(mean[row].tolist(), log_variance[row].tolist(), strict=True)
        ]
        assert float(found[row]) == pytest.approx(sum(naive) / 4, rel=1e-5)
    assert torch.equal(Painted(mean, torch.zeros(2, 4), torch.zeros(2, 4)).divergence(), torch.zeros(2))


def test_what_is_told_by_hand():
    logits = torch.tensor([-200.0, -1.0, 0.0, 2.0, 200.0], requires_grad=True)
    for real in (True, False):
        loss = told_as(logits, real)
        p = torch.sigmoid(logits.detach().double())
        naive = -(p if real else 1 - p).clamp(min=1e-300).log()
        torch.testing.assert_close(loss[1:4].double(), naive[1:4], rtol=1e-6, atol=1e-7)
        (slope,) = torch.autograd.grad(loss.sum(), logits)
        torch.testing.assert_close(slope.double(), p - float(real), rtol=1e-6, atol=1e-7)
        assert torch.isfinite(loss).all()


def test_photos_as_pictures_keep_their_mean_and_range():
    photos = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    photos[0] = 255
    pictures = as_pictures(photos, 16)
    assert pictures.shape == (2, 3, 16, 16) and torch.equal(pictures[0], torch.ones(3, 16, 16))
    assert float(pictures[1].mean()) == pytest.approx(float(photos[1].float().mean()) / 127.5 - 1, abs=0.02)
    same = as_pictures(photos[:, :, :16, :16], 16)
    torch.testing.assert_close(same, photos[:, :, :16, :16].float() / 127.5 - 1)


def test_a_discriminator_and_its_condition():
    """It learns which code belongs to which picture: the condition is read."""
    torch.manual_seed(0)
    discriminator = Discriminator(16, 8, code=2)
    pictures, code = torch.randn(2, 3, 16, 16).repeat(4, 1, 1, 1).tanh(), torch.eye(2).repeat(4, 1)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    for _ in range(40):
        loss = told_as(discriminator(pictures, code), True).mean()
        loss = loss + told_as(discriminator(pictures, code.flip(1)), False).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2 < 2 * math.log(2)


def test_the_cross_decoder_reads_the_recipe_and_the_photo():
    torch.manual_seed(0)
    decoder = CrossDecoder(10, 8, 6, layers=2, heads=2, feedforward=16, dropout=0.0)
    recipe, components = torch.randn(3, 10), tuple(torch.randn(3, 3, 8))
    photo = torch.randn(3, 6, 4, 4, requires_grad=True)
    fused = decoder(recipe, components, photo)
    assert fused.shape == (3, 10) and fused.abs().max() < 1
    alone = decoder(recipe, components, None)
    assert not torch.allclose(fused, alone) and not torch.allclose(fused, decoder(recipe, components, photo.flip(0)))
    # Row for row: one row's photo is nothing to another.
    (slope,) = torch.autograd.grad(fused[0].sum(), photo)
    assert slope[0].abs().max() > 0 == slope[1:].abs().max()
    one = decoder(recipe[:1], tuple(part[:1] for part in components), photo[:1])
    torch.testing.assert_close(one, fused[:1], rtol=1e-5, atol=1e-6)
    # A photo's tokens have no order: the average pooled map is where they are, not how they lie.
    turned = photo.flip(3)
    torch.testing.assert_close(decoder(recipe, components, turned), fused, rtol=1e-5, atol=1e-6)
