"""Every measurement in turn, each in a process of its own: ./run_all.sh bench [name ...]"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def without_gpu(names: list[str]) -> list[str]:
    """All but those that this machine has no GPU for; a line says which."""
    from recipe_lib import devices  # torch takes seconds, which --help and names do not need

    if devices.device() == "cuda":
        return names
    print("gpu is left out: it needs an NVIDIA GPU, and there is none", flush=True)
    return [name for name in names if name != "gpu"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="./run_all.sh bench",
        description=__doc__,
        epilog="python -m tests.benchmarks.NAME --help: sizes and runs of one",
    )
    some = f"{', '.join(NAMES)}; default: all, some two hours"
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help=some)
    for name in parser.parse_args().names or without_gpu(NAMES):
        print(f"\n## {name}\n", flush=True)
        if status := subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}"], check=False).returncode:
            sys.exit(status)


if __name__ == "__main__":
    main()
