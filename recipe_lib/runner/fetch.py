"""Fetch what a run would ask the Hugging Face hub for, for machines without network (what run_all.sh fetch calls)."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recipe_lib.paths import repo_root, resolve

HELP = """\
Only what the parameters really use is fetched. Run it where there is network; what is there already is not fetched
again. With HF_HUB_OFFLINE=1 nothing is asked for: it then says whether all is there.

examples:
  ./run_all.sh fetch params/recipe1m.yaml                                         ResNet-50
  ./run_all.sh fetch params/recipe1m.yaml params/methods/dar.yaml --to weights/   CLIP, the chat model, SAM
"""
# Of a model of transformers: no code, no pickles, and nothing below its folder, where other formats lie.
FILES = ("model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Published:
    """Weights on the hub.

    Args:
        parameter: the one that names them.
        name: what it says.
        repo: where they are; "" where they are not on the hub.
        load: gets them, by the run's own call where that needs no more memory than a training does.
    """

    parameter: str
    name: str
    repo: str
    load: Callable[[], object] = field(compare=False)


def wanted(values: Mapping) -> list[Published]:
    """What the notebooks of one study ask the hub for.

    Args:
        values: all parameters, as `params.load` gives them.

    Raises:
        ValueError: timm or open_clip know no such weights.
    """
    from recipe_lib.runner.params import CLIP

    found, clip = [], values["method"] in CLIP
    if values["descriptions"] and values["description_backend"] == "llm":
        found += _of_transformers("description_model", values["description_model"])
    if values["segments"] and values["segment_backend"] == "sam":
        found += _of_transformers("segment_model", values["segment_model"])
    builds = values["pretrained"] and not values["weights_from"]
    ranks = values["segments"] and values["segment_backend"] != "given"
    if (tag := values["clip_pretrained"]) and (ranks or (clip and builds)) and not resolve(tag).is_file():
        found.append(_of_open_clip(values["clip_model"], tag))
    if builds and not clip:
        found.append(_of_timm(values["image_model"], values["image_model_args"]))
    return found


def _of_transformers(parameter: str, name: str) -> list[Published]:
    local = name.startswith("package:") or resolve(name).exists()
    return [] if local else [Published(parameter, name, name, lambda: _snapshot(name))]


def _of_open_clip(model: str, tag: str) -> Published:
    import open_clip

    from recipe_lib.encoders.clip import clip_towers

    repo = os.path.dirname(open_clip.get_pretrained_cfg(model, tag).get("hf_hub", ""))
    return Published("clip_pretrained", tag, repo, lambda: clip_towers(model, pretrained=tag))


def _of_timm(model: str, model_args: list[str]) -> Published:
    import timm

    from recipe_lib.encoders.image import ImageEncoder

    try:
        repo = timm.get_pretrained_cfg(model).hf_hub_id or ""
    except (RuntimeError, AttributeError):  # no such tag; a model without weights
        raise ValueError(f"image_model {model}: timm has no such weights; see timm.list_pretrained()") from None
    load = lambda: ImageEncoder(model, 8, pretrained=True, model_args=model_args)  # noqa: E731
    return Published("image_model", model, repo.partition("@")[0], load)


def _snapshot(name: str) -> None:
    """The files alone: a chat model need not fit into the memory of the machine that fetches it."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=list(FILES), ignore_patterns=["*/*"]))
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text())["weight_map"].values())
    if missing := sorted(file for file in files if not (folder / file).is_file()):
        raise ValueError(f"{missing[0]} is not in it, and other formats are not read; name another model")


def _ask(repo: str) -> None:
    """Is it there? One request, which fails in seconds where the loaders would try again for a minute."""
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().model_info(repo)
    except (errors.HfHubHTTPError, errors.HFValidationError):
        raise
    except Exception:  # of the HTTP client, which is another one in another version
        raise ConnectionError("the hub does not answer; run this where there is network") from None


def _why(error: Exception) -> str:
    """What to do about an error, in one line: hub clients raise many kinds, often inside one that says less."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if among(errors.GatedRepoError):
        return "its publisher wants an account: accept the licence on its page, then `hf auth login`, and again"
    if among(errors.RepositoryNotFoundError, errors.HFValidationError):
        return "the hub has no such model, or shows it to its owners alone (`hf auth login`); is it spelt right?"
    if constants.HF_HUB_OFFLINE and among(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        return "not all of it is here, and HF_HUB_OFFLINE is set; fetch it where there is network"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _studies(files: list[Path], given: list[tuple[str, str]]) -> Iterator[dict]:
    """The values of the study that the files mean, or of every study of the grid."""
    from recipe_lib.runner import grid, params

    root = repo_root()
    schema = params.declared(sorted(root.glob("notebooks/*.ipynb")))
    files = [Path(os.path.relpath(path if path.exists() else root / path)) for path in files]
    values = params.load(files, given, schema)
    if not values.get("seeds"):
        yield values
        return
    for member in grid.members(values):
        own = [Path(os.path.relpath(path)) for path in member.files]
        yield params.load([*files, *own], [*given, *member.arguments], schema)


def _fetch(args: argparse.Namespace) -> int:
    from recipe_lib.runner.params import ParamsError

    files = args.params or [Path("params/kitchen.yaml")]
    try:
        weights = list(dict.fromkeys(one for values in _studies(files, args.p) for one in wanted(values)))
    except (ParamsError, OSError, ValueError) as error:
        return _error(error)
    status = 0
    for one in weights:
        if not one.repo:
            status = _error(f"{one.parameter} {one.name}: its weights are not on the hub; name others")
            continue
        try:
            _ask(one.repo)
            one.load()
            print(f"{one.parameter} {one.name}: {_place(one.repo)}", flush=True)
        except Exception as error:  # see _why
            status = _error(f"{one.parameter} {one.name} ({one.repo}): {_why(error)}")
    if status == 0 and not weights:
        print("nothing to fetch: these parameters use no published weights")
    elif status == 0:
        where = f"HF_HUB_CACHE={shlex.quote(os.environ['HF_HUB_CACHE'])} " if args.to else ""
        pairs = [word for pair in args.p for word in ("-p", *pair)]
        print(f"{where}HF_HUB_OFFLINE=1 ./run_all.sh {shlex.join([*map(str, args.params), *pairs])}".rstrip())
    return status


def _place(repo: str) -> str:
    from huggingface_hub import scan_cache_dir

    cached = next(one for one in scan_cache_dir().repos if one.repo_id == repo)
    return f"{cached.size_on_disk / 1e6:,.1f} MB in {cached.repo_path}"


def _error(text: object) -> int:
    print(f"error: {' '.join(str(text).split())}", file=sys.stderr, flush=True)
    return 1


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status is 0 when all weights are there."""
    parser = argparse.ArgumentParser(
        prog="./run_all.sh fetch",
        description="Fetch the published weights that a run uses, so that it then needs no network.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("params", nargs="*", type=Path, help="parameter files, as for the run (default: params/kitchen.yaml)")
    add("-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="one parameter, as for the run")
    add("--to", type=Path, metavar="DIR", help="where they go (default: the hub's own cache, below your home)")
    args = parser.parse_intermixed_args(argv)
    if args.to:
        # Before anything imports the hub's client. Not HF_HOME: an account's token lies there.
        os.environ["HF_HUB_CACHE"] = str(args.to.expanduser().resolve())
    try:
        return _fetch(args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
