"""Many studies from one parameter file: every seed in every world, each a study of its own that can be resumed.

`seeds: [1, 2, 3]` runs the study three times, as `<study>-seed1` and so on. `worlds` changes other parameters too, each
an entry "name: {key: value}"; its studies are `<study>-<name>-seed1` and so on. `methods` puts files of params/methods
on it, each a world of its name. When all are finished, notebook 06 reads them, or 07 where there are methods. Each
study is a process of its own, so one that fails stops no other, and what is finished is skipped by the rules of a
single study. In a Slurm array every task takes its share of the studies; the same command without the array, then,
finds them finished and runs the notebook over them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from recipe_lib.paths import atomic_write_text, repo_root
from recipe_lib.runner.params import ParamsError

BARE = "ht"  # the method that needs no file: the grid's own parameters


@dataclass(frozen=True)
class Member:
    """One study of a grid.

    Args:
        world: name of what its parameters change, or of the method that is put on; "" for the seed alone.
        method: the method that is put on, or "".
    """

    study: str
    world: str
    seed: int
    overrides: Mapping[str, object]
    method: str = ""

    @property
    def arguments(self) -> list[tuple[str, str]]:
        """As `-p` takes them: what makes it one study and no grid."""
        own = {"study": self.study, "seed": self.seed, "seeds": [], "worlds": [], "methods": [], **self.overrides}
        return [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in own.items()]

    @property
    def files(self) -> list[str]:
        """Parameter files after those of the grid."""
        return [str(_methods_folder() / f"{self.method}.yaml")] if self.method not in ("", BARE) else []


def members(values: Mapping) -> list[Member]:
    """The studies of a grid, worlds or methods outside, seeds inside.

    Raises:
        ParamsError: a world that is not "name: {key: value}", a method without a file, or both in one grid.
    """
    if values.get("methods"):
        return _methods(values)
    worlds: dict[str, Mapping] = {}
    for text in values["worlds"]:
        try:
            world = yaml.safe_load(text)
        except yaml.YAMLError:
            world = None
        if not isinstance(world, dict) or len(world) != 1 or not isinstance(next(iter(world.values())), dict):
            raise ParamsError(f'worlds: {text!r} must be "name: {{key: value}}"')
        worlds |= world
    if len(worlds) < len(values["worlds"]):
        raise ParamsError("worlds: two of them have the same name")
    return [
        Member("-".join(filter(None, [values["study"], str(world), f"seed{seed}"])), str(world), seed, overrides)
        for world, overrides in (worlds or {"": {}}).items()
        for seed in values["seeds"]
    ]


def _methods_folder() -> Path:
    return repo_root() / "params/methods"


def _methods(values: Mapping) -> list[Member]:
    """The methods' files come after the grid's, but all of them get the variants that the grid compares."""
    if values["worlds"]:
        raise ParamsError("methods: a grid has worlds or methods, not both; take one of them away")
    stems = sorted(path.stem for path in _methods_folder().glob("*.yaml"))
    known = [BARE, *(stem for stem in stems if not stem.endswith("_recipe1m"))]  # those go after their method's file
    for name in values["methods"]:
        if name not in known:
            raise ParamsError(f"methods: there is no params/methods/{name}.yaml; there are {', '.join(known)}")
    return [
        Member(f"{values['study']}-{name}-seed{seed}", name, seed, {"variants": values["variants"]}, name)
        for name in dict.fromkeys(values["methods"])
        for seed in values["seeds"]
    ]


def share(studies: Sequence[Member], environ: Mapping[str, str]) -> list[Member]:
    """What this task of a Slurm array runs of them; all, where there is no array.

    Raises:
        ParamsError: numbers that leave some out: who counts from the first to the last cannot share out by them.
    """
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return list(studies)
    first, last, count = (int(environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("MIN", "MAX", "COUNT"))
    if last - first + 1 != count:
        raise ParamsError(f"the numbers of a Slurm array must follow one another; use --array=1-{count}")
    return list(studies)[int(environ["SLURM_ARRAY_TASK_ID"]) - first :: count]


def run_grid(
    grid: Sequence[Member],
    studies: Sequence[Member],
    folder: Path,
    files: Sequence[str],
    given: Sequence[tuple[str, str]],
    jobs: int,
) -> list[str]:
    """Run the studies, `jobs` at a time, and write grid.json into the grid's folder.

    Args:
        grid: all of it, as grid.json is to name it; `studies`: this task's share.
        files, given: parameter files and `-p` pairs of the command line.

    Returns:
        Names of the studies that failed; what they printed is in `<folder>/logs/<study>.log`.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "grid.json", json.dumps([asdict(member) for member in grid], indent=1))
    environ = dict(os.environ)
    if jobs > 1:  # processes that each take all cores would wait for each other
        environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))

    running: set[subprocess.Popen] = set()

    def run(member: Member) -> tuple[Member, int, float]:
        pairs = [part for pair in (*given, *member.arguments) for part in ("-p", *pair)]
        command = [sys.executable, "-P", "-m", "recipe_lib.runner.run", *files, *member.files, *pairs]
        begin = time.monotonic()
        with open(logs / f"{member.study}.log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environ)
            running.add(process)
            status = process.wait()
            running.discard(process)
        return member, status, time.monotonic() - begin

    failed: list[str] = []
    begin = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for number, done in enumerate(as_completed([pool.submit(run, member) for member in studies]), 1):
                member, status, seconds = done.result()
                if status:
                    failed.append(member.study)
                state = f"FAILED, see {os.path.relpath(logs / member.study)}.log" if status else "done"
                left = (time.monotonic() - begin) / number * (len(studies) - number)
                rest = f"; about {left / 60:.0f} min left" if left else ""
                print(f"[{number}/{len(studies)}] {member.study}: {state} in {seconds:.0f} s{rest}", flush=True)
        except BaseException:  # Ctrl-C, SIGTERM: begin no other study, and stop those that run
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            raise
    return failed
