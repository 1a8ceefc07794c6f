#!/usr/bin/env bash
# Run the study, compare the systems, search, fetch weights, its tests, its benchmarks or JupyterLab, from any folder; sets the environment up on first use. --help says the rest.
set -euo pipefail

here="$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P)"
venv="$here/.venv"

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 1
}

# Is this repository's recipe_lib installed in the environment of Python $1?
has_study() {
  (cd / && "$1" -c '
import sys
from importlib.metadata import version
from pathlib import Path
import recipe_lib
version("causal-kitchen")
sys.exit(Path(recipe_lib.__file__).resolve().parent != Path(sys.argv[1], "recipe_lib").resolve())' "$here") >/dev/null 2>&1
}

find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then
      printf '%s\n' "$name"
      return
    fi
  done
  fail "no Python 3.11, 3.12 or 3.13 on PATH; install one, or activate an environment made from environment.yml"
}

# What .venv was made from; a changed lock, or a set-up that was killed before the stamp, installs again.
wanted_stamp() { cat "$here/requirements.lock" "$here/pyproject.toml" | cksum; }

is_set_up() {
  [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$(wanted_stamp)" ] && has_study "$venv/bin/python"
}

set_up() {
  local base stamp
  is_set_up && return # another run made it while this one waited
  base="$(find_python)"
  stamp="$(wanted_stamp)"
  printf 'setting up .venv, once: about 3 GB to download, 6 GB on disk (on Linux torch brings CUDA); some minutes\n'
  "$base" -m venv --clear "$venv" || fail "$base cannot make .venv here; is there space, and its venv module (python3-venv)?"
  local pip=("$venv/bin/python" -m pip install --disable-pip-version-check)
  # Of some 170 packages only the large downloads are worth a line.
  "${pip[@]}" -r "$here/requirements.lock" |
    awk '/(Downloading|Using cached).*\([0-9][0-9]+\.?[0-9]* [MG]B\)/ || /No space/ { print; fflush() }
         /^Installing collected/ { print "  Installing"; fflush() }' ||
    fail "pip could not install requirements.lock (see above); the next call starts over"
  "${pip[@]}" --quiet --no-deps --no-build-isolation --editable "$here" ||
    fail "pip could not install recipe_lib (see above); the next call starts over"
  printf '%s\n' "$stamp" >"$venv/.stamp"
}

# Sets $python: the active environment if the study is installed in it, else .venv.
choose_python() {
  if has_study python; then
    python=python
    return
  fi
  python="$venv/bin/python"
  if ! is_set_up; then
    # Two first calls at once: the second waits for the first.
    (
      if command -v flock >/dev/null; then flock 9; fi
      set_up
    ) 9>"$here/.venv.lock"
  fi
}

case "${1:-}" in
-h | --help)
  python="$(find_python)" # the help needs no environment
  PYTHONPATH="$here" exec "$python" -P -m recipe_lib.runner.run --help
  ;;
test)
  shift
  choose_python
  cd -- "$here"
  "$python" -m ruff check .
  "$python" -m ruff format --check .
  "$python" -c 'import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))'
  # Two processes of one thread each: two of two threads would wait for each other's cores.
  OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" exec "$python" -m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations=15 "$@"
  ;;
search)
  shift
  choose_python
  CAUSAL_KITCHEN_ROOT="$here" exec "$python" -P -m recipe_lib.search.command "$@"
  ;;
fetch)
  shift
  choose_python
  CAUSAL_KITCHEN_ROOT="$here" exec "$python" -P -m recipe_lib.runner.fetch "$@"
  ;;
compare)
  shift
  choose_python
  CAUSAL_KITCHEN_ROOT="$here" exec "$python" -P -m recipe_lib.runner.run "$here/params/compare.yaml" "$@"
  ;;
bench)
  shift
  choose_python
  cd -- "$here"
  exec "$python" -m tests.benchmarks "$@"
  ;;
lab)
  shift
  choose_python
  # As the runner sets them for its kernels (stages.py).
  export PYTHONWARNINGS="${PYTHONWARNINGS:+$PYTHONWARNINGS,}ignore:IProgress not found"
  exec "$python" -m jupyterlab --ServerApp.root_dir="$here" --LabApp.default_url=/lab/tree/notebooks "$@"
  ;;
*)
  choose_python
  # -P: a recipe_lib folder where the caller stands, in another clone, must not be taken for this one.
  CAUSAL_KITCHEN_ROOT="$here" exec "$python" -P -m recipe_lib.runner.run "$@"
  ;;
esac
