"""A retrieval system: encoders, and the causal module where the parameters ask for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from recipe_lib.causal import BackdoorAdjustment, ingredient_weights, marginal_weights
from recipe_lib.classifier import IngredientClassifier
from recipe_lib.data.loading import RecipeBatch
from recipe_lib.encoders.captions import CaptionEncoder, CLIPImageEncoder, ZeroShotEncoder
from recipe_lib.encoders.clip import clip_towers
from recipe_lib.encoders.dar import DARImageEncoder, DARRecipeEncoder, DescriptionEncoder, SegmentEncoder
from recipe_lib.encoders.image import ImageEncoder
from recipe_lib.encoders.recipe import COMPONENTS, RecipeEncoder, RecipeFeatures
from recipe_lib.losses import posterior


@dataclass(frozen=True)
class Debiasing:
    """What is attached to a baseline.

    Args:
        classifier: train the ingredient classifier on the image features.
        weights: where z takes P(ing | image) from: "" (no z), "classifier", "labels" (the oracle), "marginal".
        dictionary: "learned", or the controls "shuffled" and "random".
        soft: keep every probability; else those below `threshold` are dropped before they are normalised.
        calibrated: turn the asymmetric-loss output into the probability that it stands for.
        normalise: bring Wv(D) to the length of the image embedding.
        gamma_neg, gamma_pos: of the asymmetric loss.
        classifier_dim, classifier_heads, classifier_feedforward: of the Query2Label transformer.
    """

    classifier: bool = False
    weights: str = ""
    dictionary: str = "learned"
    soft: bool = False
    threshold: float = 0.5
    calibrated: bool = False
    normalise: bool = False
    gamma_neg: float = 2.0
    gamma_pos: float = 0.0
    classifier_dim: int = 2048
    classifier_heads: int = 4
    classifier_feedforward: int = 8192


# Every variant starts from the same baseline checkpoint and trains as long as the others on the same batches.
VARIANTS: dict[str, Debiasing] = {
    "equal_compute": Debiasing(),
    "classifier_only": Debiasing(classifier=True),
    "debiased": Debiasing(classifier=True, weights="classifier"),
    "oracle": Debiasing(weights="labels"),
    "shuffled_dictionary": Debiasing(classifier=True, weights="classifier", dictionary="shuffled"),
    "random_dictionary": Debiasing(classifier=True, weights="classifier", dictionary="random"),
    "soft": Debiasing(classifier=True, weights="classifier", soft=True),
    "calibrated": Debiasing(classifier=True, weights="classifier", soft=True, calibrated=True),
    "normalised": Debiasing(classifier=True, weights="classifier", normalise=True),
    "marginal": Debiasing(classifier=True, weights="marginal"),
}


@dataclass(frozen=True)
class SystemConfig:
    """Architecture. Every value is a notebook parameter or a fact of the prepared data (vocabulary, num_classes).

    Args:
        encoders: "ht": a timm backbone and transformers over words; "clip": frozen CLIP towers with adapters;
            "captions": CLIP's towers alone, trained whole, a recipe read as one caption; "zero_shot": the same, a
            recipe read as the mean of its components.
        pretrained: load the published weights of the backbone, or the towers' weights `clip_pretrained`.
        embed_dim: D. CLIP brings its own: a system's config says that one, whatever it was built with.
        adapters: which encoders have them, those of photos, those of texts (descriptions too): "both", "image", "text"
            or "none".
        descriptions: "adapted" or "frozen": encode imagined descriptions, by adapters of their own or without any.
        segments: encode this many segments of each photo, at most as many as are stored.
        segment_encoder: "frozen", or "adapted": with adapters of its own.
    """

    vocabulary: int
    num_classes: int
    encoders: str = "ht"
    image_model: str = "resnet50"
    image_model_args: tuple[str, ...] = ()
    pretrained: bool = False
    embed_dim: int = 1024
    recipe_dim: int = 512
    recipe_layers: int = 2
    recipe_heads: int = 4
    recipe_feedforward: int = 2048
    dropout: float = 0.1
    clip_model: str = "ViT-B-16"
    clip_pretrained: str = ""
    adapters: str = "both"
    adapter_width: int = 64
    adapter_reduction: int = 0
    descriptions: str = ""
    segments: int = 0
    segment_encoder: str = "frozen"
    debiasing: Debiasing = field(default_factory=Debiasing)

    @property
    def recipe_transformer(self) -> dict:
        """Arguments of the recipe encoders' transformers."""
        names = ("layers", "heads", "feedforward")
        return {name: getattr(self, f"recipe_{name}") for name in names} | {"dropout": self.dropout}

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> SystemConfig:
        return cls(
            **values
            | {"debiasing": Debiasing(**values["debiasing"])}
            | {"image_model_args": tuple(values["image_model_args"])}
        )


