"""The synthetic kitchen: its structural causal model says what must depend on what, so the tests can be exact."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from recipe_lib.data.recipe import DataError
from recipe_lib.kitchen import model as kitchen
from recipe_lib.kitchen import plating
from recipe_lib.kitchen.looks import DISHES, FORMS, STYLES
from recipe_lib.kitchen.model import CHUNK, CUISINES, KitchenConfig, cook
from recipe_lib.kitchen.pantry import pantry

SMALL = KitchenConfig(train=150, val=20, test=60, text_only=30, seed=4)
CUT = {"dish_given_cuisine": 0, "ingredients_given_cuisine": 0, "ingredients_given_dish": 0, "style_given_cuisine": 0}


def only(**changes) -> KitchenConfig:
    """A kitchen with no split but those named."""
    return KitchenConfig(**{"train": 0, "val": 0, "test": 0, "text_only": 0, **changes})


def by_split(recipes):
    key = [recipe.split if recipe.images else "text_only" for recipe in recipes]
    return {name: [r for r, k in zip(recipes, key, strict=True) if k == name] for name in dict.fromkeys(key)}


def same(a, b) -> bool:
    text = (a.id, a.title, a.ingredients, a.instructions, a.names, a.truth) == (
        b.id, b.title, b.ingredients, b.instructions, b.names, b.truth)  # fmt: skip
    return text and all(np.array_equal(p, q) for p, q in zip(a.images, b.images, strict=True))


def causes(config, n, confounded=True):
    """Causal variables of n recipes or a few more, without text and photos."""
    chunks = range(-(-n // CHUNK))
    drawn = [kitchen._decide(np.random.default_rng([config.seed, 9, c]), config, confounded) for c in chunks]
    return {key: np.concatenate([d[key] for d in drawn]) for key in drawn[0]}


def dependence(a, b) -> float:
    """Chi-square statistic over its degrees of freedom: about 1 for independent variables."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    table = table[:, table.sum(0) > 0]
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    return float(((table - expected) ** 2 / expected).sum() / ((table.shape[0] - 1) * (table.shape[1] - 1)))


def total_variation(a, b) -> float:
    size = max(a.max(), b.max()) + 1
    return 0.5 * float(np.abs(np.bincount(a, minlength=size) / len(a) - np.bincount(b, minlength=size) / len(b)).sum())


@pytest.fixture(scope="module")
def served():
    return by_split(list(cook(SMALL)))


def test_the_pantry_is_large_and_well_formed():
    items = pantry()
    assert len({item.name for item in items}) == len(items) >= 100
    assert len(CUISINES) >= 8 and len(DISHES) >= 12 and len(STYLES) >= len(CUISINES)
    for item in items:
        assert set(item.cuisines) <= set(CUISINES) and set(item.dishes) <= set(DISHES), item.name
        assert set(item.cuts.values()) <= {*FORMS, "base"} and len(item.cuts) <= 4, item.name
        assert bool(item.cuts) == (item.visibility != "invisible"), item.name
    for group in ("salient", "subtle", "invisible"):
        ranks = sorted(item.rank for item in items if item.visibility == group)
        assert ranks == list(range(1, len(ranks) + 1))


def test_counts_ids_and_types(served):
    assert {k: len(v) for k, v in served.items()} == {
        "train": 150, "val": 20, "text_only": 30, "iid": 60, "do_context": 60, "do_ingredients": 60}  # fmt: skip
    recipes = list(itertools.chain(*served.values()))
    assert len({r.id for r in recipes}) == len(recipes) and all(len(r.id) == 10 and int(r.id, 16) >= 0 for r in recipes)
    kinds = {key: type(value) for key, value in recipes[0].truth.items()}
    for recipe in recipes:
        assert {key: type(value) for key, value in recipe.truth.items()} == kinds
        assert all(type(v) is bool for v in recipe.truth["visible"])
        assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in recipe.images)
    assert {r.split for r in served["text_only"]} == {"train"}
    assert not any(any(r.truth["visible"]) or r.images for r in served["text_only"])


def test_ids_stay_unique_in_a_big_kitchen():
    config = KitchenConfig()
    ids = {kitchen._number(config, split, i) for split in kitchen.SPLITS for i in range(50_000)}
    assert len(ids) == 6 * 50_000


