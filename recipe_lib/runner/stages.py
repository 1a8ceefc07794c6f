"""The notebooks as stages: run one at a time through papermill, skipped when nothing that made them has changed."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import papermill
import psutil

from recipe_lib.paths import atomic_write_text
from recipe_lib.reachable import Sources, digest
from recipe_lib.runner import fingerprint
from recipe_lib.runner.fingerprint import RunError
from recipe_lib.runner.params import Parameter, of_notebook
from recipe_lib.runner.report import write_pages, write_report


def systems_imported(values: Mapping, lent: str = "") -> dict[str, set[str]]:
    """Which files of recipe_lib/systems a stage imports by name, as `Reach` wants them; all where it cannot be told.

    Args:
        values: parameters of the study.
        lent: another study, whose system the stage uses too.
    """
    if lent or "method" not in values:
        return {}
    bare = {"captions", "zero_shot"} if values["method"] == "dar" else set()
    return {"recipe_lib.systems": {values["method"], *bare}}


def stage_notebooks(root: Path) -> list[Path]:
    """The stages of a study in order: notebooks/01_ to 05_; those from 06 on look at several studies."""
    notebooks = sorted((root / "notebooks").glob("0[1-5]_*.ipynb"))
    if not notebooks:
        raise RunError(f"{root / 'notebooks'}: no notebook named 01_name.ipynb to 05_name.ipynb")
    return notebooks


def position(stages: list[Path], wanted: str) -> int:
    """Index of the stage that a user names by number or name."""
    for index, path in enumerate(stages):
        if wanted in (path.stem, path.name, path.stem[:2], path.stem[:2].lstrip("0")):
            return index
    raise RunError(f"no stage {wanted}; the stages are {', '.join(path.stem for path in stages)}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a second run of the same study; the system frees the lock of a process that died."""
    with open(folder / ".lock", "a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise RunError(f"{folder}: process {handle.read()} is running this study; wait for it or stop it") from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def quiet(environ: Mapping[str, str]) -> str:
    """PYTHONWARNINGS that leave out tqdm's where there are no ipywidgets: no bar of the study needs them."""
    return ",".join(filter(None, [environ.get("PYTHONWARNINGS"), "ignore:IProgress not found"]))


@contextmanager
def kernel() -> Iterator[None]:
    """A `python3` kernel that is this interpreter, whatever kernels and IPython start-up files the user has."""
    with tempfile.TemporaryDirectory(prefix="causal-kitchen-", ignore_cleanup_errors=True) as temporary:
        # What the kernel itself logs at its start and stop is no output of the study.
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=CRITICAL"]
        env = {"PYTHONHASHSEED": "0", "IPYTHONDIR": temporary, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        env["PYTHONWARNINGS"] = quiet(os.environ)
        spec = Path(temporary, "kernels", "python3", "kernel.json")
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python", "env": env}))
        os.environ["JUPYTER_PATH"] = temporary
        yield


class Runner:
    """One run of a study's stages.

    Args:
        root: the repository.
        folder: the study's results.
        stages: notebooks in order.
        schema: declared parameters.
        values: value of every parameter.
    """

    def __init__(self, root: Path, folder: Path, stages: list[Path], schema: dict[str, Parameter], values: dict):
        self.root, self.folder, self.stages, self.schema, self.values = root, folder, stages, schema, values
        self.manifest = fingerprint.read_manifest(folder) | {
            "study": folder.name,
            "parameters": values,
            "seeds": {name: value for name, value in values.items() if "seed" in name},
        }
        self.inputs: dict[str, dict[str, str]] = {}
        self.packages: dict[str, set[str]] = {}
        print(f"study {folder.name}: {len(stages)} notebooks -> {os.path.relpath(folder)}", flush=True)

    def run_from(self, first: int, forced: bool = False, fresh: bool = False) -> None:
        """Bring all stages up to date; rerun those from `first` on even if unchanged (forced), from scratch (fresh)."""
        for index in range(len(self.stages)):
            if fresh and index == first:
                self._discard(range(first, len(self.stages)))
            why = self._why_run(index)
            if why or (forced and index >= first):
                self._run_stage(index, why or "asked for")
            else:
                print(f"{self._label(index)}: unchanged, skipped", flush=True)
        self._report()

    def run_only(self, wanted: int, fresh: bool = False) -> None:
        """Run one stage, even if unchanged.

        Raises:
            RunError: an earlier stage is not up to date.
        """
        for index in range(wanted):
            if why := self._why_run(index):
                stage = self.stages[index].stem
                raise RunError(f"--only {self.stages[wanted].stem[:2]}: {stage} {why}; use --from {stage[:2]} instead")
        if fresh:
            self._discard(range(wanted, wanted + 1))
        self._run_stage(wanted, self._why_run(wanted) or "asked for")
        self._report()

    def _label(self, index: int) -> str:
        return f"[{index + 1}/{len(self.stages)}] {self.stages[index].stem}"

    def _why_run(self, index: int) -> str:
        """Why a stage has to run, or "", as code, data and earlier stages are now."""
        path, records = self.stages[index], self.manifest["stages"]
        earlier: dict[str, str] = {}
        for before in self.stages[:index]:
            if record := records.get(before.stem):
                record["contents"] = fingerprint.contents(
                    self.folder, record.get("artefacts", ()), record.get("contents", {})
                )
                earlier |= {name: state[-1] for name, state in record["contents"].items()}
        sources = Sources(Path(fingerprint.__file__).parents[1])
        own = self._values_of(path.stem)
        reach = fingerprint.reached(path, sources, systems_imported(self.values, own.get("distances_from", "")))
        inputs = fingerprint.stage_inputs(path, own, earlier, reach)
        self.inputs[path.stem], self.packages[path.stem] = inputs, reach.packages
        return fingerprint.why_run(self.folder, path.stem, records.get(path.stem), inputs)

    def _values_of(self, stage: str) -> dict:
        return of_notebook(self.schema, self.values, stage)

    def _discard(self, wiped: range) -> None:
        """Delete what some stages left."""
        for index in wiped:
            stage = self.stages[index].stem
            fingerprint.wipe(self.folder, stage, self.manifest["stages"].pop(stage, None))
        self._save()

    def _save(self) -> None:
        atomic_write_text(self.folder / "manifest.json", json.dumps(self.manifest, indent=2) + "\n")

    def _report(self) -> None:
        write_report(self.folder)
        print(f"report: {os.path.relpath(self.folder / 'report.html')}", flush=True)

    def _run_stage(self, index: int, why: str) -> None:
        print(f"{self._label(index)}: {why}", flush=True)
        path, stage = self.stages[index], self.stages[index].stem
        inputs, earlier = self.inputs[stage], self.manifest["stages"].get(stage)
        if not earlier or earlier["status"] not in ("running", "failed") or earlier["inputs"] != inputs:
            fingerprint.set_aside(self.folder, stage, earlier)  # else it was interrupted: it goes on where it was
        entry = {
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "digest": digest(inputs),
            "inputs": inputs,
            "parameters": self._values_of(stage),
            "environment": fingerprint.environment(self.root, self.packages[stage]),
        }
        self.manifest["stages"][stage] = entry
        self._save()
        before, begin = fingerprint.snapshot(self.folder), time.monotonic()
        since = (self.folder / "manifest.json").stat().st_mtime  # by the clock of this file system
        try:
            with PeakMemory() as memory:
                _execute(self.root, path, self.folder / f"{stage}.ipynb", entry["parameters"])
            entry["status"] = "finished"
            fingerprint.clear(self.folder, stage, since)
        except RunError:
            entry["status"] = "failed"
            raise
        finally:  # what a failed or stopped stage left is recorded too, for the next run to keep or to wipe
            entry["seconds"] = round(time.monotonic() - begin, 1)
            entry["peak_memory_mb"] = memory.peak >> 20
            entry["artefacts"] = fingerprint.artefacts(self.folder, stage, before)
            self._save()
        cost = f"{entry['seconds']} s, peak memory {entry['peak_memory_mb']} MB"
        print(f"{self._label(index)}: done in {cost}", flush=True)


def run_over_studies(root: Path, notebook: Path, folder: Path, parameters: dict) -> None:
    """Execute a notebook that reads several studies into a folder, beside it as HTML."""
    _execute(root, notebook, folder / notebook.name, parameters)
    write_pages(folder, [notebook.stem])


def _execute(root: Path, notebook: Path, output: Path, parameters: dict) -> None:
    """Run one notebook in the repository's root; on an error keep what there is as NAME.failed.ipynb.

    Raises:
        RunError: names notebook, cell and error.
    """
    running = output.with_name(f".running-{output.name}")
    failed = output.with_suffix(".failed.ipynb")
    # papermill fills in what stands between braces.
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, running)]
    kernel = {"kernel_name": "python3", "language": "python", "cwd": root}
    try:
        executed = papermill.execute_notebook(*paths, parameters, progress_bar=False, stdout_file=LiveLines(), **kernel)
    except papermill.PapermillExecutionError as error:
        cell, what = f"cell In [{error.exec_count}]", f"{error.ename}: {error.evalue}"
    except Exception as error:  # the kernel died (out of memory), or did not start
        cell, what = "kernel", f"{type(error).__name__}: {error}"
    else:
        # papermill noted paths of this machine, one of them the temporary file's.
        names = (f"notebooks/{notebook.name}", f"outputs/{output.parent.name}/{output.name}")
        executed.metadata.papermill.update(zip(("input_path", "output_path"), names, strict=True))
        nbformat.write(executed, running)
        running.replace(output)
        failed.unlink(missing_ok=True)
        return
    see = ""
    if running.is_file():
        running.replace(failed)
        see = f" (see {os.path.relpath(failed)})"
    raise RunError(f"{notebook.name}: {cell}: {' '.join(what.split())[:600]}{see}")


class LiveLines:
    """A notebook's standard output on the console, line by line as it comes."""

    def __init__(self):
        self._begun = ""

    def write(self, text: str) -> None:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            print(f"    {line.rpartition(chr(13))[2]}", flush=True)

    def flush(self) -> None:
        """Whole lines are printed at once; a begun one waits for its end."""


class PeakMemory:
    """Highest sum, in bytes, of the resident memory of this process's children (a kernel and its workers).

    Pages that workers share with the kernel count once for each, so this is an upper bound.
    """

    def __enter__(self) -> PeakMemory:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:

        me = psutil.Process()
        while not self._stop.wait(0.25):
            total = 0
            for child in me.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.Error:  # it ended meanwhile
                    continue
            self.peak = max(self.peak, total)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
