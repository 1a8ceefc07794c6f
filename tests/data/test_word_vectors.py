import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.store import Store
from recipe_lib.data.text import PAD
from recipe_lib.data.word_vectors import _joined, add_word_vectors, word_vectors
from recipe_lib.kitchen.model import KitchenConfig, cook


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names") / "data"
    config = StoreConfig(64, min_word_count=2, ingredient_classes=20, text_tokens="names")
    recipes = (replace(r, images=r.images[:1]) for r in cook(KitchenConfig(train=300, val=5, test=5, seed=3)))
    prepare(recipes, folder, config)
    return Store(folder)


def test_the_longest_names_are_joined_and_nothing_else():
    names = {("olive", "oil"): 90, ("extra", "olive", "oil"): 91, ("salt", "water"): None}
    words = "extra olive oil then olive oil and salt water olive".split()
    assert list(_joined(words, list(range(10)), names)) == [91, 3, 90, 6, 7, 8, 9]
    assert list(_joined([], [], names)) == []
    assert list(_joined(["a"], [5], {})) == [5]


def test_every_word_has_a_vector_and_names_that_steps_hold_are_learnt(store):
    card = add_word_vectors(store.folder, 24, seed=1)
    vectors = word_vectors(store.folder)
    assert vectors.shape == (card["vocabulary"], 24) and vectors.isfinite().all()
    assert not vectors[PAD].any() and (vectors[1:].norm(dim=1) > 0).all()
    assert card["word_vectors"]["dim"] == 24 and json.loads((store.folder / "card.json").read_text()) == card
    # Names of two words are in the steps; what is learnt leaves the random start of those that are in none.
    named = [i for word, i in store.tokenizer.get_vocab().items() if "_" in word]
    assert len(named) > 10
    unit = torch.nn.functional.normalize(vectors, dim=1)
    assert (unit[named] @ unit[named].T).mean() > 0.1, "learnt vectors share a direction, random ones do not"


def test_the_same_seed_gives_the_same_vectors_whatever_python_hashes_to(store, tmp_path):
    code = "import sys; from pathlib import Path; from recipe_lib.data.word_vectors import add_word_vectors; "
    code += "add_word_vectors(Path(sys.argv[1]), 8, int(sys.argv[2]))"
    made = []
    for salt, seed in ("1", "4"), ("77", "4"), ("1", "5"):
        folder = tmp_path / f"{salt} {seed}"
        shutil.copytree(store.folder, folder)
        environment = os.environ | {"PYTHONHASHSEED": salt}
        subprocess.run([sys.executable, "-c", code, str(folder), seed], check=True, env=environment)
        made.append((word_vectors(folder), json.loads((folder / "card.json").read_text())["word_vectors"]))
    assert torch.equal(made[0][0], made[1][0]) and made[0][1] == made[1][1]
    assert not torch.equal(made[0][0], made[2][0]) and made[0][1] != made[2][1]
