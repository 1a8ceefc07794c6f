import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from recipe_lib.runner.grid import members, share
from recipe_lib.runner.params import ParamsError
from recipe_lib.runner.run import main

ROOT = Path(__file__).parents[2]


def test_members_are_every_seed_in_every_world():
    grid = members({"study": "e", "seeds": [1, 2], "worlds": ["calm: {noise: 0.0}", "plain: {}"]})
    assert [m.study for m in grid] == ["e-calm-seed1", "e-calm-seed2", "e-plain-seed1", "e-plain-seed2"]
    assert dict(grid[1].arguments) == {
        "study": "e-calm-seed2",
        "seed": "2",
        "seeds": "[]",
        "worlds": "[]",
        "methods": "[]",
        "noise": "0.0",
    }
    assert [m.study for m in members({"study": "e", "seeds": [7], "worlds": []})] == ["e-seed7"]
    for worlds in (["calm"], ["a: 1"], ["a: {}", "a: {noise: 0}"], ["{"]):
        with pytest.raises(ParamsError, match="worlds: "):
            members({"study": "e", "seeds": [1], "worlds": worlds})


def test_methods_are_put_on_the_grid_one_after_the_other():
    values = {"study": "c", "seeds": [1, 2], "worlds": [], "methods": ["ht", "dar"], "variants": ["debiased"]}
    grid = members(values)
    assert [m.study for m in grid] == ["c-ht-seed1", "c-ht-seed2", "c-dar-seed1", "c-dar-seed2"]
    assert grid[0].files == [] and Path(grid[2].files[0]) == ROOT / "params/methods/dar.yaml"
    assert [m.world for m in grid] == ["ht", "ht", "dar", "dar"]
    assert all(dict(m.arguments)["variants"] == '["debiased"]' for m in grid), "whatever the methods' files say"
    with pytest.raises(ParamsError, match=r"no params/methods/nonsense.yaml; there are ht, acme, adamine, dar, "):
        members(values | {"methods": ["nonsense"]})
    with pytest.raises(ParamsError, match="worlds or methods, not both"):
        members(values | {"worlds": ["a: {}"]})


def test_a_slurm_array_shares_them_out():
    grid = list(range(7))
    environ = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_ARRAY_TASK_COUNT": "3"}
    shares = [share(grid, environ | {"SLURM_ARRAY_TASK_ID": str(task)}) for task in (1, 2, 3)]
    assert sorted(number for part in shares for number in part) == grid
    assert max(map(len, shares)) == 3 and share(grid, {}) == grid
    with pytest.raises(ParamsError, match="must follow one another; use --array=1-3"):
        share(grid, environ | {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MAX": "5"})  # --array=1-5:2


def test_what_is_wrong_with_one_study_is_said_before_the_first_begins(tmp_path, capsys):
    command = ["params/smoke.yaml", "-p", "seeds", "[1]", "--outputs", str(tmp_path)]
    assert main([*command, "-p", "worlds", '["odd: {noise: 2.0}"]']) == 1
    assert "noise: 2.0 is not in [0..1]" in capsys.readouterr().err
    assert main([*command, "--only", "05"]) == 1
    assert "--only, --from and --fresh are for one study" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_study_that_fails_is_named_and_stops_no_other(tmp_path, capsys, monkeypatch):
    # Too few pairs for a batch: notebook 2 stops.
    worlds = json.dumps(["bad: {kitchen_train: 2, kitchen_val: 1, kitchen_test: 1, ingredient_classes: 400}"])
    command = ["params/smoke.yaml", "-p", "seeds", "[1, 2]", "-p", "worlds", worlds, "--outputs", str(tmp_path)]
    for name in ("ID", "MIN", "MAX", "COUNT"):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", "2" if name in ("MAX", "COUNT") else "1")
    assert main(command) == 1
    whole = json.loads((tmp_path / "smoke/grid.json").read_text())
    assert [member["seed"] for member in whole] == [1, 2], "a task's share is not the grid"
    printed = capsys.readouterr()
    assert "1 of 1 studies failed: smoke-bad-seed1" in printed.err and "FAILED, see" in printed.out
    assert "error: " in (tmp_path / "smoke/logs/smoke-bad-seed1.log").read_text()
    assert not (tmp_path / "smoke/06_evidence").exists()


def test_sigterm_stops_the_studies_that_run_and_begins_no_other(tmp_path):
    command = [sys.executable, "-m", "recipe_lib.runner.run", "params/smoke.yaml", "-p", "seeds", "[1, 2, 3]"]
    grid = subprocess.Popen([*command, "--outputs", str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "smoke/logs/smoke-seed1.log"
    while not (log.is_file() and "01_data_preparation" in log.read_text()):
        assert grid.poll() is None
        time.sleep(0.1)
    (study,) = psutil.Process(grid.pid).children()
    grid.send_signal(signal.SIGTERM)
    printed = grid.communicate(timeout=60)[1]
    assert grid.returncode == 130 and "interrupted; the same command goes on from here" in printed
    assert not psutil.pid_exists(study.pid) and not (tmp_path / "smoke/logs/smoke-seed2.log").exists()
