"""./run_all.sh search: the page, or answers in the terminal."""

from __future__ import annotations

import argparse
import csv
import ipaddress
import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from recipe_lib.data.recipe import DataError

if TYPE_CHECKING:
    from recipe_lib.search.engine import Answer, RecipeSearch

HELP = """\
examples:
  ./run_all.sh search                                    the page, for outputs/kitchen
  ./run_all.sh search kitchen photo.jpg more.jpg         the ten nearest recipes of each
  ./run_all.sh search kitchen photos/                    of a whole folder, as photos_recipes.csv
  ./run_all.sh search kitchen --text recipe.txt          the photos nearest to a recipe
  ./run_all.sh search kitchen dish.jpg --variant debiased@no_z --recipes iid my_recipes/ --json

Indexes are made at the first call for a study and kept in outputs/<study>/search/. Photos stay where they are.
"""
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"}
LARGEST = 96 << 20  # bytes of a message to the kernel: a photo of 64 MB fits
NOTEBOOK = "notebooks/08_recipe_search.ipynb"
TEMPLATE = "causal-kitchen"  # of Voilà, in share/
COLUMNS = ["photo", "rank", "id", "title", "similarity", "from"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status is 0 when every photo that was named has its answer."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("CAUSAL_KITCHEN_ROOT", str(Path(__file__).parents[2]))
    try:
        return _search(args) if args.photos or args.text else _serve(args)
    except (DataError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./run_all.sh search",
        description="Find the recipes of a photo, or the photos of a recipe, in a study that was run.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("study", nargs="?", default="kitchen", help="name below outputs/, or a folder (default: kitchen)")
    add("photos", nargs="*", type=Path, help="photos, or a folder of photos; none: open the page")
    add("--text", type=Path, metavar="FILE", help="a recipe as text: title, ingredients, blank line, steps; - reads it")
    add("--top", type=int, default=10, metavar="N", help="how many are shown (default: 10)")
    add("--variant", default="", help="baseline, debiased, debiased@no_z (without its causal term) ...")
    add(
        "--recipes", nargs="+", default=(), metavar="PLACE", help="splits, or folders of recipes (default: every split)"
    )
    add("--json", action="store_true", help="one JSON object per photo and line")
    add("--out", type=Path, metavar="CSV", help="where the answers for a folder go (default: <folder>_recipes.csv)")
    add("--host", default="127.0.0.1", help="page: address to listen on (default: this computer alone)")
    add("--port", type=int, default=8866, help="page: port, or the next free one")
    add("--no-browser", action="store_true", help="page: print its address, open nothing")
    return parser


def _search(args: argparse.Namespace) -> int:
    from recipe_lib.search.quick import without_compiler
    from recipe_lib.search.studies import study_folder

    if args.top < 1:
        raise ValueError(f"--top {args.top}: must be 1 or more")
    folder, status = study_folder(args.study), 0
    _progress(f"loading {folder.name}")
    with without_compiler():
        from recipe_lib.search.engine import Answer, RecipeSearch

        search = RecipeSearch.load(folder, args.variant, args.recipes)
    if args.text:
        text = sys.stdin.read() if str(args.text) == "-" else args.text.read_text(encoding="utf-8-sig")
        _print(args, str(args.text), search, Answer(search.photos(text, args.top, _progress), {}))
    for photo in args.photos:
        try:
            if photo.is_dir():
                _folder(args, photo, search)
            else:
                _print(args, str(photo), search, search.search(photo, args.top, _progress))
        except DataError as error:
            _progress()
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status


def _folder(args: argparse.Namespace, folder: Path, search: RecipeSearch) -> None:
    """Answers for the photos of a folder, as CSV; those that cannot be read are named and left out."""
    photos = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.is_file())
    if not photos:
        raise DataError(f"{folder}: no photo in it; it may hold {', '.join(sorted(PICTURES))}")
    out = args.out or Path(f"{folder.resolve().name}_recipes.csv")
    partial, read = out.with_name(f".{out.name}.partial"), 0
    with open(partial, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for number, photo in enumerate(photos):
            _progress("photos", number, len(photos))
            try:
                hits = search.search(photo, args.top, _progress).hits
            except DataError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            read += 1
            rows = ((h.id, h.title, f"{h.similarity:.4f}", h.part.name) for h in hits)
            table.writerows((photo.name, rank, *row) for rank, row in enumerate(rows, 1))
    partial.replace(out)
    _progress()
    print(f"{out}: the recipes of {read} photos, {len(photos) - read} left out")


def _print(args: argparse.Namespace, asked: str, search: RecipeSearch, answer: Answer) -> None:
    _progress()
    likely = {name: round(p, 4) for name, p in list(answer.ingredients.items())[:10]}
    if args.json:
        recipes = [
            {"rank": rank, "similarity": round(hit.similarity, 4), "from": hit.part.name, **hit.recipe}
            for rank, hit in enumerate(answer.hits, 1)
        ]
        whole = {"asked": asked, "study": search.study, "variant": search.variant, "ingredients": likely}
        print(json.dumps(whole | {"recipes": recipes}, ensure_ascii=False))
        return
    print(f"\n{asked}  ({search.study}, {search.variant}, {len(search):,} recipes)")
    for rank, hit in enumerate(answer.hits, 1):
        print(f"{rank:4}  {hit.similarity:5.2f}  {hit.title[:70]:70}  {hit.part.name}")
    if likely:
        print(
            "seen in it:", ", ".join(f"{name} {100 * p:.0f} %" for name, p in likely.items() if p >= 0.05) or "nothing"
        )


def _progress(what: str = "", done: int = 0, total: int = 0) -> None:
    """One line of a terminal, written over by the next; without arguments it is wiped."""
    if sys.stderr.isatty():
        count = f": {done:,} of {total:,}" if total else ""
        print(f"\r\033[K{what}{count}", end="", file=sys.stderr, flush=True)


def _serve(args: argparse.Namespace) -> int:
    """The notebook as a page by Voilà, until Ctrl-C."""
    from recipe_lib.search.studies import study_folder

    folder = study_folder(args.study)  # before anything that takes seconds
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    from traitlets.config import Config
    from voila.app import Voila

    from recipe_lib.paths import repo_root
    from recipe_lib.runner.stages import kernel

    recipes = [str(Path(name).resolve()) if Path(name).is_dir() else name for name in args.recipes]
    parameters = {"study": str(folder), "variant": args.variant, "recipes": recipes, "gallery": False}
    notebook = parameterize_notebook(load_notebook_node(str(repo_root() / NOTEBOOK)), parameters)
    notebook.metadata["title"] = f"Recipe search: {folder.name}"
    try:
        here = ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        raise ValueError(f"--host {args.host}: not an address; 0.0.0.0 is every one of this computer") from None
    port = _free_port(args.host, args.port)
    options = {
        "template": TEMPLATE,
        "allow_template_override": "NO",
        "allow_theme_override": "NO",
        "file_allowlist": [],
    }
    config = Config(VoilaConfiguration=options, MappingKernelManager={"cull_idle_timeout": 300, "cull_interval": 60})
    # Of a page that is for this computer alone, no other name than its own is answered (DNS rebinding).
    settings = {"websocket_max_message_size": LARGEST, "allow_remote_access": not here}
    settings["ws_ping_timeout"] = 30_000  # Jupyter's own is longer than tornado allows, which says so on the terminal
    with kernel(), tempfile.TemporaryDirectory(prefix="causal-kitchen-") as served:
        os.environ["JUPYTER_PATH"] += os.pathsep + str(Path(__file__).with_name("share"))
        page = Path(served, "search.ipynb")
        nbformat.write(notebook, page)
        shown = f"http://{'localhost' if here else args.host}:{port}/"
        print(f"the page of {folder.name}: {shown} (Ctrl-C ends it)", flush=True)
        Voila.launch_instance(
            [str(page)], ip=args.host, port=port, port_retries=0, open_browser=not args.no_browser, log_level="ERROR",
            tornado_settings=settings, config=config,
        )  # fmt: skip
    return 0


def _free_port(host: str, port: int) -> int:
    for candidate in (port, *range(port + 1, port + 50)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
                return candidate
            except OSError:
                continue
    raise OSError(f"no free port from {port} on; choose another with --port")


if __name__ == "__main__":
    sys.exit(main())
