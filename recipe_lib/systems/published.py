"""Weights that the papers' authors publish, under our names: H-T, the debiasing paper, DAR.

Each released checkpoint names its weights after its own modules. The tables below say what they are called here; what
no table names is left over, and every weight of our encoders must be there in its shape. Photos are then normalised
as the released code does it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor

from recipe_lib.data.plain_pickle import read_plain_pickle
from recipe_lib.data.recipe import DataError
from recipe_lib.sources.recipe1m_pickles import read_ing2label
from recipe_lib.systems.base import System

RECIPE = {
    r"text_encoder\.word_embedding\.weight": r"recipe_encoder.word.weight",
    r"text_encoder\.tfs\.(\w+)\.pos_encoder\.weight": r"recipe_encoder.words.\1.position",
    r"text_encoder\.tfs\.(\w+)\.tf\.(.+)": r"recipe_encoder.words.\1.encoder.\2",
    r"text_encoder\.merger\.(\w+)\.pos_encoder\.weight": r"recipe_encoder.sentences.\1.position",
    r"text_encoder\.merger\.(\w+)\.tf\.(.+)": r"recipe_encoder.sentences.\1.encoder.\2",
    r"merger_recipe\.(.+)": r"recipe_encoder.fc.\1",
    # Theirs are called from, to; ours to, from.
    r"projector_recipes\.(\w+)\.(\w+)\.(.+)": r"projections.\2_\1.\3",
}
# torchvision's ResNet as an nn.Sequential of its children, of which 2 and 3 have no weights; timm's ViT by its names.
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
HT = {
    r"image_encoder\.fc\.(.+)": r"image_encoder.fc.\1",
    **{rf"image_encoder\.backbone\.{n}\.(.+)": rf"image_encoder.backbone.{name}.\1" for n, name in CHILDREN.items()},
    r"image_encoder\.backbone\.([a-z].+)": r"image_encoder.backbone.\1",
}
DEBIASING = {
    r"img_fc\.(.+)": r"image_encoder.fc.\1",
    r"backbone\.0\.body\.(.+)": r"image_encoder.backbone.\1",
    r"input_proj\.(.+)": r"classifier.project.\1",
    r"query_embed\.weight": r"classifier.queries",
    r"fc\.W": r"classifier.weight",
    r"fc\.b": r"classifier.bias",
    r"transformer\.encoder\.layers\.0\.self_attn\.(.+)": r"classifier.encoder.attention.\1",
    r"transformer\.encoder\.layers\.0\.linear1\.(.+)": r"classifier.encoder.feedforward.0.\1",
    r"transformer\.encoder\.layers\.0\.linear2\.(.+)": r"classifier.encoder.feedforward.3.\1",
    r"transformer\.encoder\.layers\.0\.(norm[12]\..+)": r"classifier.encoder.\1",
    r"transformer\.decoder\.layers\.(\d)\.multihead_attn\.(.+)": r"classifier.decoder.\1.attention.\2",
    r"transformer\.decoder\.layers\.(\d)\.linear1\.(.+)": r"classifier.decoder.\1.feedforward.0.\2",
    r"transformer\.decoder\.layers\.(\d)\.linear2\.(.+)": r"classifier.decoder.\1.feedforward.3.\2",
    # Their first norm is that of the self-attention which the decoder is made without.
    r"transformer\.decoder\.layers\.(\d)\.norm2\.(.+)": r"classifier.decoder.\1.norm1.\2",
    r"transformer\.decoder\.layers\.(\d)\.norm3\.(.+)": r"classifier.decoder.\1.norm2.\2",
    r"transformer\.decoder\.norm\.(.+)": r"classifier.norm.\1",
    r"Wv\.(.+)": r"adjustment.value.\1",
}
# Hugging Face's CLIP and the adapters of adapter-transformers: after the tower (or "adapters"), by open_clip's names.
BLOCK = r"(?:text|vision)_model\.encoder\.layers\.(\d+)\."
CLIP = {
    r"text_model\.embeddings\.token_embedding\.weight": r"tower.token_embedding.weight",
    r"text_model\.embeddings\.position_embedding\.weight": r"tower.positional_embedding",
    r"text_model\.final_layer_norm\.(.+)": r"tower.ln_final.\1",
    r"text_projection\.weight": r"tower.text_projection",
    r"vision_model\.embeddings\.class_embedding": r"tower.visual.class_embedding",
    r"vision_model\.embeddings\.patch_embedding\.weight": r"tower.visual.conv1.weight",
    r"vision_model\.embeddings\.position_embedding\.weight": r"tower.visual.positional_embedding",
    r"vision_model\.pre_layrnorm\.(.+)": r"tower.visual.ln_pre.\1",
    r"vision_model\.post_layernorm\.(.+)": r"tower.visual.ln_post.\1",
    r"visual_projection\.weight": r"tower.visual.proj",
    BLOCK + r"layer_norm([12])\.(.+)": r"tower.transformer.resblocks.\1.ln_\2.\3",
    BLOCK + r"self_attn\.out_proj\.(.+)": r"tower.transformer.resblocks.\1.attn.out_proj.\2",
    BLOCK + r"self_attn\.in_proj_(.+)": r"tower.transformer.resblocks.\1.attn.in_proj_\2",
    BLOCK + r"mlp\.fc1\.(.+)": r"tower.transformer.resblocks.\1.mlp.c_fc.\2",
    BLOCK + r"mlp\.fc2\.(.+)": r"tower.transformer.resblocks.\1.mlp.c_proj.\2",
}
ADAPTERS = re.compile(BLOCK + r"(attention|output)_adapters\.adapters\.\w+\.adapter_(?:(down)\.0|(up))\.(weight|bias)")
# Each of DAR's CLIP copies, and where its adapters are; its frozen tower is that of the image or the recipe encoder.
COPIES = {
    "image_encoder": "image_encoder.adapters",
    "text_encoder.tfs.title": "recipe_encoder.adapters.title",
    "text_encoder.tfs.ingredients": "recipe_encoder.adapters.ingredients",
    "text_encoder.tfs.instructions": "recipe_encoder.adapters.instructions",
    "llama_text_encoder": "description_encoder.adapters",
    "sam_img_encoder": "segment_encoder.adapters",
}
MAIN = ("image_encoder.", "recipe_encoder.", "description_encoder.", "segment_encoder.")
OURS = (".mean", ".std", "adjustment.dictionary", "prior")  # no checkpoint has them


@dataclass(frozen=True)
class LoadedWeights:
    """What became of a checkpoint; its text is a line each of what was loaded, left over and not in it."""

    kind: str
    loaded: list[str]
    left_over: list[str]
    absent: list[str]

    def __str__(self) -> str:
        parts = Counter(name.split(".")[0] for name in self.loaded)
        lines = [f"{self.kind}: {', '.join(f'{part} ({n} weights)' for part, n in parts.items())} loaded"]
        for what, names in (("left over", self.left_over), ("not in it, left as they were", self.absent)):
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"{what}: {', '.join(names[:5]) or 'nothing'}{more}")
        return "\n".join(lines)


def load_published(system: System, path: Path) -> LoadedWeights:
    """Give a system the weights of a released checkpoint of H-T, of the debiasing paper or of DAR.

    Word ids must be those of the checkpoint's own vocabulary (parameter `vocab_file`). A classifier and a value map are
    loaded into a system that has them, whose classes must be in the order of the authors' class numbers; the ingredient
    dictionary is no part of a checkpoint.

    Args:
        path: as torch.save or safetensors write it.

    Raises:
        ValueError: in one line, a file that is no such checkpoint, or a weight that is missing or of another shape.
    """
    state = read_checkpoint(path)
    kind, ours, left_over = _renamed(state, path)
    method = "dar" if kind == "DAR" else "ht"
    if system.config.method != method:
        raise ValueError(f"{path}: a checkpoint of {kind}; set method to {method}")
    statistics = [OPENAI_CLIP_MEAN, OPENAI_CLIP_STD] if kind == "DAR" else [IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD]
    wanted = system.state_dict()
    loaded, absent = {}, []
    for name, weight in wanted.items():
        if name.endswith((".mean", ".std")) and name.startswith("image_encoder."):
            loaded[name] = 255 * torch.tensor(statistics[name.endswith(".std")])[:, None, None]
        elif name in ours:
            if ours[name].shape != weight.shape:
                shapes = f"{list(ours[name].shape)} in the checkpoint, {list(weight.shape)} here"
                raise ValueError(f"{path}: {name} is {shapes}; set the parameters that the checkpoint was trained with")
            loaded[name] = ours[name]
        else:
            absent.append(name)
    there = {name.split(".")[0] for name in ours if name in wanted}
    for name in absent:
        if not name.endswith((*OURS, "num_batches_tracked")) and (name.startswith(MAIN) or name.split(".")[0] in there):
            raise ValueError(
                f"{path}: {name} is not in this checkpoint of {kind}; the parameters ask for another system"
            )
    system.load_state_dict(wanted | loaded)
    unused = [name for name in ours if name not in wanted]
    return LoadedWeights(kind, list(loaded), sorted(left_over + unused), absent)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, DataParallel's `module.` dropped; nothing in the file is run.

    Raises:
        ValueError: in one line, no file, or not one of tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name a checkpoint (unpacked, where it came as .zip of a folder)")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with torch.serialization.safe_globals([(_Nothing, name) for name in _NUMBERS]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise many kinds, none of which names the file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise ValueError(f"{path}: not a checkpoint of tensors alone ({reason})") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no weights by name; give a checkpoint of H-T, the debiasing paper or DAR")
    return {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


class _Nothing:
    """In the place of NumPy's numbers beside the weights, such as the best score so far: nobody reads them."""

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


