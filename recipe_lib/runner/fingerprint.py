"""What a run records: what each stage was made from and what it left, so that an unchanged stage can be skipped."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from recipe_lib import previous
from recipe_lib.paths import resolve, study_dir
from recipe_lib.reachable import Reach, Sources, digest, versions, without_docstrings

# Parameters that name files from outside the study, or may do so.
SOURCES = (
    *("source_dir", "image_dir", "classes_file", "categories_file"),
    *("clip_pretrained", "description_model", "segment_model"),
    *("vocab_file", "weights_from", "dictionary_file", "system_file", "image_weights", "sentence_model"),
)
STUDIES = {"distances_from": "02_baseline_training/model.safetensors", "compare_with": "ranks.parquet"}  # of others
_NO_RESULT = (
    "_workers",
    "checkpoint_minutes",
    "logger",
)  # ends of names: numbers of processes, and what only saves or shows
_KEPT = ("manifest.json", "report.html", ".lock")  # the runner's own files, no stage's artefacts
ASIDE = ".previous"  # below a study's folder
_NO_STAGE = (f"{ASIDE}/", "search/")  # no stage's artefacts either: what was replaced, what the search page keeps
_READ = (".safetensors", ".json", ".csv", ".parquet", ".txt")
_NOT_READ = ("started.json", "training.json")  # whatever in them changes a number changes the weights beside them
_FEATURES = "segments-*.*"  # of segment_features


class RunError(Exception):
    """A run cannot start or go on. One line: what is wrong, what to do."""


def environment(root: Path, packages: Iterable[str]) -> dict:
    """Interpreter, machine, git state and the versions of some packages' modules, for the manifest."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except OSError:  # no git on this machine
        commit = changes = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": versions(packages),
        "git": {"commit": commit, "dirty": bool(changes)} if commit else None,
    }


# ---- what a stage is made from ----


def reached(notebook: Path, sources: Sources, chosen: Mapping[str, Collection[str]] | None = None) -> Reach:
    """The library code that a notebook uses, and the packages that both use.

    Args:
        chosen: modules that are imported by a parameter's value, as `Reach` wants them.
    """
    return Reach(sources, chosen).code(notebook_code(notebook))


def stage_inputs(notebook: Path, values: dict, earlier: Mapping[str, str], reach: Reach) -> dict[str, str]:
    """Digest of each thing that decides a stage's outputs; comments, docstrings, prose and formatting do not count.

    Args:
        notebook: its code cells count; its parameters cell by the values alone.
        values: the parameters that it declares; files under those of SOURCES, and what it reads of the studies that
            those of STUDIES name, count by name, size and time. Those of _NO_RESULT do not count.
        earlier: SHA-256 of what the stages before left for others to read, by file.
        reach: what `reached` found.
    """
    sources = {name: list(_identity(_place(values[name]))) for name in SOURCES if values.get(name)}
    for name, file in STUDIES.items():
        named = values.get(name) or []
        for study in [named] if isinstance(named, str) else named:
            sources[f"{name} {study}"] = list(_identity(study_dir(study) / file))
    return {
        "notebook": digest(ast.unparse(notebook_code(notebook))),
        "parameters": digest({name: value for name, value in values.items() if not name.endswith(_NO_RESULT)}),
        "library": digest(reach.state()),
        "packages": digest([platform.python_version_tuple()[:2], versions(reach.packages)]),
        "sources": digest(sources),
        "earlier stages": digest(dict(earlier)),
    }


def _place(name: str) -> Path:
    if not name.startswith("package:"):
        return resolve(name)
    from recipe_lib.encoders.weights import local  # torch, for those alone who name a package

    return local(name)


def notebook_code(path: Path) -> ast.Module:
    """A notebook's code cells but the parameters as one module, IPython's magics translated, without docstrings.

    Raises:
        RunError: a cell is not Python.
    """
    translate = TransformerManager().transform_cell
    module = ast.Module([], [])
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            try:
                module.body += ast.parse(translate(cell.source)).body
            except SyntaxError as error:
                raise RunError(f"{path}: cell {number}: line {error.lineno}: {error.msg}") from None
    return without_docstrings(module)


