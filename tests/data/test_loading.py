from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision import transforms

from recipe_lib.data.images import decode_jpeg
from recipe_lib.data.loading import Draw, InOrder, PairedBatches, StudyDataset, loader, recipe_batch, segment_pixels
from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.recipe import Recipe
from recipe_lib.data.store import Store
from recipe_lib.kitchen.model import KitchenConfig, cook

SPLITS = ["train"] * 4 + ["val", "test"]


def test_recipe_batch_equals_loops(tiny_store):
    split, rows = tiny_store.split("train"), np.array([5, 0, 17])
    batch = recipe_batch(split, rows)
    assert len(batch.tokens.unique(dim=0)) == len(batch.tokens), "each distinct sentence once"
    for i, row in enumerate(rows):
        sentences = [
            split.words[split.sentence_start[s] : split.sentence_start[s + 1]].tolist()
            for s in range(split.recipe_start[row], split.recipe_start[row + 1])
        ]
        lines = int(split.ingredient_lines[row])

        def read(index):
            return [[t for t in batch.tokens[j].tolist() if t] for j in index.tolist() if j >= 0]

        assert read(batch.title[i : i + 1]) == sentences[:1]
        assert read(batch.ingredients[i]) == sentences[1 : 1 + lines]
        assert read(batch.instructions[i]) == sentences[1 + lines :]


