"""More than one device: `training.train` starts torchrun, whose processes run `training.fit` under Lightning DDP.

    notebook, in train() -> launcher (torchrun) -> one worker per device

Each process is killed with the one that started it, by whatever signal that ends (Linux): no orphan goes on writing.

On several machines each runs the same command. Machine 0 runs the notebooks; the others `serve`: they join each job
that machine 0 posts on a TCPStore of its own process, and end with the run. The store dies with the run, so a helper
can neither join a job of an earlier run nor outlive its own. What a job needs lies on the shared file system.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from recipe_lib.training.stopping import Stop

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_PARENT = "CAUSAL_KITCHEN_PARENT"  # process that a launcher or a worker must not outlive


def launch(job: Path, devices: int, num_nodes: int = 1) -> None:
    """Run a job folder on all devices and print what its rank 0 prints, line by line.

    Raises:
        RuntimeError: a process failed; one line with the first error.
        ConnectionError: several machines, but this notebook was not started by run_all.sh on machine 0.
    """
    if num_nodes > 1:
        board = _board(seconds=10)
        board.set(f"job {board.add('jobs', 1)}", str(job))
    process = _start(job, devices, num_nodes, 0, stdout=subprocess.PIPE, text=True)
    try:
        with Stop() as stop:  # the processes write a checkpoint first
            for line in process.stdout:
                print(line, end="", flush=True)
            status = process.wait()
            stop.obey()
    finally:
        process.kill()
        process.wait()
    if status:
        raise RuntimeError(f"training on {devices * num_nodes} devices failed: {_why(job, 0)}")


def _start(job: Path, devices: int, num_nodes: int, node: int, **options) -> subprocess.Popen:
    where = ["--standalone"]
    if num_nodes > 1:
        address, port = _address()
        where = [f"--nnodes={num_nodes}", f"--node-rank={node}", f"--master-addr={address}", f"--master-port={port}"]
    worker = f"{__spec__.parent}.worker"
    command = [sys.executable, "-m", __spec__.name, *where, f"--nproc-per-node={devices}", "-m", worker, str(job)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {"OMP_NUM_THREADS": str(max(1, cores // devices))} | os.environ  # torchrun would give each process one
    with open(job / f"stderr-{node}.txt", "w", encoding="utf-8") as log:
        # From the folder above the package: -m finds this recipe_lib and no other one. A session of its own: Ctrl-C
        # is for the parent, which then ends these.
        package, env = Path(__file__).parents[2], threads | {_PARENT: str(os.getpid())}
        return subprocess.Popen(command, cwd=package, env=env, stderr=log, start_new_session=True, **options)


def _why(job: Path, node: int) -> str:
    """The first error that a process noted, on any machine, else the end of what this machine's torchrun said."""
    log = job / f"stderr-{node}.txt"
    try:
        first = (job / "errors.txt").read_text(encoding="utf-8").splitlines()[0]
    except FileNotFoundError:  # killed, most likely for its memory
        first = " ".join(word for word in log.read_text(encoding="utf-8").split() if word.strip("=-"))[-300:]
    return f"{first} (see {log})"


# ---- several machines ----


def node_rank() -> int:
    """Which of several machines this is: NODE_RANK, else what srun says, else 0."""
    return int(os.environ.get("NODE_RANK") or os.environ.get("SLURM_NODEID") or 0)


def _address() -> tuple[str, int]:
    if not os.environ.get("MASTER_ADDR"):
        raise ConnectionError("num_nodes: set MASTER_ADDR to the first machine's address (README, More than one GPU)")
    return os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", 29500))


def _board(seconds: float, leading: bool = False) -> TCPStore:
    """Where machine 0 posts its jobs, one port above torchrun's: "job 1", "job 2", ..., at last "over"."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a store that is gone is a C++ stack, before our line
    from torch.distributed import TCPStore

    address, port = _address()
    try:
        timeout = timedelta(seconds=seconds)
        return TCPStore(address, port + 1, is_master=leading, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        what = "cannot listen there" if leading else "no run_all.sh of machine 0 (NODE_RANK=0) answers there"
        raise ConnectionError(f"{address}:{port + 1}: {what}: {str(error).splitlines()[0]}") from None


@contextmanager
def lead(num_nodes: int) -> Iterator[None]:
    """Machine 0, while its notebooks run; then the others are told how it ended."""
    board = _board(seconds=60, leading=True)
    status = 1
    try:
        yield
        status = 0
    finally:
        board.set("over", str(status))
        # One that is late, where nothing had to be trained, must still find the board.
        end = time.monotonic() + (10 if status else 120)
        while board.add("left", 0) < num_nodes - 1 and time.monotonic() < end:
            time.sleep(0.1)


def serve(devices: int, num_nodes: int, node: int) -> int:
    """Every other machine: join the jobs of machine 0 until its run is over.

    Returns:
        exit status: 0 when the run succeeded.

    Raises:
        ConnectionError: machine 0 does not answer within ten minutes, or is gone.
    """
    address, _ = _address()
    print(f"machine {node} of {num_nodes}: trains along with {address}", flush=True)
    board = _board(seconds=600)
    joined, job, process, status = 0, None, None, None
    try:
        while status is None:
            time.sleep(0.2)
            running = process is not None and process.poll() is None
            if board.check(["over"]):
                status = int(board.get("over"))
            elif process and process.poll():
                print(f"error: {_why(job, node)}", file=sys.stderr, flush=True)
                status = 1
            elif not running and board.check([f"job {joined + 1}"]):
                joined += 1
                job = Path(board.get(f"job {joined}").decode())
                process = _start(job, devices, num_nodes, node)
        board.add("left", 1)
    except RuntimeError:
        raise ConnectionError(f"{address}: machine 0 is gone; start all machines again to go on") from None
    finally:
        if process:
            process.kill()
            process.wait()
    return status


# ---- in the processes that are started ----


def die_with_parent() -> None:
    """Be killed with the process that started this one, by whatever signal that ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[_PARENT]):  # it ended before that
            os._exit(1)
    os.environ[_PARENT] = str(os.getpid())


if __name__ == "__main__":
    from torch.distributed.run import main

    die_with_parent()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it is for the processes that train
    main(sys.argv[1:])
