"""The lock, environment.yml and pyproject.toml tell one story, and what is shipped can be installed and started."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]
DIRECT = [
    Requirement(text)
    for text in PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["test"]
]
PYTHONS = ["3.11.0", "3.12.0", "3.13.0"]


def pins(python: str) -> dict[str, str]:
    """Locked version of every package on Linux with this Python."""
    machine = {"python_full_version": python, "python_version": python[:4], "sys_platform": "linux", "os_name": "posix"}
    machine |= {"platform_machine": "x86_64", "implementation_name": "cpython", "platform_system": "Linux"}
    locked: dict[str, str] = {}
    for line in LOCK:
        if line.marker is None or line.marker.evaluate(machine):
            assert line.name not in locked, f"{line.name} is pinned twice for Python {python}"
            locked[line.name] = str(line.specifier).removeprefix("==")
    return locked


def test_every_line_of_the_lock_is_an_exact_pin():
    assert len(LOCK) > 100
    for line in LOCK:
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(line.specifier)) and not line.url, str(line)


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_within_its_bounds(python):
    locked = pins(python)
    for wanted in DIRECT:
        assert wanted.name in locked, f"{wanted.name} is not in requirements.lock; make the lock again"
        assert wanted.specifier.contains(locked[wanted.name]), f"{wanted} but {locked[wanted.name]} is locked"
    # run_all.sh installs recipe_lib with the locked build tool.
    for wanted in map(Requirement, PROJECT["build-system"]["requires"]):
        assert wanted.specifier.contains(locked[wanted.name])


def test_lower_bounds_are_stated_and_python_is_in_range():
    for wanted in DIRECT:
        operators = {part.operator for part in wanted.specifier}
        assert ">=" in operators <= {">=", "<"}, str(wanted)
    assert Requirement(f"python{PROJECT['project']['requires-python']}").specifier.contains(sys.version.split()[0])
    assert {str(wanted) for wanted in DIRECT} >= {"torch>=2.11", "torchvision>=0.26"}


def test_environment_yml_has_the_pins_of_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, section = environment["dependencies"]
    assert python == f"python{PROJECT['project']['requires-python']}" and pip == "pip"
    constraint, *requirements, package = section["pip"]
    assert constraint == "--constraint requirements.lock" and package == "--editable ."
    for version in PYTHONS:
        locked = pins(version)
        assert requirements == sorted({f"{wanted.name}=={locked[wanted.name]}" for wanted in DIRECT})


@pytest.mark.parametrize("name", ["requirements.lock", "environment.yml", "pyproject.toml", "run_all.sh", ".ci/run"])
def test_no_host_and_no_path_of_one_machine_is_named(name):
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert not re.search(r"(?<![\w.])/(home|root|Users|work|opt)/", text)


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert script[-1] == "exec ./run_all.sh test"
    assert "./run_all.sh test" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["run_all.sh", ".ci/run"])
def test_scripts_are_executable_bash(name):
    assert os.access(ROOT / name, os.X_OK)
    assert subprocess.run(["bash", "-n", str(ROOT / name)], capture_output=True).stderr == b""


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["project"]["version"], PROJECT["project"]["license"])


def test_the_wheel_holds_all_modules_and_tables(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(ROOT / "recipe_lib", source / "recipe_lib", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "-w", tmp_path, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shipped = {path.relative_to(source).as_posix() for path in (source / "recipe_lib").rglob("*") if path.is_file()}
    assert len(shipped) > 5 and shipped <= set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
