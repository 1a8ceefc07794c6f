"""Jobs over all cores, results in order, only a few of them in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice

from recipe_lib.data.recipe import DataError


class Workers:
    """Processes that start when there are two jobs for them and end with the `with` block.

    Args:
        number: how many; 0: one for each core that this process may use.
    """

    def __init__(self, number: int = 0):
        self.number = number or _cores()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable, jobs: Iterable[tuple]) -> Iterator:
        """function(*job) of each job, in order; jobs are taken as workers get free.

        Raises:
            DataError: a worker was killed. Whatever a job raises comes out here.
        """
        jobs = iter(jobs)
        first = list(islice(jobs, 2))
        if self.number == 1 or (len(first) < 2 and not self._pool):  # not worth starting processes
            yield from (function(*job) for job in chain(first, jobs))
            return
        # spawn: a notebook's kernel has threads, whose locks a fork would copy as they are.
        self._pool = self._pool or ProcessPoolExecutor(
            self.number, multiprocessing.get_context("spawn"), initializer=_start
        )
        waiting: deque = deque()
        try:
            for job in chain(first, jobs):
                waiting.append(self._pool.submit(function, *job))
                if len(waiting) > self.number:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError("a preparation process was killed (out of memory?); the same command goes on") from None


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    # A parent that was killed with -9 leaves its children waiting for ever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