_NUMBERS = ["numpy.dtype", *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core"))]


def read_dictionary(path: Path, names: Sequence[str]) -> Tensor:
    """The debiasing paper's ingredient_dict_textual.pkl -> ingredient dictionary (K, E) float32.

    It holds, for each class number, the vectors of the training lines that mention it; their mean is the entry. What
    the numbers mean is said by the ing2label_topk*.pkl that lies beside it.

    Args:
        names: the K classes of the prepared data.

    Raises:
        DataError: refused, broken, or not of this form; a class that it lacks is named.
    """
    beside = sorted(path.parent.glob("ing2label_topk*.pkl"))
    if len(beside) != 1:
        raise DataError(f"{path}: {len(beside)} files ing2label_topk*.pkl beside it; put the authors' there")
    number, table = read_ing2label(beside[0]), read_plain_pickle(path)
    rows = []
    for name in names:
        if not (vectors := table.get(number.get(name))):
            raise DataError(
                f"{path}: no vectors of the class {name!a}; prepare the authors' pickles with {beside[0].name}"
            )
        try:
            array = np.array(vectors, np.float64)
        except (TypeError, ValueError):
            array = np.empty(0)
        if array.ndim != 2 or not np.isfinite(array).all() or (rows and len(rows[0]) != array.shape[1]):
            raise DataError(f"{path}: the class {name!a} has not a list of vectors of numbers, all of one length")
        rows.append(array.mean(0))
    return torch.from_numpy(np.stack(rows)).float()


# ---- names ----


def _renamed(state: dict[str, Tensor], path: Path) -> tuple[str, dict[str, Tensor], list[str]]:
    """Whose checkpoint it is, its weights by our names, and the names of the rest."""
    if any(key.startswith("text_encoder.tfs.title.text_model.") for key in state):
        ours, rest = _dar(state, path)
        return "DAR", ours, rest
    if "img_fc.weight" in state:
        kind, table = "the debiasing paper", RECIPE | DEBIASING
    elif "image_encoder.fc.weight" in state:
        kind, table = "H-T", RECIPE | HT
    else:
        raise ValueError(f"{path}: the names of its weights are not those of H-T, the debiasing paper or DAR")
    ours, rest = {}, []
    for key, value in state.items():
        name = _lookup(table, key)
        if name is None:
            rest.append(key)
        else:  # the head's weights are (1, K, d) and (1, K)
            ours[name] = value[0] if key in ("fc.W", "fc.b") else value
    return kind, ours, rest


def _lookup(table: dict[str, str], key: str) -> str | None:
    for pattern, name in table.items():
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    return None


def _dar(state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    ours: dict[str, Tensor] = {}
    rest, source = [], {}
    for key, value in _joined(state).items():
        copy = next((copy for copy in COPIES if key.startswith(f"{copy}.")), None)
        inner = key.removeprefix(f"{copy}.")
        if adapter := copy and ADAPTERS.fullmatch(inner):
            block, place, down, up, what = adapter.groups()
            name = f"{COPIES[copy]}.{down or up}.{2 * int(block) + (place == 'output')}.{what}"
        elif copy:
            vision = copy in ("image_encoder", "sam_img_encoder")
            name = _lookup(CLIP, inner)
            if name and vision:
                name = "image_encoder." + name.replace("tower.transformer", "tower.visual.transformer")
            elif name:
                name = "recipe_encoder." + name
        else:
            name = _lookup(RECIPE, key)
        if name is None:
            rest.append(key)
            continue
        if inner in ("text_projection.weight", "visual_projection.weight"):
            value = value.T.contiguous()
        if name in ours and not torch.equal(ours[name], value):
            raise ValueError(f"{path}: {key} and {source[name]} differ; here both encoders share one frozen tower")
        ours[name], source[name] = value, key
    return ours, rest


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value projections one above the other, as torch's own attention has them."""
    joined: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.+\.self_attn)\.([qkv])_proj\.(weight|bias)", key)
        parts = [f"{match[1]}.{part}_proj.{match[3]}" for part in "qkv"] if match else []
        if not match or not all(part in state for part in parts):
            joined[key] = value
        elif match[2] == "q":
            joined[f"{match[1]}.in_proj_{match[3]}"] = torch.cat([state[part] for part in parts])
    return joined
