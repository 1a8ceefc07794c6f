import numpy as np
import pytest
import torch

from recipe_lib.data.images import decode_jpeg
from recipe_lib.data.loading import Draw, InOrder, PairedBatches, StudyDataset, loader, recipe_batch, segment_pixels


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


def test_workers_change_nothing(tiny_store):
    dataset, sampler = StudyDataset(tiny_store.split("train"), 48, augment=True, seed=1), PairedBatches(96, 32, seed=1)
    alone = [batch.images for batch in loader(dataset, sampler)]
    helped = [batch.images for batch in loader(dataset, sampler, 2)]
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
