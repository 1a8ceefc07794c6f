"""A grid of two seeds at smoke size: run, resumed, read by notebook 06."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from tests.test_notebooks import run

VARIANTS = [
    "equal_compute",
    "debiased",
    "oracle",
    "oracle_visible",
    "visible",
    "context_swap",
    "swap_placebo",
    "stratified",
    "swap_hard",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    done = grid(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[2/2] smoke-seed" in done.stdout and "min left" in done.stdout
    return folder


def grid(folder: Path):
    options = {"seeds": [1, 2], "variants": VARIANTS, "epochs": 1, "debias_epochs": 1, "bags": 1, "beside": ["smoke"]}
    pairs = [part for key, value in options.items() for part in ("-p", key, json.dumps(value))]
    return run(folder, "params/smoke.yaml", *pairs, "--jobs", "2")


def test_every_seed_is_a_study_of_its_own(outputs):
    results = [pd.read_csv(outputs / f"smoke-seed{seed}/results.csv") for seed in (1, 2)]
    assert [set(table["seed"]) for table in results] == [{1}, {2}]
    assert set(VARIANTS) | {"oracle@visible"} <= set(results[0]["variant"])
    bias = pd.DataFrame(json.loads((outputs / "smoke-seed1/metrics.json").read_text())["bias"])
    assert {"context_pull", "context_probe", "subtle_ingredients_probe"} <= set(bias["measure"])
    assert set(bias["variant"]) == {"baseline", *VARIANTS} and bias["value"].between(-1, 1).all()
    assert (outputs / "smoke-seed1/04_debiasing_training/swapped.png").is_file()


def test_notebook_6_holds_every_variant_against_the_control(outputs):
    folder = outputs / "smoke/06_evidence"
    table = pd.read_csv(folder / "differences.csv")
    assert set(table["a"]) == set(VARIANTS) - {"equal_compute"} and set(table["b"]) == {"equal_compute"}
    assert set(table["direction"]) == {"i2r", "r2i"} and (table["seeds"] == 2).all()
    figures = {path.name for path in folder.glob("*.png")}
    drawn = {"evidence.png", "frontier.png", "label_quality.png", "term_size.png", "bias.png", "other_worlds.png"}
    assert figures == drawn
    keys = ["split", "direction", "metric"]
    beside = pd.read_csv(folder / "other_worlds.csv").merge(table, left_on=["variant", *keys], right_on=["a", *keys])
    assert (
        len(beside) == 2 * 18 and set(beside["world"]) == {"smoke"} and (beside["value"] == beside["difference"]).all()
    )
    measures = pd.read_csv(folder / "other_worlds_measures.csv")
    assert {"context_pull", "near_duplicates_iid"} <= set(measures["measure"])
    assert len((folder / "claims.txt").read_text().splitlines()) == 6
    for cell in nbformat.read(outputs / "smoke/06_evidence.ipynb", as_version=4).cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error" and output.get("name") != "stderr", output


def test_what_is_finished_is_skipped_and_what_is_lost_made_again(outputs):
    shutil.rmtree(outputs / "smoke-seed2/05_evaluation")
    done = grid(outputs)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = [(outputs / f"smoke/logs/smoke-seed{seed}.log").read_text() for seed in (1, 2)]
    assert logs[0].count("unchanged, skipped") == 5 and logs[1].count("unchanged, skipped") == 4