class ImageFeatures(NamedTuple):
    """embedding (B, D): the photo alone; z (B, D): what the adjustment adds, or zeros; logits (B, K) or None."""

    embedding: Tensor
    z: Tensor
    logits: Tensor | None


class RetrievalSystem(nn.Module):
    """Photos and recipes into one space.

    Args:
        config: the architecture.
        dictionary: (K, E) ingredient dictionary; needed where `config.debiasing.weights` is set.
        prior: (K,) share of the training recipes that hold each ingredient; needed for weights "marginal".
    """

    def __init__(self, config: SystemConfig, dictionary: Tensor | None = None, prior: Tensor | None = None):
        super().__init__()
        self.config = config
        self.description_encoder = self.segment_encoder = None
        build = {"ht": self._build_ht, "clip": self._build_clip}
        build.get(config.encoders, self._build_towers)()
        dim = self.recipe_encoder.dim
        if config.encoders != "ht":
            self.config = config = replace(config, embed_dim=dim)
        # One projection for each ordered pair of components, used by the self-supervised loss alone.
        pairs = [(a, b) for a in COMPONENTS for b in COMPONENTS if a != b and config.encoders in ("ht", "clip")]
        self.projections = nn.ModuleDict({f"{a}_{b}": nn.Linear(dim, dim) for a, b in pairs})
        attached = config.debiasing
        self.classifier = self.adjustment = None
        if attached.classifier:
            self.classifier = IngredientClassifier(
                self.image_encoder.channels,
                config.num_classes,
                dim=attached.classifier_dim,
                heads=attached.classifier_heads,
                feedforward=attached.classifier_feedforward,
                dropout=config.dropout,
            )
        if attached.weights:
            if dictionary is None:
                dictionary = torch.zeros(config.num_classes, dim)  # filled by load_state_dict
            self.adjustment = BackdoorAdjustment(dictionary, config.embed_dim, normalise=attached.normalise)
        if attached.weights == "marginal":
            self.register_buffer("prior", torch.ones(config.num_classes) if prior is None else prior.clone())

    def _build_ht(self) -> None:
        config = self.config
        self.image_encoder = ImageEncoder(
            config.image_model, config.embed_dim, pretrained=config.pretrained, model_args=config.image_model_args
        )
        self.recipe_encoder = RecipeEncoder(
            config.vocabulary, config.embed_dim, dim=config.recipe_dim, **config.recipe_transformer
        )

    def _build_clip(self) -> None:
        config = self.config
        image, text = clip_towers(config.clip_model, pretrained=config.clip_pretrained, load=config.pretrained)
        none = {"width": 0}
        own = {"width": config.adapter_width, "reduction": config.adapter_reduction}
        photos, texts = (own if config.adapters in ("both", side) else none for side in ("image", "text"))
        self.image_encoder = DARImageEncoder(image, **photos)
        self.recipe_encoder = DARRecipeEncoder(text, **texts, **config.recipe_transformer)
        if config.descriptions:
            self.description_encoder = DescriptionEncoder(text, **(texts if config.descriptions == "adapted" else none))
        if config.segments:
            self.segment_encoder = SegmentEncoder(image, **(photos if config.segment_encoder == "adapted" else none))

    def _build_towers(self) -> None:
        model, weights, load = self.config.clip_model, self.config.clip_pretrained, self.config.pretrained
        image, text = clip_towers(model, pretrained=weights, load=load, frozen=False)
        read = {"captions": CaptionEncoder, "zero_shot": ZeroShotEncoder}[self.config.encoders]
        self.image_encoder, self.recipe_encoder = CLIPImageEncoder(image), read(text)

    def encode_images(self, images: Tensor, labels: Tensor | None = None) -> ImageFeatures:
        """(B, 3, H, W) uint8 -> ImageFeatures. `labels` (B, K) are read by the oracle and by nothing else."""
        features = self.image_encoder.features(images)
        embedding = self.image_encoder.embed(features)
        logits = None
        if self.classifier is not None:
            # On a CPU bfloat16 gains nothing at the kitchen's size, so logits keep their digits there.
            with torch.autocast("cpu", enabled=False):
                logits = self.classifier(self.image_encoder.feature_map(features).float())
        z = torch.zeros_like(embedding)
        if self.adjustment is not None:
            z = self.adjustment(embedding, self.weights(logits, labels, len(embedding)).to(embedding.dtype))
        return ImageFeatures(embedding, z, logits)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K) logits -> P(ing | image) as the parameters want it."""
        attached = self.config.debiasing
        if attached.calibrated:
            return posterior(logits.float(), attached.gamma_neg, attached.gamma_pos)
        return torch.sigmoid(logits.float())

    def weights(self, logits: Tensor | None, labels: Tensor | None, rows: int) -> Tensor:
        """(B, K) weights of the expectation over ingredients."""
        attached = self.config.debiasing
        if attached.weights == "marginal":
            return marginal_weights(self.prior, rows)
        if attached.weights == "labels":
            if labels is None:
                raise ValueError("the oracle needs the true labels of each photo's recipe")
            return ingredient_weights(labels.float())
        return ingredient_weights(self.probabilities(logits), 0.0 if attached.soft else attached.threshold)

    def encode_recipes(self, recipes: RecipeBatch) -> RecipeFeatures:
        # On a CPU no bfloat16: no two batches have one number of words, and oneDNN builds its kernels anew for each
        # (measured on 650 real recipes: two minutes of the first epoch).
        with torch.autocast("cpu", enabled=False):
            return self.recipe_encoder(recipes)

    def encode_descriptions(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 ids of CLIP -> (B, D)."""
        with torch.autocast("cpu", enabled=False):
            return self.description_encoder(tokens)

    def encode_segments(self, segments: Tensor, mask: Tensor) -> Tensor:
        """(B, n, E) features or (B, n, 3, S, S) uint8 pixels of segments, mask (B, n) -> (B, D)."""
        return self.segment_encoder(segments, mask)

    def self_supervised_loss(self, features: RecipeFeatures, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Mean over the ordered pairs of components of the loss between one and the projection of the other."""
        part = dict(zip(COMPONENTS, features.components, strict=True))
        losses = [
            loss(part[a], self.projections[f"{a}_{b}"](part[b])) for a in COMPONENTS for b in COMPONENTS if a != b
        ]
        return torch.stack(losses).mean()


def attach(
    baseline: RetrievalSystem, debiasing: Debiasing, dictionary: Tensor | None = None, prior: Tensor | None = None
) -> RetrievalSystem:
    """A new system with the baseline's weights and the debiasing modules on top, freshly initialised.

    Raises:
        RuntimeError: the baseline lacks a weight that is not part of what is attached.
    """
    # The weights come from the baseline: fetching the backbone's published ones again would be waste.
    config = replace(baseline.config, debiasing=debiasing, pretrained=False)
    system = RetrievalSystem(config, dictionary, prior)
    fresh = {k: v for k, v in system.state_dict().items() if k.startswith(("classifier.", "adjustment.", "prior"))}
    system.load_state_dict(baseline.state_dict() | fresh)
    return system


def bare_towers(system: RetrievalSystem, encoders: str = "captions") -> RetrievalSystem:
    """The CLIP towers of a system, without what the study put on them.

    The new system has its own copy; `set_towers` puts one back.

    Args:
        encoders: "captions", how towers are trained, or "zero_shot", how DAR scores them.
    """
    bare = replace(
        system.config, encoders=encoders, pretrained=False, descriptions="", segments=0, debiasing=Debiasing()
    )
    towers = RetrievalSystem(bare)
    set_towers(towers, system)
    return towers


def set_towers(system: RetrievalSystem, source: RetrievalSystem) -> None:
    """Give a system the weights of another one's CLIP towers."""
    for side in ("image_encoder", "recipe_encoder"):
        getattr(system, side).tower.load_state_dict(getattr(source, side).tower.state_dict())


def parameter_table(model: nn.Module, depth: int = 2) -> pd.DataFrame:
    """Trainable and frozen parameters of each part, one shared by several counted once; the last row is the sum.

    Args:
        depth: parts are the first `depth` names of a parameter's path.
    """
    counts = {True: Counter(), False: Counter()}
    for name, parameter in model.named_parameters():
        counts[parameter.requires_grad][".".join(name.split(".")[:depth])] += parameter.numel()
    parts = dict.fromkeys(".".join(name.split(".")[:depth]) for name, _ in model.named_parameters())
    table = pd.DataFrame({"trainable": counts[True], "frozen": counts[False]}, index=list(parts)).fillna(0).astype(int)
    table.loc["total"] = table.sum()
    return table
