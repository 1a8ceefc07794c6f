"""The five notebooks on params/smoke.yaml, then again under nbval from nothing: the second run must say the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest

from recipe_lib.data.store import Store
from recipe_lib.evaluation.scores import COLUMNS
from recipe_lib.runner.fingerprint import snapshot
from recipe_lib.runner.params import declared
from recipe_lib.runner.stages import quiet

ROOT = Path(__file__).parent.parent
STAGES = [path.stem for path in sorted((ROOT / "notebooks").glob("0[1-5]_*.ipynb"))]


def run(outputs: Path, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "recipe_lib.runner.run", *args, "--outputs", str(outputs)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    outputs = tmp_path_factory.mktemp("a run")
    done = run(outputs, "params/smoke.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return outputs / "smoke"


def test_stages_are_the_five(smoke):
    assert len(STAGES) == 5 and all((smoke / f"{stage}.ipynb").is_file() for stage in STAGES)


def test_results_are_tidy_and_complete(smoke):
    results = pd.read_csv(smoke / "results.csv")
    assert list(results.columns) == COLUMNS
    trained = {"baseline", "equal_compute", "classifier_only", "debiased", "oracle"}
    assert trained | {"debiased@no_z", "oracle@permuted_labels"} <= set(results["variant"])
    assert set(results["split"]) == {"iid", "do_context", "do_ingredients"} and set(results["direction"]) == {
        "i2r",
        "r2i",
    }
    assert set(results["candidates"]) == {20, 50}
    assert not results.duplicated(["variant", "seed", "split", "direction", "candidates"]).any()
    metrics = json.loads((smoke / "metrics.json").read_text())
    assert metrics["verdict"].split(": ")[0].split()[-1] == "equal_compute" and "i2r" in metrics["verdict"]


def test_figures_and_record_are_there(smoke):
    figures = {path.name for path in smoke.rglob("*.png")}
    assert figures >= {
        "dishes.png", "confounder.png", "do_context.png", "learning_curves.png", "dictionary_map.png", "gallery.png",
        "recall_by_variant.png", "fall.png", "forest.png", "oracle_corruption.png", "predicted_ingredients.png",
    }  # fmt: skip
    manifest = json.loads((smoke / "manifest.json").read_text())
    assert set(manifest["stages"]) == set(STAGES)
    report = (smoke / "report.html").read_text()
    assert report.count("data:image/png;base64") >= len(figures) and "http://" not in report.replace(
        "http://www.w3.org", ""
    )


def test_executed_notebooks_are_quiet(smoke):
    """No traceback, no progress-bar spam: at most one line per epoch."""
    for stage in STAGES:
        for cell in nbformat.read(smoke / f"{stage}.ipynb", as_version=4).cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "error"
                assert "IProgress" not in output.get("text", ""), "tqdm has no widgets here, and needs none"
                assert len(output.get("text", "").splitlines()) < 80, (stage, output.text[:300])


def test_the_search_notebook_runs_headless_on_photos_of_the_user(smoke, tmp_path, monkeypatch):
    """Stored without outputs; executed on two photos it leaves a figure, and nothing that a stage would rerun for."""
    path = ROOT / "notebooks/08_recipe_search.ipynb"
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert set(declared([path])) == {"study", "variant", "recipes", "photos", "gallery"}
    split = Store(smoke / "01_data_preparation/data").split("iid")
    for row in (0, 1):
        (tmp_path / f"{row}.jpg").write_bytes(split.photo(row))
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(smoke.parent))
    monkeypatch.setenv("CAUSAL_KITCHEN_ROOT", str(ROOT))
    photos = [str(tmp_path / f"{row}.jpg") for row in (0, 1)]
    papermill.execute_notebook(
        path, tmp_path / "08.ipynb", {"study": "smoke", "photos": photos}, progress_bar=False, kernel_name="python3"
    )
    assert (smoke / "search/gallery.png").is_file()
    assert {name.split("/")[0] for name in snapshot(smoke)}.isdisjoint({"search"})
    table = next(cell for cell in nbformat.read(tmp_path / "08.ipynb", 4).cells if cell.id == "rests").outputs[0]
    assert all(name in table["data"]["text/html"] for name in ("surroundings hidden", "without the causal term"))


def test_a_second_run_skips_everything(smoke):
    before = (smoke / "results.csv").stat().st_mtime_ns
    again = run(smoke.parent, "params/smoke.yaml")
    assert again.returncode == 0 and (smoke / "results.csv").stat().st_mtime_ns == before, again.stdout


def test_a_second_execution_gives_the_same_outputs(smoke, tmp_path):
    """nbval compares every cell that is not marked NBVAL_IGNORE_OUTPUT; training starts from nothing again."""
    again = tmp_path / "smoke"
    again.mkdir()
    for stage in STAGES:
        shutil.copy(smoke / f"{stage}.ipynb", again)
    notebooks = [str(again / f"{stage}.ipynb") for stage in STAGES]
    environment = os.environ | {"CAUSAL_KITCHEN_ROOT": str(ROOT), "CAUSAL_KITCHEN_OUTPUTS": str(tmp_path)}
    environment |= {"PYTHONWARNINGS": quiet(os.environ)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", "-q", "-p", "no:cacheprovider", f"--rootdir={again}", *notebooks],
        cwd=again, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert Store(again / "01_data_preparation/data").split("iid").ids
    pd.testing.assert_frame_equal(pd.read_csv(again / "results.csv"), pd.read_csv(smoke / "results.csv"))


def test_another_system_goes_through_the_same_notebooks_and_lends_its_distances(smoke):
    """DAR by its parameter file, then H-T with DAR's description and segment distances at test time alone."""
    few = {"crop_size": "56", "tower_epochs": "1", "epochs": "1", "debias_epochs": "1"}
    done = run(
        smoke.parent,
        "params/smoke.yaml",
        "params/methods/dar.yaml",
        *(w for pair in few.items() for w in ("-p", *pair)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = pd.read_csv(smoke.parent / "smoke_dar/results.csv")
    assert set(results["system"]) == {"DAR", "DAR+", "DAR++"}
    trained = {"baseline", "equal_compute", "debiased"}
    assert trained | {"zero_shot", "debiased@no_z"} <= set(results[results["system"] == "DAR"]["variant"])
    assert set(results[results["system"] == "DAR++"]["variant"]) == trained
    assert (smoke.parent / "smoke_dar/01_data_preparation/imagined.png").is_file()

    lent = ("-p", "distances_from", "smoke_dar", "-p", "compare_with", "[smoke_dar]")
    again = run(smoke.parent, "params/smoke.yaml", *lent)
    assert again.returncode == 0 and again.stdout.count("unchanged, skipped") == 4, again.stdout + again.stderr
    more = pd.read_csv(smoke / "results.csv")
    assert set(more["system"]) == {"H-T", "H-T+", "H-T++"}
    compared = pd.read_csv(smoke / "05_evaluation/compared_studies.csv")
    assert set(compared["system"]) == {"H-T", "H-T+", "H-T++", "DAR", "DAR+", "DAR++"}
    assert run(smoke.parent, "params/smoke.yaml", *lent).stdout.count("unchanged, skipped") == 5
