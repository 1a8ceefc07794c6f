"""Recipes that are not the kitchen's through the notebooks: Recipe1M's layout into training, a cookbook to the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipe_lib.data.store import Store
from recipe_lib.kitchen.model import KitchenConfig, cook
from tests.layouts import write_recipe1m
from tests.test_notebooks import ROOT, run

REAL = Path(ROOT.parent, "shared/data/real_recipes")
KAGGLE = Path(ROOT.parent, "shared/data/kaggle_layout")


def options(**values: object) -> list[str]:
    return [word for key, value in values.items() for word in ("-p", key, str(value))]


def test_recipe1m_is_prepared_and_trains(tmp_path):
    """The kitchen's dishes in the official layout, with the names of its own detector."""
    splits = {"train": "train", "val": "val", "iid": "test"}
    cooked = cook(KitchenConfig(train=96, val=30, test=40, text_only=20, seed=2))
    write_recipe1m((replace(r, split=splits[r.split]) for r in cooked if r.split in splits), tmp_path / "recipe1m")
    values = options(
        study="r1m", source="recipe1m", source_dir=tmp_path / "recipe1m", ingredient_names="det_ingrs", epochs=1,
        val_candidates=20,
    )  # fmt: skip
    prepared, trained = (run(tmp_path, "params/smoke.yaml", "--only", stage, *values) for stage in ("01", "02"))
    assert prepared.returncode == trained.returncode == 0, prepared.stderr + trained.stdout + trained.stderr
    assert "recipes with photo + text only: 96 + 20 train" in prepared.stdout
    store = Store(tmp_path / "r1m/01_data_preparation/data")
    assert store.test_splits == ["test"] and len(store.split("test")) == 40
    history = pd.read_csv(tmp_path / "r1m/02_baseline_training/history.csv")
    assert len(history) == 1 and history["self_supervised"].gt(0).all(), "its text-only recipes train too"


@pytest.mark.skipif(not KAGGLE.is_dir(), reason="the shared recipes are not beside the repository")
def test_the_kaggle_set_and_a_table_are_prepared(tmp_path):
    few = {"val_share": 0.2, "test_share": 0.2, "ingredient_classes": 5, "prepare_workers": 1}
    done = run(tmp_path, "params/kaggle.yaml", "--only", "01", *options(source_dir=KAGGLE, **few))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "read: 35 recipes with photo, 4 without" in done.stdout
    assert "'#NAME?.jpg'" in (tmp_path / "kaggle/01_data_preparation/left_out_at_reading.txt").read_text()
    rows = [{"name": f"Soup {i}", "ingredients": f"salt|leek {i}", "steps": "Boil.", "image": b""} for i in range(60)]
    photos = sorted((KAGGLE / "Food Images/Food Images").glob("*.jpg"))
    rows = [row | {"image": photos[i % 40].read_bytes()} for i, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    hub = options(
        study="table", source="hub", source_dir=tmp_path / "table.parquet", hub_columns="['title: name']", **few
    )
    done = run(tmp_path, "params/kaggle.yaml", "--only", "01", *hub, *options(ingredient_classes=2))
    assert done.returncode == 0 and "read: 60 recipes with photo" in done.stdout, done.stdout + done.stderr
    assert Store(tmp_path / "table/01_data_preparation/data").split("train").titles[0].startswith("Soup")


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared recipes are not beside the repository")
def test_a_cookbook_of_real_recipes_goes_through_to_the_verdict(tmp_path):
    small = {"embed_dim": 32, "recipe_dim": 16, "recipe_heads": 2, "recipe_feedforward": 32, "classifier_dim": 16}
    small |= {"classifier_heads": 2, "classifier_feedforward": 32, "variants": "[equal_compute, debiased]"}
    done = run(tmp_path, "params/cookbook.yaml", *options(epochs=1, debias_epochs=1, bags=2, **small))
    assert done.returncode == 0, done.stdout + done.stderr
    results = pd.read_csv(tmp_path / "cookbook/results.csv")
    pairs = len(Store(tmp_path / "cookbook/01_data_preparation/data").split("test"))
    assert set(results["split"]) == {"test"} and set(results["candidates"]) == {100, pairs} and pairs > 100
    assert {"baseline", "equal_compute", "debiased", "debiased@no_z"} <= set(results["variant"])
    assert "equal_compute" in json.loads((tmp_path / "cookbook/metrics.json").read_text())["verdict"]
