"""run_all.sh: set up once, from any folder, in a path with a space; every command hands its arguments on."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_help_needs_no_environment(tmp_path):
    """In a bare copy, from another folder: no .venv appears, and the text is the runner's."""
    copy = tmp_path / "a copy"
    (copy / "recipe_lib/runner").mkdir(parents=True)
    modules = ("__init__.py", "paths.py", "runner/__init__.py", "runner/run.py")
    for name in ("run_all.sh", *(f"recipe_lib/{module}" for module in modules)):
        shutil.copy(REPOSITORY / name, copy / name)
    done = subprocess.run([copy / "run_all.sh", "--help"], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0 and "--fresh" in done.stdout and "run_all.sh test" in done.stdout, done.stderr
    assert not (copy / ".venv").exists()


def test_no_python_in_range_is_one_line(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "readlink", "cat", "cksum", "env", "flock"):
        if tool := shutil.which(name):
            (tools / name).symlink_to(tool)
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tools / "python3").chmod(0o755)
    copy = tmp_path / "run_all.sh"
    shutil.copy(REPOSITORY / "run_all.sh", copy)
    for name in ("requirements.lock", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    done = subprocess.run([copy], env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no Python 3.11, 3.12 or 3.13 on PATH")


@pytest.fixture
def stub_clone(tmp_path):
    """A copy of run_all.sh whose pythons only write down how they are called, in a path with a space."""
    clone, tools = tmp_path / "a clone", tmp_path / "bin"
    clone.mkdir()
    tools.mkdir()
    for name in ("run_all.sh", "requirements.lock", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, clone)
    inner = f'#!/bin/sh\nif [ "$1" != -c ]; then echo "$@" >>"{tmp_path}/calls"; fi\n'
    inner += f'case "$*" in *--editable*) [ ! -e "{tmp_path}/broken" ] ;; esac\n'
    (tools / "inner").write_text(inner)
    outer = f'#!/bin/sh\nif [ "$2" = venv ]; then echo venv >>"{tmp_path}/calls"; mkdir -p "$4/bin"; '
    outer += f'cp "{tools}/inner" "$4/bin/python"; rm -f "$4/.stamp"; fi\n'
    (tools / "python3").write_text(outer)
    (tools / "python").write_text("#!/bin/sh\nexit 1\n")  # the active environment does not have the study
    for path in tools.iterdir():
        path.chmod(0o755)

    def call(*arguments: str) -> tuple[int, list[str], str]:
        (tmp_path / "calls").unlink(missing_ok=True)
        env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
        done = subprocess.run([clone / "run_all.sh", *arguments], cwd="/", env=env, capture_output=True, text=True)
        return done.returncode, (tmp_path / "calls").read_text().splitlines(), done.stderr

    return clone, call


def test_set_up_happens_once_and_again_when_it_was_cut_off_or_the_lock_changed(stub_clone, tmp_path):
    clone, call = stub_clone
    run = "-P -m recipe_lib.runner.run params/smoke.yaml -p study a b"
    arguments = ("params/smoke.yaml", "-p", "study", "a b")
    pip = "-m pip install --disable-pip-version-check"
    set_up = ["venv", f"{pip} -r {clone}/requirements.lock"]
    set_up.append(f"{pip} --quiet --no-deps --no-build-isolation --editable {clone}")
    assert call(*arguments)[1] == [*set_up, run]
    assert call(*arguments)[1] == [run]
    (clone / ".venv/.stamp").unlink()  # the last thing that a set-up writes
    assert call(*arguments)[1] == [*set_up, run]
    with open(clone / "requirements.lock", "a") as lock:
        lock.write("# changed\n")
    (tmp_path / "broken").touch()
    status, calls, error = call(*arguments)
    assert status == 1 and calls == set_up and error.count("\n") == 1 and "could not install recipe_lib" in error
    (tmp_path / "broken").unlink()
    assert call(*arguments)[1] == [*set_up, run]


def test_the_commands_of_run_all(stub_clone):
    clone, call = stub_clone
    call()
    pytest = "-m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations=15 -k ranks"
    assert call("test", "-k", "ranks")[1] == ["-m ruff check .", "-m ruff format --check .", pytest]
    assert call("search", "kitchen", "a b.jpg")[1] == ["-P -m recipe_lib.search.command kitchen a b.jpg"]
    assert call("fetch", "a b.yaml")[1] == ["-P -m recipe_lib.runner.fetch a b.yaml"]
    lab = f"-m jupyterlab --ServerApp.root_dir={clone} --LabApp.default_url=/lab/tree/notebooks --no-browser"
    assert call("lab", "--no-browser")[1] == [lab]