def _identity(source: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of every file of a data folder (or of one file); the bytes may be terabytes.

    Links are followed, as the importers follow them, but none to a folder that it lies in.
    """
    for path in [source] if source.is_file() else _files(source, set()):
        stat = path.stat() if path.exists() else path.lstat()  # a link to nothing
        yield str(path.relative_to(source)), stat.st_size, stat.st_mtime_ns


def _files(folder: Path, above: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above or not folder.is_dir():  # a link to a folder that it is in; nothing there
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _files(Path(entry.path), {*above, real})
        else:
            yield Path(entry.path)


# ---- what a stage left ----


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every artefact under a study's folder, by relative path."""
    states = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        executed = (path.parent == folder and ".ipynb" in path.suffixes) or path.with_suffix(".ipynb").is_file()
        if path.is_file() and name not in _KEPT and not name.startswith(_NO_STAGE) and not executed:
            stat = path.stat()
            states[name] = (stat.st_size, stat.st_mtime_ns)
    return states


def artefacts(folder: Path, stage: str, before: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Sizes of the files in the stage's folder and of those elsewhere that changed since the snapshot."""
    after = snapshot(folder)
    return {
        name: state[0] for name, state in after.items() if name.startswith(f"{stage}/") or before.get(name) != state
    }


def contents(folder: Path, names: Iterable[str], known: Mapping[str, list]) -> dict[str, list]:
    """[size, time, SHA-256] of each of a stage's artefacts that later stages may read.

    Figures, checkpoints and what a training notes for itself are not among them; a prepared store counts by its card,
    which holds the SHA-256 of its shards.

    Args:
        names: artefacts, by their paths in the study's folder.
        known: what this returned before: a file of the same size and time is not read again.
    """
    read = {}
    for name in names:
        path = folder / name
        read_by = path.suffix in _READ and path.name not in _NOT_READ and "logs" not in Path(name).parts  # of loggers
        if read_by and path.is_file() and not _in_store(path, folder):
            stat = path.stat()
            state = [stat.st_size, stat.st_mtime_ns]
            before = known.get(name, [])
            if before[:2] != state:
                with open(path, "rb") as file:
                    before = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
            read[name] = before
    return read


def _in_store(path: Path, folder: Path) -> bool:
    """A file of a prepared store, finished or growing, but not its card."""
    inside = any((above / "shards").is_dir() for above in path.parents if above.is_relative_to(folder))
    return inside and not (path.name == "card.json" and (path.parent / "shards").is_dir())


def why_run(folder: Path, stage: str, record: dict | None, inputs: dict[str, str]) -> str:
    """Why a stage has to run, or "" when what it left still stands."""
    if record is None:
        return "not run yet"
    if changed := [name for name, state in inputs.items() if record["inputs"].get(name) != state]:
        return f"changed: {', '.join(changed)}"
    if record["status"] != "finished":
        return {"running": "was interrupted", "failed": "had failed"}[record["status"]]
    for name, size in {f"{stage}.ipynb": None, **record["artefacts"]}.items():
        path = folder / name
        if not path.is_file() or size not in (None, path.stat().st_size):
            return f"{name} is missing or not as it was left"
    return ""


# ---- what is replaced ----


def set_aside(folder: Path, stage: str, record: dict | None) -> None:
    """Move what a stage left to `.previous/<stage>/`, so that nothing stale survives in its place.

    What guards itself stays, for the notebook to take up or to replace: a prepared store (a shard knows what it was
    made from), a training (`previous`), features of segments (named after what they were made from). Of two attempts
    that did not finish, the later one's files are deleted: what stands aside is from the last run that was finished.
    """
    aside = folder / ASIDE / stage
    unfinished = aside.is_dir() and (record or {}).get("status") != "finished"
    for name in sorted(_left(folder, stage, record)):
        path, to = folder / name, aside / name
        if _guards_itself(path, folder):
            continue
        if unfinished:
            path.unlink()
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        path.replace(to)
    _drop_empty(folder / stage)


def clear(folder: Path, stage: str, since: float) -> None:
    """After a stage has finished: drop what it replaced, and move trainings and features aside that it did not use.

    Args:
        since: time of its start; whatever it used was touched after that.
    """
    shutil.rmtree(folder / ASIDE / stage, ignore_errors=True)
    for training in previous.trainings(folder / stage, lambda started: started.stat().st_mtime < since):
        previous.set_aside(training)
        previous.prune(training)
    for path in (folder / stage).rglob(_FEATURES):
        if path.stat().st_mtime < since:
            path.unlink()
    _drop_empty(folder / stage)
    _drop_empty(folder / ASIDE)


def wipe(folder: Path, stage: str, record: dict | None) -> None:
    """Delete all that a stage left, weights and what stands aside included: --fresh."""
    for name in _left(folder, stage, record):
        (folder / name).unlink()
    for path in (folder / stage, folder / ASIDE / stage, folder / ASIDE / "trained" / stage):
        shutil.rmtree(path, ignore_errors=True)


def _left(folder: Path, stage: str, record: dict | None) -> set[str]:
    inside = {path.relative_to(folder).as_posix() for path in (folder / stage).rglob("*") if not path.is_dir()}
    named = {f"{stage}{suffix}" for suffix in (".ipynb", ".html", ".failed.ipynb")}
    named |= set((record or {}).get("artefacts", {}))
    return inside | {name for name in named if (folder / name).is_file()}


def _guards_itself(path: Path, folder: Path) -> bool:
    is_training = path.name in previous.TRAINING and (path.parent / "started.json").is_file()
    in_store = any((above / "shards").is_dir() for above in path.parents if above.is_relative_to(folder))
    return is_training or in_store or path.match(_FEATURES)


def _drop_empty(folder: Path) -> None:
    for top, _, _ in os.walk(folder, topdown=False):
        if not os.listdir(top):
            os.rmdir(top)


def read_manifest(folder: Path) -> dict:
    """The study's manifest.json, or an empty one."""
    path = folder / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"stages": {}}
    except ValueError:
        raise RunError(f"{path}: not JSON; delete the file to run all stages again") from None
