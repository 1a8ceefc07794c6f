"""Seconds to an answer: the command from its start; the first and the next photo once a study is loaded.

    python -m tests.benchmarks.first_answer [study]

The study must have been run; its index is made before anything is timed.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

from recipe_lib.paths import repo_root
from recipe_lib.search.engine import RecipeSearch
from tests.benchmarks import finish, in_child, table


def loaded(study: str, photo: Path) -> None:
    """In a process of its own: loading, the first answer, the median of ten more."""
    start = time.perf_counter()
    search = RecipeSearch.load(study)
    search._indexes("recipes", None)
    load = time.perf_counter() - start
    times = []
    for _ in range(11):
        start = time.perf_counter()
        [hit.recipe for hit in search.search(photo).hits]
        times.append(1e3 * (time.perf_counter() - start))
    finish(load=load, first=times[0], next=sorted(times[1:])[5], recipes=len(search))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", default="kitchen")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        loaded(given.study, given.child)
        raise SystemExit
    search = RecipeSearch.load(given.study)
    split = search.store.split(search.store.test_splits[0])
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder, "photo.jpg")
        photo.write_bytes(split.photo(0))
        search.search(photo)
        command, seconds = [str(repo_root() / "run_all.sh"), "search", given.study, str(photo)], []
        for _ in range(given.runs):
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
        children = [in_child("tests.benchmarks.first_answer", given.study, "--child", photo) for _ in range(given.runs)]
    rows = [{"what": "the command, start to end, s", "best": min(seconds), "median": sorted(seconds)[given.runs // 2]}]
    for name, unit in (("load", "s"), ("first", "ms"), ("next", "ms")):
        values = sorted(child[name] for child in children)
        rows.append({"what": f"{name}, {unit}", "best": values[0], "median": values[given.runs // 2]})
    print(f"{given.study}: {children[0]['recipes']:,} recipes, {given.runs} runs\n\n{table(rows)}")
