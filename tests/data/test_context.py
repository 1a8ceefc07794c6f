import numpy as np
import pytest
import torch

from recipe_lib.data.batches import strata
from recipe_lib.data.context import Window, discs, stored_dish, swap_context
from recipe_lib.data.loading import Draw, StudyDataset


def test_discs_have_the_radii_that_they_are_drawn_with():
    masks = discs(200, 60, (0.2, 0.4), np.random.default_rng(0))
    radii = np.sqrt(masks.mean((1, 2)) / np.pi)
    assert masks.shape == (200, 60, 60) and masks[:, 30, 30].all() and not masks[:, 0, 0].any()
    assert 0.19 < radii.min() < 0.22 and 0.38 < radii.max() < 0.41


def test_the_dish_keeps_its_pixels_and_the_rest_is_one_other_photos():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(6, 8, 8, 3), dtype=np.uint8)
    dish = np.zeros((6, 8, 8), bool)
    dish[:, 2:6, 3:5] = True
    swapped = swap_context(images, dish, 1.0, np.random.default_rng(1))
    lenders = []
    for i in range(6):
        assert (swapped[i][dish[i]] == images[i][dish[i]]).all()
        lenders += [j for j in range(6) if (swapped[i][~dish[i]] == images[j][~dish[i]]).all()]
    assert sorted(lenders) == list(range(6)) and all(i != j for i, j in enumerate(lenders)), (
        "each lends once, not to itself"
    )
    assert (swap_context(images, dish, 0.0, np.random.default_rng(1)) == images).all()
    assert (swap_context(images, dish, 1.0, np.random.default_rng(1)) == swapped).all()
    some = swap_context(np.repeat(images, 100, 0), np.zeros((600, 8, 8), bool), 0.3, rng)
    assert 0.2 < np.mean([(a != b).any() for a, b in zip(some, np.repeat(images, 100, 0), strict=True)]) < 0.4


def test_a_placebo_lends_within_a_stratum_alone():
    rng = np.random.default_rng(0)
    images, strata = rng.integers(256, size=(9, 4, 4, 3), dtype=np.uint8), np.array([0, 1, 0, 2, 1, 0, 1, 0, 1])
    swapped = swap_context(images, np.zeros((9, 4, 4), bool), 1.0, np.random.default_rng(1), strata)
    lender = [int(np.flatnonzero((image == images).all((1, 2, 3)))[0]) for image in swapped]
    assert sorted(lender) == list(range(9)) and (strata[lender] == strata).all()
    assert [i for i, j in enumerate(lender) if i == j] == [3], "who is alone in a stratum keeps its own"
    whole = swap_context(images, np.zeros((9, 4, 4), bool), 1.0, np.random.default_rng(1))
    assert (whole == swap_context(images, np.zeros((9, 4, 4), bool), 1.0, np.random.default_rng(1), np.ones(9))).all()


def test_surroundings_in_a_kitchen_stay_those_of_the_cuisine(tiny_store):
    split = tiny_store.split("train")
    cuisines, draw = strata(split, 1), Draw(np.arange(16), True, 0)
    options = {"augment": True, "seed": 1, "swap": 1.0, "swap_radius": (0.1, 0.1)}
    plain = StudyDataset(split, 48, augment=True, seed=1)[draw].images
    placebo = StudyDataset(split, 48, swap_strata=cuisines, **options)[draw].images
    lent = (placebo[:, None, :, 0, 0] == plain[None, :, :, 0, 0]).all(2).numpy()  # whose corner it may be
    assert all(cuisines[draw.rows][row].tolist().count(c) for row, c in zip(lent, cuisines[draw.rows], strict=True))
    free = StudyDataset(split, 48, **options)[draw].images
    assert not torch.equal(free, placebo)


def test_stored_masks_follow_crop_and_mirror():
    whole = np.zeros((16, 16), bool)
    whole[:8, :4] = True  # the upper left of the photo
    bits = np.stack([np.packbits(whole), np.zeros(32, np.uint8), np.packbits(whole)])
    otherwise = np.zeros((3, 8, 8), bool)
    otherwise[1, 0, 0] = True
    # The crop shows columns 8..16 of a photo 16 wide, then 0..8; each cell is a pixel.
    windows = [Window(0, 0, 8, 8, False), Window(0, 0, 8, 8, False), Window(4, 0, 8, 8, True)]
    dish = stored_dish(bits, windows, otherwise)
    assert (dish[0] == whole[:8, :8]).all()
    assert (dish[1] == otherwise[1]).all(), "without parts it is the disc"
    assert (dish[2] == whole[4:12, :8][:, ::-1]).all()


def test_a_swapped_batch_differs_outside_the_disc_alone(tiny_store):
    draw = Draw(np.arange(12), True, 0)
    options = {"augment": True, "seed": 1}
    plain = StudyDataset(tiny_store.split("train"), 48, **options)[draw]
    swapped = StudyDataset(tiny_store.split("train"), 48, swap=1.0, swap_radius=(0.3, 0.3), **options)[draw]
    inside = discs(1, 48, (0.3, 0.3), np.random.default_rng(0))[0]
    same = (plain.images == swapped.images).all(1).numpy()
    assert same[:, inside].all() and same[:, ~inside].mean() < 0.1
    assert (plain.labels == swapped.labels).all() and swapped.visible is None


@pytest.mark.parametrize("parts", [True, False])
def test_parts_that_are_stored_are_the_dish(clip_store, tiny_store, parts):
    split = (clip_store if parts else tiny_store).split("train")
    assert (split.foreground is not None) == parts
    if parts:
        assert split.foreground.shape == (len(split), 128) and split.foreground.any(1).mean() > 0.5
        draw = Draw(np.arange(8), True, 0)
        plain, swapped = (StudyDataset(split, 48, seed=1, swap=s)[draw].images for s in (0.0, 1.0))
        kept = (plain == swapped).all(1).float().mean((1, 2))
        assert ((kept > 0.02) & (kept < 0.98)).float().mean() > 0.5


def test_what_shows_is_told_where_it_is_known(tiny_store):
    split = tiny_store.split("iid")
    batch = StudyDataset(split, 48, visible=True)[Draw(np.arange(len(split)), True, 0)]
    names = tiny_store.classes.names
    for row, truth in enumerate(split.truth):
        seen = {name for name, shows in zip(truth["ingredients"], truth["visible"], strict=True) if shows}
        told = {names[k] for k in batch.visible[row].nonzero().flatten().tolist()}
        labelled = {names[k] for k in batch.labels[row].nonzero().flatten().tolist()}
        assert told == seen & labelled
    assert batch.visible.sum() < batch.labels.sum()
