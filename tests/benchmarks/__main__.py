"""Every measurement in turn, each in a process of its own: ./run_all.sh bench [name ...]"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))

parser = argparse.ArgumentParser(
    prog="./run_all.sh bench",
    description=__doc__,
    epilog="python -m tests.benchmarks.NAME --help: sizes and runs of one",
)
parser.add_argument("names", nargs="*", choices=[*NAMES, []], help=f"{', '.join(NAMES)}; default: all, some two hours")
for name in parser.parse_args().names or NAMES:
    print(f"\n## {name}\n", flush=True)
    if status := subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}"], check=False).returncode:
        sys.exit(status)
