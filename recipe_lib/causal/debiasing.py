"""What may be attached to a baseline, and the variants that notebook 4 trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Debiasing:
    """What is attached to a baseline.

    Args:
        classifier: train the ingredient classifier on the image features.
        weights: where z takes P(ing | image) from: "" (no z), "classifier", "labels" (the oracle),
            "visible" (an oracle told only what shows), "marginal".
        dictionary: "learned", or the controls "shuffled" and "random".
        soft: keep every probability; else those below `threshold` are dropped before they are normalised.
        calibrated: turn the asymmetric-loss output into the probability that it stands for.
        normalise: bring Wv(D) to the length of the image embedding.
        sides: what z is added to: "image" (the paper), "text" or "both". A recipe's ingredients are read, not guessed:
            its z needs no classifier.
        visible: the classifier is asked only for what can be seen; see `systems.base.System.asked`.
        context_swap: share of the training photos that get the surroundings of another photo: do(context) by
            construction; see `data.context`.
        swap_radius: of the disc that keeps its own pixels, lowest and highest, in shares of the photo's side.
        swap_within: surroundings come from a photo of the same stratum, so they say what they said before: a placebo.
        stratified: share of the training batches drawn within one stratum, so that its negatives share z: P(R | I, z).
        hard_negatives: share of the training batches that bring recipes together which differ in few ingredients.
        mining: of the triplet loss, in place of the baseline's; see `losses.triplet`. A mean over all cells of a batch
            drowns the few that are hard.
        gamma_neg, gamma_pos: of the asymmetric loss.
        classifier_scale: what multiplies the weight of that loss.
        classifier_dim, classifier_heads, classifier_feedforward: of the Query2Label transformer.
    """

    classifier: bool = False
    weights: str = ""
    dictionary: str = "learned"
    soft: bool = False
    threshold: float = 0.5
    calibrated: bool = False
    normalise: bool = False
    sides: str = "image"
    visible: bool = False
    context_swap: float = 0.0
    swap_radius: tuple[float, float] = (0.28, 0.44)
    swap_within: bool = False
    stratified: float = 0.0
    hard_negatives: float = 0.0
    mining: str = ""
    gamma_neg: float = 2.0
    gamma_pos: float = 0.0
    classifier_scale: float = 1.0
    classifier_dim: int = 2048
    classifier_heads: int = 4
    classifier_feedforward: int = 8192

    @property
    def reads_visible(self) -> bool:
        """Whether it is to be told which ingredients show in a photo."""
        return self.visible or self.weights == "visible"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Debiasing:
        """From what `asdict` gave, or JSON made of it."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def tuned(self, parameters: Mapping[str, Any]) -> Debiasing:
        """The same with the threshold, exponents, classifier's sizes and context swaps of a notebook's parameters."""
        names = ("threshold", "gamma_neg", "gamma_pos", *(f"classifier_{n}" for n in ("dim", "heads", "feedforward")))
        tuned = {name: parameters[name] for name in names if name in parameters}
        if "swap_radius" in parameters:
            tuned["swap_radius"] = tuple(parameters["swap_radius"])
        if self.context_swap and parameters.get("swap_share"):
            tuned["context_swap"] = parameters["swap_share"]
        return replace(self, **tuned)


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
    "oracle_visible": Debiasing(weights="visible"),
    "fair_chance": Debiasing(classifier=True, weights="classifier", soft=True, calibrated=True, classifier_scale=3.0),
    "fair_chance_10": Debiasing(
        classifier=True, weights="classifier", soft=True, calibrated=True, classifier_scale=10.0
    ),
    "visible": Debiasing(classifier=True, weights="classifier", soft=True, calibrated=True, visible=True),
    "text_side": Debiasing(weights="classifier", sides="text"),
    "two_sided": Debiasing(weights="classifier", classifier=True, sides="both"),
    # Beyond the paper: nothing is attached, but other batches are trained on.
    "context_swap": Debiasing(context_swap=0.5),
    "context_swap_25": Debiasing(context_swap=0.25),
    "context_swap_75": Debiasing(context_swap=0.75),
    "context_swap_100": Debiasing(context_swap=1.0),
    "swap_placebo": Debiasing(context_swap=0.5, swap_within=True),
    "stratified": Debiasing(stratified=0.5),
    "non_zero": Debiasing(mining="non_zero"),
    "hard_negatives": Debiasing(hard_negatives=1.0, mining="non_zero"),
    "hardest": Debiasing(mining="hardest"),
    "hardest_visible": Debiasing(
        classifier=True,
        weights="classifier",
        soft=True,
        calibrated=True,
        classifier_scale=3.0,
        visible=True,
        hard_negatives=1.0,
        mining="hardest",
    ),
    "swap_hardest": Debiasing(context_swap=0.5, mining="hardest"),
    "swap_hard": Debiasing(context_swap=0.5, hard_negatives=1.0, mining="non_zero"),
    "swap_hard_visible": Debiasing(
        classifier=True,
        weights="classifier",
        soft=True,
        calibrated=True,
        classifier_scale=3.0,
        visible=True,
        context_swap=0.5,
        hard_negatives=1.0,
        mining="hardest",
    ),
    "swap_hard_visible_no_z": Debiasing(
        classifier=True, classifier_scale=3.0, visible=True, context_swap=0.5, hard_negatives=1.0, mining="hardest"
    ),
    "swap_debiased": Debiasing(classifier=True, weights="classifier", context_swap=0.5),
}
