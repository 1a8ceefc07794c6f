"""Each measure on embeddings made by hand: a perfect system, a blind one, one that sees nothing but the context."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.store import Store
from recipe_lib.evaluation.bias import context_probe, context_pull, ingredient_probe, study_bias
from recipe_lib.evaluation.scores import Encoded
from recipe_lib.kitchen.looks import STYLES
from recipe_lib.kitchen.model import CUISINES, KitchenConfig, cook

N, C = 600, 5
RNG = np.random.default_rng(0)
TABLE, CUISINE = RNG.integers(C, size=N), RNG.integers(C, size=N)  # independent, as under do_context
LABELS = RNG.random((N, 8)) < 0.3


def one_hot(x):
    return F.one_hot(torch.from_numpy(x), C).float()


def noise(width, seed=0):
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed))


def test_pull_is_zero_for_the_perfect_and_the_blind_and_high_for_one_that_follows_the_table():
    recipes = torch.cat([one_hot(CUISINE), 0.3 * noise(16)], 1)
    assert abs(context_pull(recipes, recipes, TABLE, CUISINE)) < 0.02, "perfect: neighbours follow the dish"
    assert abs(context_pull(noise(21, 1), recipes, TABLE, CUISINE)) < 0.02, "blind"
    follows = torch.cat([one_hot(TABLE), 0.01 * noise(16, 2)], 1)
    assert context_pull(follows, recipes, TABLE, CUISINE) == pytest.approx(1 - 1 / C, abs=0.03)


def test_pull_equals_a_loop():
    images, recipes = noise(6, 1)[:40], noise(6, 2)[:40]
    similarity = F.normalize(images.double(), dim=1) @ F.normalize(recipes.double(), dim=1).T
    total = 0.0
    for i in range(40):
        order = [j for j in similarity[i].argsort(descending=True).tolist() if j != i][:10]
        total += np.mean(CUISINE[order] == TABLE[i]) - np.mean(CUISINE[:40] == TABLE[i])
    assert context_pull(images, recipes, TABLE[:40], CUISINE[:40]) == pytest.approx(total / 40)


def test_probe_reads_the_context_where_it_is_and_not_where_it_is_not():
    holds = torch.cat([one_hot(TABLE), 0.3 * noise(16)], 1)
    assert context_probe(holds, TABLE) > 0.95
    assert abs(context_probe(noise(21), TABLE) - 1 / C) < 0.08


def test_ingredients_are_probed_group_by_group():
    # The embedding holds classes 0..3 and not 4..7; class 8 is in no recipe.
    images = torch.cat([torch.from_numpy(LABELS[:, :4]).float(), 0.2 * noise(12)], 1)
    labels = np.concatenate([LABELS, np.zeros((N, 1), bool)], 1)
    told = ingredient_probe(images, labels, {"shown": [0, 1, 2, 3], "hidden": [4, 5, 6, 7, 8], "absent": [8]})
    assert told["shown"] > 0.97 and abs(told["hidden"] - 0.5) < 0.06 and "absent" not in told


def test_a_kitchens_truth_reaches_every_measure(tmp_path):
    """Embeddings made of the truth itself: of the table, of the cuisine, of the ingredients that are salient."""
    prepare(cook(KitchenConfig(train=96, val=8, test=400, text_only=0)), tmp_path / "data", StoreConfig(64, 2, 20))
    store = Store(tmp_path / "data")
    context, ingredients = store.split("do_context"), store.split("do_ingredients")
    known = [(STYLES.index(t["style"]), list(CUISINES).index(t["cuisine"])) for t in context.truth]
    table, cuisine = (F.one_hot(torch.tensor(numbers), len(STYLES)).float() for numbers in zip(*known, strict=True))
    labels = torch.from_numpy(ingredients.label_matrix()).float()
    salient = torch.tensor([
        any(name in t["ingredients"] and t["visibility"][t["ingredients"].index(name)] == "salient"
            for t in ingredients.truth) for name in store.classes.names
    ])  # fmt: skip
    logits, spread = torch.zeros_like(labels), 0.01 * noise(len(STYLES))[:400]
    encoded = {
        (name, split.name): Encoded(images, torch.zeros_like(images), recipes, labels, logits)
        for name, split, images, recipes in (
            ("table", context, table + spread, cuisine + spread.roll(1, 0)),
            ("cuisine", context, cuisine + spread, cuisine + spread.roll(1, 0)),
            ("salient", ingredients, labels * salient + 0.01 * noise(20)[:400], labels),
        )
    }
    value = study_bias(encoded, store).set_index(["variant", "measure"])["value"]
    assert value["table", "context_pull"] == pytest.approx(0.9, abs=0.05) and value["table", "context_probe"] > 0.98
    assert abs(value["cuisine", "context_pull"]) < 0.05 and value["cuisine", "context_probe"] < 0.25
    assert value["salient", "salient_ingredients_probe"] > 0.98
    assert value["salient", "subtle_ingredients_probe"] < 0.65
