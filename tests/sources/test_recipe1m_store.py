"""Recipe1M all the way into the store: what the readers give is what training gets."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.recipe import DataError
from recipe_lib.data.store import Store
from recipe_lib.kitchen.model import KitchenConfig, cook
from recipe_lib.sources.recipe1m import read_recipe1m
from tests.layouts import write_recipe1m

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared test data is not here")
CONFIG = StoreConfig(48, min_word_count=2, ingredient_classes=20)


def store(source, folder, config=CONFIG, **options):
    prepare(read_recipe1m(source, **options)[0], folder, config)
    return Store(folder)


def sentences(split, row):
    first, last = split.recipe_start[row : row + 2]
    return [
        split.words[a:b].tolist()
        for a, b in zip(*(split.sentence_start[first + i : last + i] for i in (0, 1)), strict=True)
    ]


@pytest.fixture(scope="module")
def kitchen_layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe1m") / "data"
    cooked = [
        r for r in cook(KitchenConfig(train=60, val=12, test=12, text_only=10, seed=5)) if r.split != "do_context"
    ]
    for recipe in cooked:
        recipe.split = recipe.split if recipe.split in ("train", "val") else "test"
    write_recipe1m(cooked, folder)
    return folder, cooked


def test_the_kitchen_through_the_official_layout(kitchen_layout, tmp_path):
    folder, cooked = kitchen_layout
    prepared = store(folder, tmp_path / "store")
    assert prepared.card["recipes"] == {"test": 24, "text_only": 10, "train": 60, "val": 12}
    assert not prepared.card["left_out"]
    split = prepared.split("train")
    pairs = [recipe for recipe in cooked if recipe.split == "train" and recipe.images]
    assert split.titles == [recipe.title for recipe in pairs]
    assert split.recipe(7)["ingredients"] == pairs[7].ingredients and split.photo_count(7) == 1


def test_own_rules_and_the_detector_s_names_both_label(kitchen_layout, tmp_path):
    by = {names: store(kitchen_layout[0], tmp_path / names, names=names) for names in ("rules", "det_ingrs")}
    for prepared in by.values():
        assert len(prepared.split("train").labels) > 100 and min(prepared.classes.counts) > 1
    assert by["rules"].card["sha256"] != by["det_ingrs"].card["sha256"]


@needs_shared
def test_all_pairs_come_through(tmp_path):
    prepared = store(SHARED / "recipe1m_layout", tmp_path / "store", StoreConfig(32, 3, 60))
    assert prepared.card["recipes"] == {"train": 657, "val": 141, "test": 141, "text_only": 192}
    assert prepared.card["without_photo"] == {"val": 55, "test": 53} and not prepared.card["left_out"]
    listed = (SHARED / "recipe1m_layout/splits/train.txt").read_text().split()
    assert sorted(prepared.split("train").ids) == sorted(listed)


@needs_shared
def test_both_layouts_give_the_same_token_ids_where_the_texts_agree(tmp_path):
    """Lower case is the tokenizer's anyway. amzn's repair of lost slashes also turns true twelves into halves: those
    lines differ, and no others. Labels come from two detectors: the pickles' own, and our rules or det_ingrs.json."""
    config = StoreConfig(32, 3, 60)
    official = store(SHARED / "recipe1m_layout", tmp_path / "official", config)
    pickles = store(SHARED / "authors_layout", tmp_path / "pickles", config, image_dir=SHARED / "recipe1m_layout")
    assert pickles.card["recipes"] == official.card["recipes"]
    agree = lines = 0
    for name in ("train", "val", "test", "text_only"):
        a, b = official.split(name), pickles.split(name)
        row = {id_: i for i, id_ in enumerate(b.ids)}
        assert sorted(a.ids) == sorted(b.ids)
        for i, id_ in enumerate(a.ids):
            assert name == "text_only" or a.photo(i) == b.photo(row[id_])
            words = [
                [s.tokenizer.id_to_token(t) for t in ids]
                for s, split, r in ((official, a, i), (pickles, b, row[id_]))
                for ids in sentences(split, r)
            ]
            half = len(words) // 2
            for ours, theirs in zip(words[:half], words[half:], strict=True):
                lines += 1
                agree += ours == theirs
    assert agree / lines > 0.98, agree / lines
    # A label of the pickles stands for many names ("extra-virgin olive oil"), a class of ours for one.
    common = sorted(set(official.classes.names) & set(pickles.classes.names))
    ours, theirs = (
        prepared.split("train").label_matrix()[np.argsort(prepared.split("train").ids)][
            :, [prepared.classes.names.index(c) for c in common]
        ]
        for prepared in (official, pickles)
    )
    assert len(common) > 35 and (ours & theirs).sum() / ours.sum() > 0.97, (
        (ours & theirs).sum() / ours.sum(),
        len(common),
    )


@needs_shared
@pytest.mark.parametrize("folder", sorted((SHARED / "bad_inputs").glob("ds_*")), ids=lambda path: path.name)
def test_bad_data_sets_end_in_a_whole_store_or_in_one_line(folder, tmp_path):
    said = None
    try:
        prepared = store(folder, tmp_path / "store", StoreConfig(32, 1, 2))
    except DataError as error:
        said = str(error)
    if folder.name in ("ds_layer1_truncated", "ds_duplicate_ids"):
        assert said and "\n" not in said and ("layer1.json" in said or "013387d550" in said)
        assert not (tmp_path / "store").exists()
        return
    assert said is None
    train, left_out = prepared.card["recipes"]["train"], prepared.card["skipped"]
    assert train == {
        "ds_layer1_missing_key": 3,
        "ds_layer1_wrong_type": 2,
        "ds_missing_image": 3,
        "ds_path_traversal": 1,
    }.get(folder.name, 4)
    assert bool(left_out) == (folder.name == "ds_missing_image")
    assert np.diff(prepared.split("train").sentence_start).min() >= 1, "nothing empty to take a mean over"
    assert len(prepared.split("train").words) < 4 * 41 * 15, "5,000 lines and 20,000 words are cut"


def test_the_command_ends_in_one_line_that_names_the_file(kitchen_layout, tmp_path):
    folder = tmp_path / "recipe1m"
    folder.mkdir()
    for path in kitchen_layout[0].iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "layer1.json").unlink()
    text = (kitchen_layout[0] / "layer1.json").read_text()
    (folder / "layer1.json").write_text(text[: len(text) // 2])
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "recipe_lib.runner.run",
        "params/smoke.yaml",
        "--only",
        "01",
        "--outputs",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*command, "-p", "source", "recipe1m", "-p", "source_dir", str(folder)],
        cwd=root,
        capture_output=True,
        text=True,
    )
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and error.startswith("error: 01_data_preparation.ipynb: ") and "layer1.json" in error
    assert "not complete JSON" in error and "Traceback" not in done.stderr
    assert not (tmp_path / "out/smoke/01_data_preparation/data").exists()
    assert (
        json.loads((tmp_path / "out/smoke/manifest.json").read_text())["stages"]["01_data_preparation"]["status"]
        == "failed"
    )
