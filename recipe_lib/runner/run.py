"""Run the study: parameters -> notebooks, in order, through papermill -> outputs/<study>/ (what run_all.sh calls)."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

from recipe_lib.paths import repo_root, study_dir

EVIDENCE, COMPARISON = "06_evidence", "07_method_comparison"
REQUEUE = 75  # exit status after SIGUSR1, EX_TEMPFAIL of sysexits.h: the same command goes on
CHECKPOINT_SECONDS = 240  # that trainings have for a checkpoint
HELP = """\
A stage is skipped when its notebook, its parameters, the library code and packages that it uses, its source data and
what the stages before it left are unchanged. What a stage run again replaces stands in .previous/ until it is finished,
trained weights longer; weights made from the same are not trained again. A run that was killed goes on with the same
command. Results: outputs/<study>/ with the executed notebooks,
a folder per stage, results.csv, metrics.json, manifest.json and report.html.

also:
  ./run_all.sh compare [options]         params/compare.yaml: every system over seeds, then notebook 07
  ./run_all.sh search [study] [photos]   recipes for your photos: a page, or in the terminal; --help says the rest
  ./run_all.sh fetch [params]            published weights that a run uses, for machines without network
  ./run_all.sh test [pytest arguments]   ruff, the layers contract, then the tests
  ./run_all.sh bench [names]             speed and memory against the released code's ways
  ./run_all.sh lab [jupyter arguments]   JupyterLab on the notebooks
  papermill --help-notebook notebooks/02_baseline_training.ipynb   the parameters of one notebook

examples:
  ./run_all.sh                                        the synthetic kitchen
  ./run_all.sh params/smoke.yaml                      the same in about a minute
  ./run_all.sh params/kitchen.yaml -p study seed7 -p seed 7
  ./run_all.sh --only 05                              evaluate again what is trained
  ./run_all.sh params/evidence.yaml --jobs 2          a grid: every seed a study, then notebook 06 over all of them
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./run_all.sh",
        description="Run the study's notebooks in order and leave figures, tables and a report.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("params", nargs="*", help="flat YAML files, later wins (default: params/kitchen.yaml)")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="set one parameter; wins over files"
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--only", metavar="NN", help="run this stage alone, even if unchanged, e.g. --only 05")
    part.add_argument("--from", dest="start", metavar="NN", help="run this stage and all later ones, even if unchanged")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="of a grid (seeds: [...]): N studies at a time"
    )
    parser.add_argument("--fresh", action="store_true", help="delete what the stages left, weights too, then run them")
    parser.add_argument("--outputs", metavar="DIR", help="put the studies in this folder instead of outputs/")
    parser.add_argument("--list", action="store_true", help="show the stages and all parameters, run nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status is 0 only when every wanted stage is finished."""
    args = _parser().parse_intermixed_args(argv)
    # Imported only here: --help and a misspelt option are answered before an environment is installed.
    from recipe_lib.runner.fingerprint import RunError
    from recipe_lib.runner.params import ParamsError

    _listen(_stop)
    try:
        return _run(args)
    except (ParamsError, RunError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return REQUEUE if stopped.args == (signal.SIGUSR1,) else 130


def _listen(handler: Callable) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handler)


def _stop(number: int, _: object) -> None:
    """End all that this process started, as Ctrl-C does, once trainings have written a checkpoint."""
    import psutil

    started = psutil.Process().children(recursive=True)
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGUSR1)
    psutil.wait_procs(started, timeout=CHECKPOINT_SECONDS)
    _interrupt(number, _)


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def _run(args: argparse.Namespace) -> int:
    from recipe_lib.runner import params, stages
    from recipe_lib.training import distributed

    root = repo_root()
    notebooks, over = stages.stage_notebooks(root), [root / f"notebooks/{n}.ipynb" for n in (EVIDENCE, COMPARISON)]
    schema = params.declared([*notebooks, *filter(Path.is_file, over)])
    if args.list:
        _list(notebooks, schema)
        return 0
    files = [path if path.exists() else root / path for path in map(Path, args.params or ["params/kitchen.yaml"])]
    values = params.load([Path(os.path.relpath(path)) for path in files], args.p, schema)
    first = stages.position(notebooks, args.only or args.start or notebooks[0].stem)
    if args.outputs:
        os.environ["CAUSAL_KITCHEN_OUTPUTS"] = str(Path(args.outputs).expanduser().resolve())
    os.environ["CAUSAL_KITCHEN_ROOT"] = str(root)
    if values.get("seeds"):
        return _run_grid(args, files, values, schema, over[bool(values.get("methods"))])
    machines, machine = values.get("num_nodes", 1), distributed.node_rank()
    if machines > 1 and machine:
        return distributed.serve(values["devices"], machines, machine)
    folder = study_dir(values["study"])
    folder.mkdir(parents=True, exist_ok=True)
    helped = distributed.lead(machines) if machines > 1 else nullcontext()
    with helped, stages.locked(folder), stages.kernel():
        runner = stages.Runner(root, folder, notebooks, schema, values)
        if args.only:
            runner.run_only(first, args.fresh)
        else:
            runner.run_from(first, forced=bool(args.start), fresh=args.fresh)
    return 0


def _run_grid(args: argparse.Namespace, files: list[Path], values: dict, schema: dict, notebook: Path) -> int:
    """Every study of a grid, then the notebook over them; see `grid`."""
    from recipe_lib.runner import grid, params, stages
    from recipe_lib.runner.fingerprint import RunError

    if args.only or args.start or args.fresh:
        raise RunError("--only, --from and --fresh are for one study; name it with -p study and -p seeds []")
    studies = grid.members(values)
    for member in studies:  # whatever is wrong with one of them is said before the first begins
        own = map(os.path.relpath, [*files, *member.files])
        params.load([Path(path) for path in own], [*args.p, *member.arguments], schema)
    folder = study_dir(values["study"])
    folder.mkdir(parents=True, exist_ok=True)
    own = grid.share(studies, os.environ)
    _listen(_interrupt)  # at once: while it waited for the studies that run, others would begin
    print(f"grid {folder.name}: {len(own)} of {len(studies)} studies, {args.jobs} at a time", flush=True)
    with stages.locked(folder) if len(own) == len(studies) else nullcontext():
        own_files = [str(path.resolve()) for path in files]
        failed = grid.run_grid(studies, own, folder, own_files, args.p, max(1, args.jobs))
        if failed:
            raise RunError(f"{len(failed)} of {len(own)} studies failed: {', '.join(failed)}; mend and run it again")
        if len(own) < len(studies):
            print("this task's share is done; when all are, the same command without the array reads them")
            return 0
        with stages.kernel():
            own = params.of_notebook(schema, values, notebook.stem)
            stages.run_over_studies(root := repo_root(), notebook, folder, own)
            print(f"{notebook.stem}: {os.path.relpath(folder / notebook.name, root)}", flush=True)
    return 0


def _list(notebooks: list[Path], schema: dict) -> None:
    for path in notebooks:
        print(path.stem)
    for parameter in schema.values():
        used = " ".join(name[:2] for name in parameter.notebooks)
        kind = f"list[{parameter.item}]" if parameter.item else parameter.kind
        print(f"  {parameter.name}: {kind} = {json.dumps(parameter.default)}  # {parameter.help}  ({used})")


if __name__ == "__main__":
    sys.exit(main())
