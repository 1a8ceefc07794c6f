"""CLIP towers that several encoders share, each with its own bottleneck adapters (Houlsby et al., arXiv:1902.00751).

A frozen tower is there once, however many encoders read through it: what differs between them is given to its forward.
Models and weights are those of open_clip; the JSON files beside this one add models of our own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipe_lib.encoders.packed import Block, Packing

if TYPE_CHECKING:
    import open_clip  # it takes seconds, which those who have no CLIP need not wait for

LOCAL = Path(__file__).parent


class Adapters(nn.Module):
    """x + up(relu(down(x))) after the attention and after the MLP of each block.

    Weights start at std .02, biases at 0: the paper does not say, so as the adapter library of DAR's released code does
    ("bert"). That is near the identity, not the identity.

    Args:
        dim: width of the tower.
        blocks: its residual blocks.
        width: of the bottleneck (64 in DAR's paper).
        reduction: where not 0, the bottleneck is dim // reduction wide (4 in DAR's released code).

    Shape:
        place, x (..., dim) -> (..., dim); place 2i is after the attention of block i, 2i + 1 after its MLP.
    """

    def __init__(self, dim: int, blocks: int, *, width: int = 64, reduction: int = 0):
        super().__init__()
        width = dim // reduction if reduction else width
        self.down = nn.ModuleList(nn.Linear(dim, width) for _ in range(2 * blocks))
        self.up = nn.ModuleList(nn.Linear(width, dim) for _ in range(2 * blocks))
        for layer in (*self.down, *self.up):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, place: int, x: Tensor) -> Tensor:
        return x + self.up[place](F.relu(self.down[place](x)))


class Tower(nn.Module):
    """What the image and the text tower have in common.

    Args:
        transformer: open_clip's, with `resblocks`.
        dim: E, width of CLIP's joint space.
        frozen: no gradients, and eval mode always. Adapters train even so; without them no graph is kept.
    """

    def __init__(self, transformer: nn.Module, dim: int, frozen: bool):
        super().__init__()
        self.width, self.depth = transformer.width, len(transformer.resblocks)
        self.dim, self.frozen = dim, frozen

    def train(self, mode: bool = True) -> Tower:
        return super().train(mode and not self.frozen)

    def adapters(self, width: int = 64, reduction: int = 0) -> Adapters | None:
        """New ones that fit; None where width and reduction are both 0."""
        return Adapters(self.width, self.depth, width=width, reduction=reduction) if width or reduction else None

    def _freeze(self) -> None:
        if self.frozen:
            self.requires_grad_(False).eval()


def _run(
    transformer: nn.Module, x: Tensor, adapters: Adapters | None, attend: Callable, only: Tensor | None = None
) -> Tensor:
    """x (..., width) through the residual blocks, block by block: the adapters go in before each residual sum.

    Args:
        attend: block, normed x and `only` or None -> what the block's attention gives.
        only: rows of x that alone are asked for; the others are spared what they would cost in the last block.
    """
    adapt = _unchanged if adapters is None else adapters
    for i, block in enumerate(transformer.resblocks):
        rows = only if i == len(transformer.resblocks) - 1 else None
        part = block.ls_1(attend(block, block.ln_1(x), rows))
        x = (x if rows is None else x[rows]) + adapt(2 * i, part)
        x = x + adapt(2 * i + 1, block.ls_2(block.mlp(block.ln_2(x))))
    return x


def _attend_by_itself(block: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of open_clip's own kind, for normed queries or scaled heads: (N, L, width) -> (N, L, width)."""
    return block.ln_attn(block.attn(x, attn_mask=mask))


def _attend(block: nn.Module, x: Tensor, _: None) -> Tensor:
    """Attention among all tokens: (N, L, width) -> (N, L, width)."""
    if not isinstance(block.attn, nn.MultiheadAttention):
        return _attend_by_itself(block, x)
    # On a CPU torch's fused attention is slow on few patches, backwards ten times slower than the plain one.
    plain = x.device.type == "cpu" and x.shape[1] <= 80
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        x = x if block.attn.batch_first else x.transpose(0, 1)
        x = block.attn(x, x, x, need_weights=False)[0]
        return x if block.attn.batch_first else x.transpose(0, 1)


def _unchanged(place: int, x: Tensor) -> Tensor:
    return x


class ImageTower(Tower):
    """Vision transformer of a CLIP model.

    Shape:
        images (B, 3, S, S) uint8 -> tokens (B, 1 + N, width), the class token first; `pool`: tokens -> (B, E);
        `patches`: tokens -> (B, width, h, w).

    Raises:
        ValueError: S is not the model's image size.
    """

    def __init__(self, visual: open_clip.transformer.VisionTransformer, preprocess: dict, frozen: bool = True):
        super().__init__(visual.transformer, visual.output_dim, frozen)
        self.visual = visual
        self.size, self.interpolation = visual.image_size, preprocess["interpolation"]
        # The statistics belong to the weights: a buffer goes where the weights go, and is saved with them.
        self.register_buffer("mean", 255 * torch.tensor(preprocess["mean"])[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(preprocess["std"])[:, None, None])
        self._freeze()

    def forward(self, images: Tensor, adapters: Adapters | None = None) -> Tensor:
        if images.shape[-2:] != self.size:
            raise ValueError(
                f"photos of {tuple(images.shape[-2:])}, but this CLIP reads {self.size}: set crop_size to it"
            )
        visual = self.visual
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        x = visual.conv1(x).flatten(2).transpose(1, 2)  # (B, N, width)
        start = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([start, x], 1) + visual.positional_embedding.to(x.dtype)
        return _run(visual.transformer, visual.ln_pre(visual.patch_dropout(x)), adapters, _attend)

    def pool(self, tokens: Tensor) -> Tensor:
        visual = self.visual
        if visual.pool_type == "tok":
            pooled = visual.ln_post(tokens[:, 0])
        elif visual.final_ln_after_pool:
            pooled = visual.ln_post(tokens[:, 1:].mean(1))
        else:
            pooled = visual.ln_post(tokens[:, 1:]).mean(1)
        return pooled @ visual.proj

    def patches(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, 1:] if self.visual.final_ln_after_pool else self.visual.ln_post(tokens[:, 1:])
        return patches.transpose(1, 2).unflatten(2, self.visual.grid_size)


class TextTower(Tower):
    """Causal text transformer of a CLIP model; attribute names are open_clip's, so its checkpoints fit.

    Shape:
        tokens (N, L) int64 as `clip_tokens` gives them -> (N, E).

    Raises:
        ValueError: L is more than the model's context.
    """

    def __init__(self, clip: open_clip.CLIP, frozen: bool = True):
        super().__init__(clip.transformer, clip.text_projection.shape[1], frozen)
        self.token_embedding, self.positional_embedding = clip.token_embedding, clip.positional_embedding
        self.transformer, self.ln_final = clip.transformer, clip.ln_final
        self.text_projection = clip.text_projection
        self.context = clip.context_length
        self.register_buffer("mask", clip.attn_mask, persistent=False)
        self._freeze()

    def forward(self, tokens: Tensor, adapters: Adapters | None = None) -> Tensor:
        if tokens.shape[1] > self.context:
            raise ValueError(f"texts of {tokens.shape[1]} tokens, but this CLIP reads {self.context} at most")
        # The end of the text has the highest id. Zeros do not tell where it is: 0 is padding, but also a "!".
        end = tokens.argmax(1)
        real = torch.arange(int(end.max()) + 1, device=end.device) <= end[:, None]
        # Nothing is computed for what comes after the end, but for the scores of attention.
        packing = Packing.of(real, one_grid=True)
        places = F.embedding(packing.column, self.positional_embedding)
        x = self.token_embedding(tokens[:, : real.shape[1]][real]) + places  # (T, width)
        attend = partial(self._attend, grid=packing.blocks[0])
        x = _run(self.transformer, x, adapters, attend, (end + 1).cumsum(0) - 1)
        return self.ln_final(x) @ self.text_projection

    def _attend(self, block: nn.Module, x: Tensor, ends: Tensor | None, grid: Block) -> Tensor:
        """(T, width), the real tokens of N texts -> the same of all of them, or (N, width) of their ends."""
        attention = block.attn
        if not isinstance(attention, nn.MultiheadAttention):
            x = grid.flat(_attend_by_itself(block, grid.grid(x), self.mask[: grid.length, : grid.length]))
            return x if ends is None else x[ends]
        weights = attention.in_proj_weight, attention.in_proj_bias
        heads = attention.num_heads
        if ends is None:
            q, k, v = (
                grid.grid(F.linear(x, *weights)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            )  # (N, H, L, d)
        else:
            (ask, tell), (ask_bias, tell_bias) = (w.split([self.width, 2 * self.width]) for w in weights)
            q = F.linear(x[ends], ask, ask_bias).unflatten(1, (heads, 1, -1))
            k, v = grid.grid(F.linear(x, tell, tell_bias)).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        # Fused on CPUs too, unlike in `_attend`: as fast here, where hardly a gradient goes through it.
        # No real token comes after one that is not: the causal mask hides padding too.
        how = {"is_causal": True} if ends is None else {"attn_mask": grid.mask}
        values = F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2).flatten(2)  # (N, L or 1, width)
        return attention.out_proj(grid.flat(values) if ends is None else values[:, 0])


def clip_towers(
    model: str, *, pretrained: str = "", frozen: bool = True, load: bool = True
) -> tuple[ImageTower, TextTower]:
    """Both towers of a CLIP model.

    Args:
        model: open_clip model name, such as "ViT-B-16", or "kitchen-clip-small", ours.
        pretrained: tag of published weights ("openai", "laion2b_s34b_b88k", ...), a checkpoint file (as `save_clip` or
            open_clip writes it), or "" for random weights. A tag brings its activation and its preprocessing along.
        frozen: see `Tower`.
        load: False builds what those weights fit, for weights that come from elsewhere.

    Raises:
        ValueError: no such model or weights, or a kind of model that has no such towers.
        ConnectionError: the weights cannot be fetched.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg

    config = _config(model)
    published = open_clip.get_pretrained_cfg(model, pretrained) if pretrained else {}
    if published:
        config["quick_gelu"] = published.get("quick_gelu", False)  # open_clip only warns where they differ
    elif pretrained and load and not Path(pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ValueError(
            f"clip_pretrained {pretrained!r}: neither a file nor weights of {model} ({', '.join(tags) or '-'})"
        )
    clip = open_clip.CLIP(**config)
    if pretrained and load:
        open_clip.load_checkpoint(clip, _fetch(model, pretrained, published) if published else pretrained)
    standard = PreprocessCfg()
    preprocess = {"mean": standard.mean, "std": standard.std, "interpolation": standard.interpolation} | published
    return ImageTower(clip.visual, preprocess, frozen), TextTower(clip, frozen)


def clip_image_size(model: str) -> int:
    """Side of the square that a model's image tower reads, pixels; ValueError as `clip_towers`."""
    size = _config(model)["vision_cfg"]["image_size"]
    if not isinstance(size, int):
        raise ValueError(f"clip_model {model!r} reads photos of {size}; choose one that reads squares")
    return size


def save_clip(path: Path | str, image: ImageTower, text: TextTower) -> None:
    """A checkpoint that `clip_towers` and open_clip read. The file's end is .safetensors."""
    state = {f"visual.{k}": v for k, v in image.visual.state_dict().items()} | text.state_dict()
    state["logit_scale"] = torch.tensor(math.log(1 / 0.07))  # open_clip asks for it
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, path)


def _config(model: str) -> dict:
    path = LOCAL / f"{model}.json"
    if path.is_file():
        return json.loads(path.read_text())
    import open_clip

    if model not in open_clip.list_models():
        near = [name for name in open_clip.list_models() if name.lower().startswith(model.lower()[:5])][:5]
        raise ValueError(
            f"clip_model {model!r}: open_clip has no such model{'; near: ' + ', '.join(near) if near else ''}"
        )
    config = open_clip.get_model_config(model)
    vision, text = config["vision_cfg"], config["text_cfg"]
    kinds = {
        "a timm image tower": "timm_model_name" in vision,
        "a ResNet image tower": isinstance(vision.get("layers"), list),
        "a captioning head (CoCa)": "multimodal_cfg" in config,
        "a Hugging Face text tower": "hf_model_name" in text,
        "a text tower without CLIP's own tokenizer": "hf_tokenizer_name" in text,
        "attention in place of pooling": vision.get("attentional_pool"),
    }
    if unsuitable := [kind for kind, present in kinds.items() if present]:
        raise ValueError(
            f"clip_model {model!r} has {unsuitable[0]}: adapters are for vision transformers with CLIP's text tower"
        )
    return config


def _fetch(model: str, pretrained: str, published: dict) -> str:
    import open_clip

    try:
        return open_clip.download_pretrained(published)
    except Exception as error:  # the hub client raises many kinds, none of which says what to do
        raise ConnectionError(
            f"clip_pretrained {pretrained}: the weights of {model} cannot be fetched "
            f"({str(error).splitlines()[0][:120]}); connect once so that they are cached, or give a checkpoint file"
        ) from error