def test_same_seed_same_bytes_and_another_seed_differs(served):
    again = by_split(list(cook(SMALL)))
    assert all(same(a, b) for split in served for a, b in zip(served[split], again[split], strict=True))
    other = next(cook(replace(SMALL, seed=5)))
    assert other.id != served["train"][0].id and not np.array_equal(other.images[0], served["train"][0].images[0])


def test_a_split_depends_on_no_other_and_grows_at_its_end(served):
    alone = list(cook(only(val=21, seed=4)))  # of 21 the last has lost its twin, if it had one
    assert all(same(a, b) for a, b in zip(served["val"], alone, strict=False))


def test_photos_do_not_depend_on_the_batch():
    config = KitchenConfig()
    drawn = kitchen._decide(np.random.default_rng(0), config, True)
    scene = kitchen._scene(np.random.default_rng(1), config, drawn)
    whole, seen = plating.draw(scene, 64)
    for rows in (slice(0, 1), slice(5, 22), slice(100, CHUNK)):
        images, pixels = plating.draw(scene.rows(rows), 64)
        assert np.array_equal(images, whole[rows]) and np.array_equal(pixels, seen[rows])


def test_do_context_changes_the_table_and_nothing_else(served):
    shared = ("cuisine", "dish", "cooking", "ingredients", "visibility", "visible")
    moved = 0
    for a, b in zip(served["iid"], served["do_context"], strict=True):
        assert (a.title, a.ingredients, a.instructions, a.names) == (b.title, b.ingredients, b.instructions, b.names)
        assert all(a.truth[key] == b.truth[key] for key in shared)
        assert b.truth["source_id"] == a.id != b.id and not a.truth["source_id"]
        assert bool(a.truth["twin"]) == bool(b.truth["twin"])
        moved += a.truth["style"] != b.truth["style"]
        assert np.array_equal(a.images[0], b.images[0]) == (a.truth["style"] == b.truth["style"])
    assert 0.7 < moved / 60 < 1


def test_food_looks_the_same_on_every_table():
    config = replace(SMALL, noise=0.0)
    drawn = kitchen._decide(np.random.default_rng(0), config, True)
    drawn["dish"][:] = list(DISHES).index("pizza")
    photos = []
    for style in (0, 4):
        drawn["style"] = np.full(CHUNK, style)
        photos.append(plating.draw(kitchen._scene(np.random.default_rng(1), config, drawn).rows(slice(0, 8)), 64)[0])
    a, b = photos
    assert np.array_equal(a[:, 24:40, 24:40], b[:, 24:40, 24:40]) and not np.array_equal(a[:, :8], b[:, :8])


@pytest.mark.parametrize("g", [0.0, 0.5, 0.9, 1.0])
def test_style_is_the_cuisines_own_with_probability_g(g):
    drawn = causes(only(style_given_cuisine=g), 4000)
    assert np.mean(drawn["style"] == drawn["cuisine"]) == pytest.approx(g + (1 - g) / len(STYLES), abs=0.03)


def test_do_context_draws_the_style_uniformly(served):
    recipes = by_split(list(cook(only(test=400))))
    own = dict(zip(CUISINES, STYLES, strict=True))
    share = {s: np.mean([r.truth["style"] == own[r.truth["cuisine"]] for r in recipes[s]]) for s in recipes}
    assert share["iid"] == pytest.approx(0.91, abs=0.05)
    assert share["do_context"] == pytest.approx(0.1, abs=0.06) == share["do_ingredients"]


def test_arrows_hold_where_they_are_and_only_there():
    """Every dependence appears with its arrow and vanishes without it."""
    config = only(popularity=0.5)
    for confounded in (True, False):
        drawn = causes(config, 6000, confounded)
        parts = {"salient": drawn["line"][:, 1], "subtle": drawn["line"][:, 5], "invisible": drawn["line"][:, 8]}
        pairs = {f"cuisine, {k}": (drawn["cuisine"], v) for k, v in parts.items()}
        pairs |= {f"dish, {k}": (drawn["dish"], v) for k, v in parts.items()}
        pairs |= {f"cuisine, {k}": (drawn["cuisine"], drawn[k]) for k in ("dish", "style")}
        for name, (a, b) in pairs.items():
            ratio = dependence(a[::2], b[::2])  # every other recipe: twins are not independent draws
            assert ratio > 2 if confounded else 0.8 < ratio < 1.25, (name, confounded, ratio)


