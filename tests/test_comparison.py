"""A grid of two methods at smoke size, read by notebook 07."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from tests.test_notebooks import run


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    options = {"seeds": [1], "methods": ["ht", "adamine"], "variants": ["equal_compute", "debiased"], "bags": 1}
    options |= {"epochs": 1, "debias_epochs": 1}
    pairs = [part for key, value in options.items() for part in ("-p", key, json.dumps(value))]
    done = run(folder, "params/smoke.yaml", *pairs, "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[2/2] smoke-" in done.stdout and "07_method_comparison: " in done.stdout
    return folder


def test_each_method_is_a_study_of_its_own(outputs):
    manifests = {m: json.loads((outputs / f"smoke-{m}-seed1/manifest.json").read_text()) for m in ("ht", "adamine")}
    assert {name: manifest["parameters"]["method"] for name, manifest in manifests.items()} == {
        "ht": "ht",
        "adamine": "adamine",
    }
    assert all(m["parameters"]["methods"] == [] and m["parameters"]["epochs"] == 1 for m in manifests.values())


def test_notebook_7_puts_them_side_by_side(outputs):
    folder = outputs / "smoke/07_method_comparison"
    found = pd.read_csv(folder / "findings.csv")
    assert set(found["method"]) == {"ht", "adamine"} and set(found["direction"]) == {"i2r", "r2i"}
    assert set(found["variant"]) == {"baseline", "equal_compute", "debiased"} and found["recall_10"].between(0, 1).all()
    costs = pd.read_csv(folder / "costs.csv", index_col="method")
    assert (costs[["trained", "seconds_per_step", "memory_mb", "minutes"]] > 0).all(axis=None)
    assert set(pd.read_csv(folder / "gains.csv")["b"]) == {"equal_compute"}
    assert json.loads((folder / "agreement.json").read_text())["methods"] == 2
    assert {path.name for path in folder.glob("*.png")} == {"findings.png", "gains.png", "costs.png", "agreement.png"}
    for cell in nbformat.read(outputs / "smoke/07_method_comparison.ipynb", as_version=4).cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error" and output.get("name") != "stderr", output
