"""Measurements, run by hand: `python -m tests.benchmarks.ranks`. Not collected as tests."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median


def side_by_side(
    works: dict[str, Callable[[], object]], runs: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each, in turns in one process after one run each, so that a busy machine is busy for all."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for run in range(runs + 1):
        for name, work in works.items():
            start = clock()
            work()
            if run:
                times[name].append(clock() - start)
    return {name: median(seconds) for name, seconds in times.items()}


def in_child(module: str, *arguments: object) -> dict:
    """Run a module, whose last line is a JSON object, in a process of its own: memory is that process's peak."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def finish(**figures: object) -> None:
    """The end of a child: its figures and its peak memory in GB (Linux: ru_maxrss would include the parent's)."""
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps(figures | {"gb": int(peak.split()[1]) * 1024 / 1e9}))


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