def test_with_every_arrow_cut_all_splits_are_alike():
    cut = only(**CUT)
    a, b = causes(cut, 6000, True), causes(replace(cut, seed=2), 6000, False)
    for key in ("cuisine", "dish", "cooking", "style", "amount"):
        assert total_variation(a[key].ravel(), b[key].ravel()) < 0.05, key
    assert total_variation(a["line"].ravel() + 1, b["line"].ravel() + 1) < 0.05
    own = causes(only(), 6000, True)
    assert total_variation(a["dish"], own["dish"]) > 0.05  # the same measure sees what the arrows do


def test_popular_ingredients_are_popular():
    items, share = pantry(), {}
    for exponent in (0.0, 1.5):
        line = causes(only(popularity=exponent, **CUT), 3000)["line"]
        top = [i for i, item in enumerate(items) if item.visibility == "salient" and item.rank <= 5]
        share[exponent] = np.isin(line[:, 1:5], top).sum() / (line[:, 1:5] >= 0).sum()
    assert share[0.0] == pytest.approx(5 / 60, abs=0.02) and share[1.5] > 0.4


def test_twins_differ_by_one_subtle_ingredient(served):
    visibility = {item.name: item.visibility for item in pantry()}
    for recipes in served.values():
        index = {r.id: r for r in recipes}
        for recipe in recipes:
            if other := index.get(recipe.truth["twin"]):
                assert other.truth["twin"] == recipe.id
                (mine,), (yours,) = set(recipe.names) - set(other.names), set(other.names) - set(recipe.names)
                assert visibility[mine] == visibility[yours] == "subtle"
                assert all(recipe.truth[key] == other.truth[key] for key in ("cuisine", "dish", "cooking"))
            else:
                assert not recipe.truth["twin"]
    assert np.mean(causes(only(near_duplicates=0.3), 5000)["twin"]) == pytest.approx(0.3, abs=0.04)
    assert not causes(only(near_duplicates=0), 500)["twin"].any() and causes(only(near_duplicates=1), 500)["twin"].all()


def test_text_reads_like_a_recipe_and_agrees_with_the_truth(served):
    plural = {item.name: item.plural for item in pantry()}
    visibility = {item.name: item.visibility.replace("staple", "salient") for item in pantry()}
    titles, told, mentioned = Counter(), 0, []
    for recipe in itertools.chain(*served.values()):
        truth = recipe.truth
        assert recipe.names == truth["ingredients"] and len(set(recipe.names)) == len(recipe.names)
        assert truth["visibility"] == [visibility[name] for name in recipe.names]
        assert len(recipe.ingredients) == len(recipe.names) == len(truth["visible"]) and 5 <= len(recipe.names) <= 12
        for line, name in zip(recipe.ingredients, recipe.names, strict=True):
            assert name in line or plural[name] in line
            assert line[0].isdigit() and "  " not in line and "{" not in line
        assert 4 <= len(recipe.instructions) <= 8
        assert all(len(step.split()) <= 15 and step[0].isupper() and step[-1] == "." for step in recipe.instructions)
        steps = " ".join(recipe.instructions)
        mentioned.append(np.mean([name in steps or plural[name] in steps for name in recipe.names]))
        assert recipe.title and recipe.title[0].isupper() and "{" not in recipe.title
        titles[recipe.title] += 1
        told += truth["cuisine"] in recipe.title
        assert sum(name.lower() in recipe.title.lower() for name in recipe.names) < len(recipe.names)
    assert np.mean(mentioned) > 0.85 and len(titles) > 200
    assert 0.2 < told / sum(titles.values()) < 0.8  # the title often names the cuisine, never always


def test_visible_means_seen_in_the_photo(served):
    share = {"salient": [], "subtle": [], "invisible": []}
    for recipe in itertools.chain(*(v for k, v in served.items() if k != "text_only")):
        for kind, visible in zip(recipe.truth["visibility"], recipe.truth["visible"], strict=True):
            share[kind].append(visible)
    share = {kind: np.mean(seen) for kind, seen in share.items()}
    assert share["invisible"] == 0 and 0.5 < share["subtle"] <= 1 and share["salient"] > 0.85


def test_occlusion_hides_and_never_reveals():
    seen = []
    for occlusion in (0.0, 0.5, 1.0):
        config = replace(SMALL, occlusion=occlusion)
        drawn = kitchen._decide(np.random.default_rng(0), config, True)
        seen.append(plating.draw(kitchen._scene(np.random.default_rng(1), config, drawn), 64)[1][:, 1:8])
    assert (seen[0] >= seen[1]).all() and (seen[1] >= seen[2]).all()
    assert seen[0].sum() > 1.2 * seen[1].sum() > 1.4 * seen[2].sum()


