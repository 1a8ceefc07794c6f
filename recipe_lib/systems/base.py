"""What every retrieval system offers: photos and recipes into one space, losses for each player, the causal module.

A subclass in a file of its own builds the encoders (`build`) and, where it trains on more than photo against recipe,
says so (`sides`, `pairs`, `losses`, `players`). The causal module attaches to any of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from recipe_lib.causal.adjustment import BackdoorAdjustment, ingredient_weights, marginal_weights
from recipe_lib.causal.classifier import IngredientClassifier
from recipe_lib.causal.debiasing import Debiasing
from recipe_lib.data.loading import Batch, RecipeBatch
from recipe_lib.encoders.chunks import in_chunks
from recipe_lib.encoders.recipe import COMPONENTS, RecipeFeatures
from recipe_lib.losses import asymmetric_loss, posterior

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SystemConfig:
    """Architecture. Every value is a notebook parameter or a fact of the prepared data (vocabulary, num_...).

    Args:
        num_categories: kinds of dishes; 0 where the study has none.
        method: name of the system; see `registry`.
        system_file: Python file that holds it, where it is not one of this package; else "".
        system_args: what that system alone reads, each as YAML "key: value"; see `System.args`.
        pretrained: load the published weights of the backbone, or the towers' weights `clip_pretrained`.
        image_weights: local file, or package, whose weights the backbone starts from; see `encoders.weights`.
        image_normalisation, frozen: of the backbone; see `ImageEncoder`.
        frozen_views: of each photo, which a frozen backbone reads once and for all; 0: it reads photos at every step.
        sentence_model: folder, or package, of a frozen sentence encoder; see `encoders.sentence`.
        embed_dim: D. CLIP brings its own: a system's config says that one, whatever it was built with.
        adapters: which encoders have them, those of photos, those of texts (descriptions too): "both", "image", "text"
            or "none".
        descriptions: "adapted" or "frozen": encode imagined descriptions, by adapters of their own or without any.
        segments: encode this many segments of each photo, at most as many as are stored.
        segment_encoder: "frozen", or "adapted": with adapters of its own.
    """

    vocabulary: int
    num_classes: int
    num_categories: int = 0
    method: str = "ht"
    system_file: str = ""
    system_args: tuple[str, ...] = ()
    image_model: str = "resnet50"
    image_model_args: tuple[str, ...] = ()
    pretrained: bool = False
    image_weights: str = ""
    image_normalisation: str = "model"
    frozen: tuple[str, ...] = ()
    frozen_views: int = 0
    embed_dim: int = 1024
    sentence_model: str = ""
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

    @classmethod
    def gather(cls, parameters: Mapping[str, Any], **facts: Any) -> SystemConfig:
        """From a notebook's parameters, by name; `facts` win."""
        named = {f.name: parameters[f.name] for f in fields(cls) if f.name in parameters}
        return cls.from_dict(named | facts)

    @property
    def photo_backbone(self) -> dict:
        """Further arguments of an `ImageEncoder`."""
        own = {"model_args": self.image_model_args, "normalisation": self.image_normalisation, "frozen": self.frozen}
        return own | {"pretrained": self.pretrained, "weights": self.image_weights}

    @property
    def recipe_transformer(self) -> dict:
        """Arguments of the recipe encoders' transformers."""
        names = ("layers", "heads", "feedforward")
        return {name: getattr(self, f"recipe_{name}") for name in names} | {"dropout": self.dropout}

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SystemConfig:
        """From what `to_dict` gave, or JSON made of it."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        if isinstance(values.get("debiasing"), Mapping):
            values["debiasing"] = Debiasing.from_dict(values["debiasing"])
        return cls(**values)


class ImageFeatures(NamedTuple):
    """embedding (B, D): the photo alone; z (B, D): what the adjustment adds, or zeros; logits (B, K) or None.

    features: what `image_encoder.features` gave.
    """

    embedding: Tensor
    z: Tensor
    logits: Tensor | None
    features: Tensor | None = None


class Encoded(NamedTuple):
    """What encoding makes of a step, row for row.

    components (B, E) and sides (B, D) meet the rows of all devices; image: without features, and the losses of single
    rows, (B,) by name, stay on this one. Of text-only recipes there are components alone.
    """

    components: tuple[Tensor, ...]
    sides: dict[str, Tensor]
    image: ImageFeatures | None
    rows: dict[str, Tensor]


class Step(NamedTuple):
    """One step of training, as a system's losses see it.

    Args:
        batch: this device's share of the pairs, or of text-only recipes.
        loss: between two sides, (B, D) each, row for row -> scalar; with the margin of this epoch.
        weight: of a loss, by its name; where it is 0 the loss is not asked for.
        gather: (B / world, D) parts -> (B, D), the rows of all devices with gradients; call it once, after all
            encoding: graphs of encoders differ with the lengths of sentences, collectives must not.
        log: figures of this step, by name, for the history.
        player: whose losses are asked for.
        epoch: passes over the training pairs so far, a fraction included.
        margin, mining: what `loss` is made with, for losses that a system brings.
        chunk: rows that are encoded at a time; 0: all. See `encoders.chunks`.
        shared: what the players of one step leave for those after them.
    """

    batch: Batch
    loss: Callable[[Tensor, Tensor], Tensor]
    weight: Callable[[str], float]
    gather: Callable[..., tuple[Tensor, ...]]
    log: Callable[[dict[str, Tensor]], None]
    player: str = "main"
    epoch: float = 0.0
    margin: float = 0.3
    mining: str = "all"
    chunk: int = 0
    shared: dict[str, Any] | None = None


class System(nn.Module, ABC):
    """Photos and recipes into one space.

    Args:
        config: the architecture.
        dictionary: (K, E) ingredient dictionary; needed where `config.debiasing.weights` is set.
        prior: (K,) share of the training recipes that hold each ingredient; needed for weights "marginal".
        seen: (K,) how well each class can be told from photos, 0..1: where `config.debiasing.visible` and nobody knows
            what shows, the classifier is asked for each by that weight.

    Attributes:
        pairs: loss -> the two sides that it compares; see `sides`.
        half_of_a_kind: half of each training batch are pairs of one category.
        objectives: modules that serve training alone (critics, generators ...); not among the saved weights.
        frozen: names of the parameters that never train.
        defaults: what `config.system_args` may set, with its default.
        args: the same with what is set.
    """

    pairs: ClassVar[dict[str, tuple[str, str]]] = {"retrieval": ("image", "recipe")}
    defaults: ClassVar[dict[str, Any]] = {}
    half_of_a_kind: ClassVar[bool] = False

    def __init__(
        self,
        config: SystemConfig,
        dictionary: Tensor | None = None,
        prior: Tensor | None = None,
        seen: Tensor | None = None,
    ):
        super().__init__()
        self.config = config
        self.args = self.defaults | self._given_args()
        self.objectives = nn.ModuleDict()
        self.build()
        config, dim = self.config, self.recipe_encoder.dim
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
        if attached.visible:
            self.register_buffer("seen", torch.ones(config.num_classes) if seen is None else seen.clone())
        every = self.named_parameters(remove_duplicate=False)
        self.frozen = frozenset(name for name, parameter in every if not parameter.requires_grad)

    def frozen_state(self) -> dict[str, Tensor]:
        """The part of `state_dict` that no training changes."""
        return {name: value for name, value in self.state_dict().items() if name in self.frozen}

    def trained_state(self) -> dict[str, Tensor]:
        """The rest of `state_dict`."""
        return {name: value for name, value in self.state_dict().items() if name not in self.frozen}

    def _given_args(self) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for argument in self.config.system_args:
            pair = yaml.safe_load(argument)
            if not isinstance(pair, dict) or not pair.keys() <= self.defaults.keys():
                known = ", ".join(self.defaults) or "none"
                raise ValueError(f'system_args {argument!r}: write "key: value"; {self.config.method} has {known}')
            given |= pair
        return given

    @abstractmethod
    def build(self) -> None:
        """Make the encoders.

        `image_encoder` has `features` (photos -> any), `embed` (features -> (B, D)), `feature_map` (features ->
        (B, C, h, w)) and `channels` (C); `recipe_encoder` is called with a RecipeBatch and has `encode_sentences` and
        `dim`; see `encoders`. A system that takes another D than `config.embed_dim` corrects `config`.
        """

    @property
    def reads(self) -> frozenset[str]:
        """What a batch must hold besides photos, recipes and labels: "category", "descriptions", "segments"."""
        return frozenset()

    # ---- what evaluation asks for ----

    def encode_images(self, batch: Batch) -> ImageFeatures:
        """Photos (B, 3, H, W) uint8 -> ImageFeatures. Labels (B, K) are read by the oracle and by nothing else."""
        features = self.image_encoder.features(batch.images)
        embedding = self.image_encoder.embed(features)
        logits = None
        if self.classifier is not None:
            # On a CPU bfloat16 gains nothing at the kitchen's size, so logits keep their digits there.
            with torch.autocast("cpu", enabled=False):
                logits = self.classifier(self.image_encoder.feature_map(features).float())
        z = torch.zeros_like(embedding)
        if self.adjustment is not None and self.config.debiasing.sides != "text":
            told = batch.visible if self.config.debiasing.weights == "visible" else batch.labels
            z = self.adjustment(embedding, self.weights(logits, told, len(embedding)).to(embedding.dtype))
        return ImageFeatures(embedding, z, logits, features)

    def encode_recipes(self, recipes: RecipeBatch) -> RecipeFeatures:
        """Recipes -> embedding (B, D) and components (B, E)."""
        # On a CPU no bfloat16: no two batches have one number of words, and oneDNN builds its kernels anew for each
        # (measured on 650 real recipes: two minutes of the first epoch).
        with torch.autocast("cpu", enabled=False):
            return self.recipe_encoder(recipes)

    def adjusted_recipes(self, embedding: Tensor, labels: Tensor | None) -> Tensor:
        """Recipes (B, D) with the mean vector of their own ingredients, labels (B, K), where z is on their side too."""
        if self.adjustment is None or self.config.debiasing.sides == "image":
            return embedding
        return embedding + self.adjustment(embedding, ingredient_weights(labels.to(embedding.dtype)))

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
        if attached.weights in ("labels", "visible"):
            if labels is None:
                what = {"labels": "ingredients", "visible": "ingredients that show"}[attached.weights]
                raise ValueError(f"the oracle needs the true {what} of each photo's recipe")
            return ingredient_weights(labels.float())
        return ingredient_weights(self.probabilities(logits), 0.0 if attached.soft else attached.threshold)

    # ---- what training asks for ----

    def players(self) -> dict[str, list[nn.Parameter]]:
        """Who plays, in the order of their turns, each with what it trains and an optimizer of its own."""
        return {"main": [parameter for parameter in self.parameters() if parameter.requires_grad]}

    def sides(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Embeddings (B, D) of this device's pairs, by name, besides "image" and "recipe"; those of no loss cost."""
        return {}

    def train_parts(self, backbone: bool, rest: bool) -> None:
        """Which of the two trains from now on, the photo backbone or all else; the other stands as if frozen.

        What never trains stays as it is.
        """
        for name, parameter in self.named_parameters():
            if name not in self.frozen:
                parameter.requires_grad_(backbone if name.startswith("image_encoder.backbone.") else rest)
        self.train(rest)
        self.image_encoder.train(backbone)  # statistics of BatchNorm stand still too
        if head := getattr(self.image_encoder, "fc", None):
            head.train(rest)

    def further(self, sides: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        """Losses by name besides those of `pairs`, over the sides of all devices; none whose weight is 0."""
        return {}

    def compare(self, name: str, a: Tensor, b: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The loss `name` between two sides (B, D), row for row."""
        return loss(a, b)

    def row_losses(self, batch: Batch, step: Step, image: ImageFeatures, recipes: RecipeFeatures) -> dict[str, Tensor]:
        """Further losses (B,) of the main player, each of one row alone, by name; none whose weight is 0."""
        return {}

    def encoded(self, batch: Batch, step: Step) -> Encoded:
        """What the encoders make of a batch, or of a chunk of one."""
        recipes = self.encode_recipes(batch.recipes)
        # Nothing more than the losses use: to Adam a gradient of zero is not the same as none.
        components = recipes.components if step.weight("self_supervised") and hasattr(self, "projections") else ()
        if batch.images is None:
            return Encoded(components, {}, None, {})
        image = self.encode_images(batch)
        recipe = self.adjusted_recipes(recipes.embedding, batch.labels)
        sides = {"image": image.embedding + image.z, "recipe": recipe} | self.sides(batch, step)
        rows = self.row_losses(batch, step, image, recipes)
        return Encoded(components, sides, image._replace(features=None), rows)

    def in_chunks(self, step: Step, encode: Callable[[Batch], Any]) -> Any:
        """`encode` of the step's batch, in its chunks: tensors row for row, in tuples and dicts."""
        batch = step.batch
        options = {"module": self, "where": batch.rows.device}
        return in_chunks(lambda rows: encode(batch.part(rows)), len(batch.rows), step.chunk, **options)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Scalars of one player's turn, by name, without their weights; none whose weight is 0."""
        batch = step.batch
        components, sides, image, rows = self.in_chunks(step, lambda part: self.encoded(part, step))
        gathered = step.gather(*components, *sides.values())
        parts, sides = gathered[: len(components)], dict(zip(sides, gathered[len(components) :], strict=True))
        losses = {}
        if components:
            losses["self_supervised"] = self.self_supervised_loss(parts, step.loss)
        for name, (a, b) in self.pairs.items():
            if step.weight(name) and {a, b} <= sides.keys():
                losses[name] = self.compare(name, sides[a], sides[b], step.loss)
        if sides:
            losses |= self.further(sides, step)
        # Of this device's rows alone: the mean of equally large means is the mean.
        losses |= {name: row.mean() for name, row in rows.items()}
        if image is not None:
            if image.logits is not None and step.weight("classifier"):
                attached = self.config.debiasing
                losses["classifier"] = attached.classifier_scale * asymmetric_loss(
                    image.logits, batch.labels, attached.gamma_neg, attached.gamma_pos, self.asked(batch)
                )
            step.log({"e_norm": image.embedding.norm(dim=1).mean(), "z_norm": image.z.norm(dim=1).mean()})
        return losses

    def remarks(self, row: Mapping[str, float]) -> list[str]:
        """What a reader of the training must be told about an epoch, a row of its history."""
        return []

    def asked(self, batch: Batch) -> Tensor | None:
        """Weight of each decision of the classifier, (B, K) or (K,), where it is asked only for what can be seen."""
        if not self.config.debiasing.visible:
            return None
        return self.seen if batch.visible is None else 1 - batch.labels + batch.visible

    def self_supervised_loss(self, components: tuple[Tensor, ...], loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Mean over the ordered pairs of components (B, E) of the loss between one and the projection of the other."""
        part = dict(zip(COMPONENTS, components, strict=True))
        losses = [
            loss(part[a], self.projections[f"{a}_{b}"](part[b])) for a in COMPONENTS for b in COMPONENTS if a != b
        ]
        return torch.stack(losses).mean()

    def project_components(self) -> None:
        """Make what `self_supervised_loss` needs: a projection for each ordered pair of components."""
        dim = self.recipe_encoder.dim
        pairs = [(a, b) for a in COMPONENTS for b in COMPONENTS if a != b]
        self.projections = nn.ModuleDict({f"{a}_{b}": nn.Linear(dim, dim) for a, b in pairs})


def parameter_table(model: nn.Module, depth: int = 2) -> pd.DataFrame:
    """Trainable and frozen parameters of each part, one shared by several counted once; the last row is the sum.

    Args:
        depth: parts are the first `depth` names of a parameter's path.
    """
    import pandas as pd  # it takes as long as loading a small system, and a search needs no table

    counts = {True: Counter(), False: Counter()}
    for name, parameter in model.named_parameters():
        counts[parameter.requires_grad][".".join(name.split(".")[:depth])] += parameter.numel()
    parts = dict.fromkeys(".".join(name.split(".")[:depth]) for name, _ in model.named_parameters())
    table = pd.DataFrame({"trainable": counts[True], "frozen": counts[False]}, index=list(parts)).fillna(0).astype(int)
    table.loc["total"] = table.sum()
    return table
