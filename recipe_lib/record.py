"""What a run records: what each stage was made from and what it left, so that an unchanged stage can be skipped."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from recipe_lib.paths import resolve, study_dir

# A new version of one of these can change a stage's numbers or figures.
PACKAGES = (
    *("torch", "torchvision", "lightning", "timm", "tokenizers", "scikit-learn", "faiss-cpu"),
    *("open_clip_torch", "transformers", "scikit-image", "scipy"),
    *("numpy", "pandas", "pyarrow", "pillow", "matplotlib", "seaborn"),
)
# Parameters that name files from outside the study, or may do so.
SOURCES = (
    *("source_dir", "image_dir", "classes_file", "clip_pretrained", "description_model", "segment_model"),
    *("vocab_file", "weights_from", "dictionary_file"),
)
STUDIES = {"distances_from": "02_baseline_training/model.safetensors", "compare_with": "ranks.parquet"}  # of others
_KEPT = ("manifest.json", "report.html", ".lock")  # the runner's own files, no stage's artefacts


class RunError(Exception):
    """A run cannot start or go on. One line: what is wrong, what to do."""


def environment(root: Path) -> dict:
    """Interpreter, machine, package versions and git state, for the manifest."""

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
        "packages": _versions(),
        "git": {"commit": commit, "dirty": bool(changes)} if commit else None,
    }


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES if next(iter(metadata.distributions(name=name)), None)}


# ---- what a stage is made from ----


def stage_inputs(notebook: Path, values: dict, earlier: str, package: Path) -> dict[str, str]:
    """Digest of each thing that decides a stage's outputs; comments, prose and formatting are not among them.

    Args:
        notebook: its code cells count, and every module of the package that they import, directly or not.
        values: the parameters that it declares; files under those of SOURCES, and what it reads of the studies that
            those of STUDIES name, count by name, size and time. Numbers of processes (`*_workers`) change no result and
            do not count.
        earlier: digest of the stage before, which covers all before it.
        package: folder of recipe_lib.
    """
    code = notebook_code(notebook)
    modules = imported_modules(code, package)
    # Data files (ingredient tables and the like) belong to the modules beside them.
    folders = {path.parent for path in modules.values()}
    tables = sorted(path for folder in folders for path in folder.glob("*.[cjt][sx]*"))
    library = {name: ast.dump(ast.parse(path.read_bytes())) for name, path in modules.items()}
    library |= {str(path.relative_to(package)): path.read_bytes().hex() for path in tables}
    sources = {name: list(_identity(resolve(values[name]))) for name in SOURCES if values.get(name)}
    for name, file in STUDIES.items():
        named = values.get(name) or []
        for study in [named] if isinstance(named, str) else named:
            sources[f"{name} {study}"] = list(_identity(study_dir(study) / file))
    return {
        "notebook": _digest(ast.dump(code)),
        "parameters": _digest({name: value for name, value in values.items() if not name.endswith("_workers")}),
        "library": _digest(library),
        "packages": _digest([platform.python_version_tuple()[:2], _versions()]),
        "sources": _digest(sources),
        "earlier stages": earlier,
    }


def stage_digest(inputs: dict[str, str]) -> str:
    return _digest(inputs)


def _digest(thing: object) -> str:
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:16]


def notebook_code(path: Path) -> ast.Module:
    """A notebook's code cells as one module, IPython's magics translated.

    Raises:
        RunError: a cell is not Python.
    """
    translate = TransformerManager().transform_cell
    module = ast.Module([], [])
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code":
            try:
                module.body += ast.parse(translate(cell.source)).body
            except SyntaxError as error:
                raise RunError(f"{path}: cell {number}: line {error.lineno}: {error.msg}") from None
    return module


def imported_modules(code: ast.AST, package: Path) -> dict[str, Path]:
    """The package's modules that the code imports, with what those import in turn; name -> file."""
    files: dict[str, Path] = {}
    pending = list(_imports(code, "", package.name))
    while pending:
        name = pending.pop()
        stem = package.parent.joinpath(*name.split("."))
        path = next((p for p in (stem / "__init__.py", stem.with_suffix(".py")) if p.is_file()), None)
        if path and name not in files:  # no path: `from module import a_function`
            files[name] = path
            home = name if path.name == "__init__.py" else name.rpartition(".")[0]
            pending += _imports(ast.parse(path.read_bytes()), home, package.name)
    return dict(sorted(files.items()))


def _imports(code: ast.AST, home: str, package: str) -> Iterator[str]:
    """Dotted names that may be modules of the package; `home` is the package that relative imports start from."""
    for node in ast.walk(code):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = home.split(".")[: len(home.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for parts in (name.split(".") for name in names):
            if parts[0] == package:
                yield from (".".join(parts[: end + 1]) for end in range(len(parts)))


def _identity(source: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of every file of a data folder (or of one file); the bytes may be terabytes."""
    paths = (
        [source] if source.is_file() else sorted(Path(top, name) for top, _, names in os.walk(source) for name in names)
    )
    for path in paths:
        stat = path.lstat()
        yield str(path.relative_to(source)), stat.st_size, stat.st_mtime_ns


# ---- what a stage left ----


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every artefact under a study's folder, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        executed = (path.parent == folder and ".ipynb" in path.suffixes) or path.with_suffix(".ipynb").is_file()
        if path.is_file() and name not in _KEPT and not executed:
            stat = path.stat()
            found[name] = (stat.st_size, stat.st_mtime_ns)
    return found


def artefacts(folder: Path, stage: str, before: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Sizes of the files in the stage's folder and of those elsewhere that changed since the snapshot."""
    after = snapshot(folder)
    return {
        name: state[0] for name, state in after.items() if name.startswith(f"{stage}/") or before.get(name) != state
    }


def why_run(folder: Path, stage: str, record: dict | None, inputs: dict[str, str]) -> str:
    """Why a stage has to run, or "" when what it left still stands."""
    if record is None:
        return "not run yet"
    if changed := [name for name, digest in inputs.items() if record["inputs"].get(name) != digest]:
        return f"changed: {', '.join(changed)}"
    if record["status"] != "finished":
        return {"running": "was interrupted", "failed": "had failed"}.get(record["status"], "has newer inputs")
    for name, size in {f"{stage}.ipynb": None, **record["artefacts"]}.items():
        path = folder / name
        if not path.is_file() or size not in (None, path.stat().st_size):
            return f"{name} is missing or not as it was left"
    return ""


def wipe(folder: Path, stage: str, record: dict | None) -> None:
    """Remove all that a stage left, so that nothing stale survives."""
    shutil.rmtree(folder / stage, ignore_errors=True)
    suffixes = (".ipynb", ".html", ".failed.ipynb")
    for name in [*(f"{stage}{suffix}" for suffix in suffixes), *(record or {}).get("artefacts", {})]:
        (folder / name).unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict:
    """The study's manifest.json, or an empty one."""
    path = folder / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"stages": {}}
    except ValueError:
        raise RunError(f"{path}: not JSON; delete the file to run all stages again") from None