def test_every_salient_ingredient_shows():
    """Each of them, alone on a plate, moves pixels, and no two that share a form and a size have the same colour."""
    config = replace(SMALL, noise=0.0, occlusion=0.0)
    items = [i for i, item in enumerate(pantry()) if item.visibility == "salient"]
    drawn = kitchen._decide(np.random.default_rng(0), config, True)
    for key in ("dish", "cooking", "style", "cut", "amount"):
        drawn[key][:] = 2
    drawn["cooking"][:] = 0
    drawn["cut"][:] = 0
    drawn["line"][:, 1:] = -1
    bare = plating.draw(kitchen._scene(np.random.default_rng(1), config, drawn), 64)[0][: len(items)].astype(int)
    drawn["line"][: len(items), 1] = items
    photos = plating.draw(kitchen._scene(np.random.default_rng(1), config, drawn), 64)[0][: len(items)].astype(int)
    moved = (np.abs(photos - bare).max(-1) > 25).mean((1, 2))
    assert (moved > 0.03).all(), [pantry()[items[k]].name for k in np.flatnonzero(moved <= 0.03)]


def test_a_large_photo_shows_the_same_dish():
    small, large = (next(cook(only(train=1, noise=0, image_size=size))) for size in (64, 224))
    assert small.title == large.title and large.images[0].shape == (224, 224, 3)
    a, b = (image.reshape(32, k, 32, k, 3).mean((1, 3)) for image, k in ((small.images[0], 2), (large.images[0], 7)))
    assert np.abs(a - b)[8:24, 8:24].mean() < 20 < a.std()


@pytest.mark.parametrize(
    "change",
    [
        {"train": -1}, {"val": 1.5}, {"image_size": 32}, {"image_size": 512}, {"style_given_cuisine": 1.1},
        {"occlusion": -0.1}, {"noise": float("nan")}, {"near_duplicates": 2}, {"popularity": -1}, {"seed": -1},
        {"dish_given_cuisine": "1"}, {"test": True}, {"ingredients_given_dish": float("inf")},
    ],
)  # fmt: skip
def test_impossible_values_are_refused_in_one_line(change):
    with pytest.raises(DataError, match=next(iter(change))) as error:
        KitchenConfig(**change)
    assert "\n" not in str(error.value)


def linear_recall(config: KitchenConfig) -> dict[str, float]:
    """R@10 over 400 candidates of the simplest learner there is: ridge regression from coarse pixels to ingredients."""
    splits = by_split(list(cook(config)))
    words = {name: i for i, name in enumerate(ingredient.name for ingredient in pantry())}

    def arrays(recipes):
        pixels = np.stack([r.images[0] for r in recipes]).astype(np.float64)
        coarse = pixels.reshape(len(pixels), 8, 8, 8, 8, 3).mean((2, 4)).reshape(len(pixels), -1) / 255
        named = np.zeros((len(recipes), len(words)))
        for row, recipe in zip(named, recipes, strict=True):
            row[[words[name] for name in recipe.truth["ingredients"]]] = 1
        return np.hstack([coarse, np.ones((len(coarse), 1))]), named

    x, y = arrays(splits["train"])
    mean = y.mean(0)
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (y - mean))
    recall = {}
    for name in ("iid", "do_context", "do_ingredients"):
        x, y = arrays(splits[name])
        similarity = (x @ weights) @ ((y - mean) / np.linalg.norm(y - mean, axis=1, keepdims=True)).T
        rank = 1 + (similarity > similarity.diagonal()[:, None]).sum(1)
        recall[name] = float((rank <= 10).mean())
    return recall


def test_without_confounding_all_splits_score_alike_and_with_it_they_do_not():
    size = {"train": 1500, "test": 400, "seed": 2}
    cut, confounded = linear_recall(only(**size, **CUT)), linear_recall(only(**size))
    # Two standard errors of a difference of shares near .2 over 400 queries.
    assert max(cut.values()) - min(cut.values()) < 0.06, cut
    assert confounded["iid"] - confounded["do_context"] > 0.08, confounded
    assert confounded["iid"] - confounded["do_ingredients"] > 0.08, confounded
