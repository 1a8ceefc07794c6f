"""Photo encoder: any timm backbone, one linear layer, tanh (H-T, arXiv:2103.13061)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import timm
import torch
import yaml
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from recipe_lib.encoders.weights import load_weights

# Mean and standard deviation of photos in [0, 1], for weights that were trained on other ones than timm says.
NORMALISATIONS = {"imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), "half": ((0.5,) * 3, (0.5,) * 3)}


class ImageEncoder(nn.Module):
    """Backbone -> pooled feature -> Linear -> tanh.

    Args:
        model: timm model name, such as "resnet50" or "vit_base_patch16_224".
        embed_dim: D, width of the joint space.
        pretrained: load the weights that timm publishes for the model.
        weights: a local file of weights that it starts from, see `weights.weight_file`; "" for none.
        model_args: further arguments of `timm.create_model`, each as YAML "key: value".
        normalisation: statistics that photos are normalised with: those of the "model", "imagenet" or "half".
        frozen: names of the backbone's modules or parameters that do not train, or "all" of it. What is frozen is
            always in evaluation mode: the statistics of its BatchNorm stay, and it drops nothing.

    Shape:
        images (B, 3, H, W) uint8 -> `features` (B, C, h, w) -> `embed` (B, D). Images of any other type are features
        already: a frozen backbone need not see a photo twice.

    Raises:
        ValueError: timm has no such model, or not these arguments; the backbone has no such part, or other weights.
        ConnectionError: the weights cannot be fetched.
    """

    def __init__(
        self,
        model: str,
        embed_dim: int,
        *,
        pretrained: bool = False,
        weights: str = "",
        model_args: Sequence[str] = (),
        normalisation: str = "model",
        frozen: Sequence[str] = (),
    ):
        super().__init__()
        self.backbone = _create(model, pretrained, model_args).to(memory_format=torch.channels_last)
        if weights:
            print(load_weights(self.backbone, weights))
        self.channels = self.backbone.num_features  # C, of the feature map
        self.frozen = tuple(frozen)
        for part in _parts(self.backbone, self.frozen):
            part.requires_grad_(False)
        pooled = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        self.fc = nn.Linear(pooled, embed_dim)
        # The statistics belong to the weights: a buffer goes where the weights go, and is saved with them.
        config = self.backbone.pretrained_cfg
        mean, std = NORMALISATIONS.get(normalisation, (config["mean"], config["std"]))
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None])
        self.train()

    def train(self, mode: bool = True) -> ImageEncoder:
        """As of any module, but what is frozen stays in evaluation mode."""
        super().train(mode)
        for part in _parts(self.backbone, self.frozen):
            if isinstance(part, nn.Module):
                part.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Unpooled features: maps (B, C, h, w) of a CNN, tokens (B, N, C) of a transformer."""
        if images.dtype != torch.uint8:
            return images.to(self.mean.dtype)
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        return self.backbone.forward_features(x.contiguous(memory_format=torch.channels_last))

    def embed(self, features: Tensor) -> Tensor:
        """(B, D) in (-1, 1)."""
        pooled = self.backbone.forward_head(features, pre_logits=True)
        return torch.tanh(self.fc(pooled))

    def feature_map(self, features: Tensor) -> Tensor:
        """(B, C, h, w) whatever the backbone: class tokens dropped, patch tokens laid on their grid."""
        if features.ndim == 3:
            patches = features[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
            side = int(patches.shape[1] ** 0.5)
            return patches.transpose(1, 2).unflatten(2, (side, -1))
        if features.shape[1] != self.channels:  # NHWC, as Swin gives it
            features = features.permute(0, 3, 1, 2)
        return features

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(self.features(images))


def check_frozen(model: str, model_args: Sequence[str], frozen: Sequence[str]) -> None:
    """ValueError where `ImageEncoder` would raise one for these parts; without memory for weights."""
    with torch.device("meta"):
        _parts(_create(model, False, model_args), frozen)


def _parts(backbone: nn.Module, names: Sequence[str]) -> list[nn.Module | nn.Parameter]:
    parts = dict(backbone.named_modules()) | dict(backbone.named_parameters()) | {"all": backbone}
    for name in names:
        if not name or name not in parts:
            top = [child for child, _ in (*backbone.named_children(), *backbone.named_parameters(recurse=False))]
            inner = difflib.get_close_matches(name, [part for part in parts if "." in part], 3)
            raise ValueError(
                f"frozen {name!r}: the photo backbone has no such part; it has all, {', '.join(top + inner)} ..."
            )
    return [parts[name] for name in names]


def _create(model: str, pretrained: bool, model_args: Sequence[str]) -> nn.Module:
    if not timm.is_model(model):
        near = timm.list_models(f"*{model.split('.')[0][:6]}*")[:5]
        raise ValueError(f"image_model {model!r}: timm has no such model{'; near: ' + ', '.join(near) if near else ''}")
    options: dict = {}
    for argument in model_args:
        pair = yaml.safe_load(argument)
        if not isinstance(pair, dict):
            raise ValueError(f'image_model_args {argument!r}: write "key: value"')
        options |= pair
    try:
        return timm.create_model(model, pretrained=pretrained, num_classes=0, **options)
    except TypeError as error:
        raise ValueError(f"image_model_args {list(model_args)}: {model} does not take them ({error})") from None
    except Exception as error:  # the hub client raises many kinds, none of which says what to do
        if not pretrained:
            raise
        raise ConnectionError(
            f"pretrained: true, but the weights of {model} cannot be fetched ({str(error).splitlines()[0][:120]}); "
            "connect once so that they are cached, or set pretrained: false"
        ) from error