def test_a_loader_pins_whole_batches(tiny_store, monkeypatch):
    """What DataLoader's pin_memory thread does; without a GPU there is no such memory, so the tensors are watched."""
    dataset = StudyDataset(tiny_store.split("train"), 48)
    batch, pinned = dataset[Draw(np.array([3, 1]), True, 0)], []
    batch.segment_mask = torch.ones(2, 3, dtype=torch.bool)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: (pinned.append(self), self.clone())[1])
    moved = pin_memory(batch)
    sides = [batch.rows, batch.images, batch.labels, batch.segment_mask, *vars(batch.recipes).values()]
    assert len(pinned) == len(sides) == 8 and all(any(x is y for y in pinned) for x in sides)
    assert torch.equal(moved.images, batch.images) and moved.descriptions is None and moved.images is not batch.images
    assert torch.equal(moved.recipes.tokens, batch.recipes.tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_on_a_machine_with_a_gpu(tiny_store):
    batch = next(iter(loader(StudyDataset(tiny_store.split("train"), 48), InOrder(4, 4))))
    assert batch.images.is_pinned() and batch.recipes.tokens.is_pinned()


def test_batches_follow_from_seed_and_epoch(tiny_store):
    split, text = tiny_store.split("train"), tiny_store.split("text_only")
    dataset = StudyDataset(split, 48, text_only=text, augment=True, seed=1)
    rows = np.array([3, 1, 2])
    first, same = dataset[Draw(rows, True, 0)], dataset[Draw(rows, True, 0)]
    assert torch.equal(first.images, same.images) and first.images.shape == (3, 3, 48, 48)
    assert not torch.equal(first.images, dataset[Draw(rows, True, 1)].images)
    assert not torch.equal(first.images, StudyDataset(split, 48, augment=True, seed=2)[Draw(rows, True, 0)].images)
    only_text = dataset[Draw(rows, False, 0)]
    assert only_text.images is None and only_text.labels is None


def test_centre_crop_is_the_centre_and_labels_are_the_recipes(tiny_store):
    split = tiny_store.split("val")
    whole = StudyDataset(split, 64)[Draw(np.arange(4), True, 0)]
    centre = StudyDataset(split, 48)[Draw(np.arange(4), True, 0)]
    assert torch.equal(centre.images, whole.images[:, :, 8:56, 8:56])
    assert torch.equal(whole.labels.bool(), torch.from_numpy(split.label_matrix(np.arange(4))))
    with pytest.raises(ValueError, match="crop_size 65"):
        StudyDataset(split, 65)[Draw(np.arange(2), True, 0)]


def test_segments_as_pixels_are_those_of_the_photos_that_are_seen(clip_store):
    split, rows = clip_store.split("train"), np.arange(12)
    batch = StudyDataset(split, 56, augment=True, segments=2)[Draw(rows, True, 0)]
    assert batch.segments.shape == (12, 2, 3, 56, 56) and batch.segments.dtype == torch.uint8
    for row in rows:
        jpegs = split.segments(row)[:2]  # the kitchen's recipes have one photo each
        assert batch.segment_mask[row].tolist() == [i < len(jpegs) for i in range(2)]
        for pixels, jpeg in zip(batch.segments[row], jpegs, strict=False):
            assert torch.equal(pixels, torch.from_numpy(np.array(decode_jpeg(jpeg))).permute(2, 0, 1))
        assert not batch.segments[row, len(jpegs) :].any()
    assert StudyDataset(split, 56)[Draw(rows, True, 0)].segments is None


def test_photos_without_segments_have_one_empty_place(clip_store, monkeypatch):
    split = clip_store.split("train")
    monkeypatch.setitem(vars(split), "segment_counts", np.zeros_like(split.segment_counts))
    pixels, mask = segment_pixels(split, np.arange(3), 4)
    assert pixels.shape == (3, 1, 3, 56, 56) and not pixels.any() and not mask.any()


def test_photos_are_those_of_the_released_code(tmp_path):
    """Resize(256) and CenterCrop(224) of the originals, but for what JPEG loses; shapes and centres agree exactly."""
    kitchen = cook(KitchenConfig(train=12, val=2, test=2, text_only=0, image_size=224, noise=0.0, seed=1))
    recipes = [
        replace(r, images=[pixels[: 224 - 5 * i, : 170 + 5 * i] for pixels in r.images]) for i, r in enumerate(kitchen)
    ]
    released = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    originals = [Image.fromarray(r.images[0]) for r in recipes if r.split == "train"]
    expected = np.stack([np.asarray(released(photo), int) for photo in originals])
    difference = {}
    for name, quality in (("bilinear", 95), ("bilinear", 100), ("bicubic", 95)):
        config = StoreConfig(256, 1, 5, image_filter=name, jpeg_quality=quality)
        prepare(recipes, tmp_path / "data", config)
        batch = StudyDataset(Store(tmp_path / "data").split("train"), 224)[Draw(np.arange(12), True, 0)]
        ours = batch.images.permute(0, 2, 3, 1).numpy().astype(int)
        difference[name, quality] = np.abs(ours - expected).mean()
    assert difference["bilinear", 95] < 1.5 < difference["bicubic", 95]
    assert difference["bilinear", 100] < 0.5, "a photo one pixel aside would be over this"


def test_an_epoch_holds_every_pair_once_and_alternates_with_text():
    sampler = PairedBatches(70, 16, text_only=10, seed=0)
    draws = list(sampler)
    assert len(draws) == len(sampler) == 10 and [d.paired for d in draws] == [True, False] * 5
    assert sorted(np.concatenate([d.rows for d in draws if d.paired])) == list(range(70))
    assert all(len(set(d.rows)) == len(d.rows) <= 10 for d in draws if not d.paired)
    sampler.set_epoch(1)
    assert not np.array_equal(next(iter(sampler)).rows, draws[0].rows)


def test_a_last_batch_of_one_pair_is_dropped():
    assert [len(d.rows) for d in PairedBatches(33, 16)] == [16, 16]
    assert [len(d.rows) for d in PairedBatches(34, 16)] == [16, 16, 2]
    assert [len(d.rows) for d in InOrder(33, 16)] == [16, 16, 1]


@pytest.mark.parametrize(("pairs", "text", "world"), [(70, 10, 2), (66, 41, 4), (64, 3, 4), (65, 0, 4), (37, 9, 3)])
def test_processes_share_each_batch(pairs, text, world):
    size = 24 if world == 3 else 16
    alone = list(PairedBatches(pairs, size, text_only=text, seed=3))
    shares = [PairedBatches(pairs, size, text_only=text, seed=3, rank=rank, world=world) for rank in range(world)]
    steps = list(zip(*map(list, shares), strict=True))
    assert {len(share) for share in shares} == {len(steps)}
    assert len([d for step in steps for d in step if d.paired]) / world == pairs // size + (pairs % size >= world)
    expected = [draw for draw in alone if len(draw.rows) >= world and (draw.paired or text >= world)]
    assert len(expected) - len(steps) in (0, 1), "text alone is not drawn for a paired batch that is dropped"
    for step, draw in zip(steps, expected[: len(steps)], strict=True):
        assert {(d.paired, d.epoch, len(d.rows)) for d in step} == {(draw.paired, 0, len(draw.rows) // world)}
        together = np.stack([d.rows for d in step], axis=1).reshape(-1)
        assert list(together) == list(draw.rows[: len(together)]), "in the order of the whole batch"
    with pytest.raises(ValueError, match="17 does not divide among 2 devices"):
        PairedBatches(64, 17, world=2)


@pytest.mark.parametrize(("pairs", "world"), [(24, 2), (25, 2), (25, 4), (3, 4), (1, 3)])
def test_processes_share_what_is_in_order(pairs, world):
    shares = [list(InOrder(pairs, 8, rank=rank, world=world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1 and all(len(d.rows) <= 8 // world for s in shares for d in s)
    together = np.stack([np.concatenate([d.rows for d in share]) for share in shares], axis=1).reshape(-1)
    assert list(together[:pairs]) == list(range(pairs)) and set(together[pairs:]) <= {pairs - 1}


def test_only_first_photos_where_that_is_asked_for(tmp_path):
    """Photos of one colour each: white the first, black the second."""
    photos = [np.full((40, 40, 3), value, np.uint8) for value in (255, 0)]
    recipes = [Recipe(f"{i}", "Soup", ["salt"], ["Boil."], photos, split) for i, split in enumerate(SPLITS)]
    prepare(recipes, tmp_path / "data", StoreConfig(40, 1, 1))
    split = Store(tmp_path / "data").split("train")

    def brightness(**options):
        dataset = StudyDataset(split, 32, augment=True, **options)
        drawn = [dataset[Draw(np.arange(4), True, epoch)].images for epoch in range(8)]
        return torch.cat(drawn).float().mean((1, 2, 3)).round().unique().tolist()

    assert brightness() == [0, 255] and brightness(first_photo_only=True) == [255]


@pytest.mark.parametrize("policy", ["", "rand-m9-n2-mstd0.5"])
def test_workers_change_nothing(tiny_store, policy):
    """Neither does the state of the global generators, from which timm draws."""
    dataset = StudyDataset(tiny_store.split("train"), 48, augment=True, policy=policy, seed=1)
    plain, sampler = StudyDataset(dataset.split, 48, augment=True, seed=1), PairedBatches(96, 32, seed=1)
    alone = [batch.images for batch in loader(dataset, sampler)]
    helped = [batch.images for batch in loader(dataset, sampler, 2)]
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
    same = [torch.equal(batch.images, a) for batch, a in zip(loader(plain, sampler), alone, strict=True)]
    assert same == [not policy] * 3
