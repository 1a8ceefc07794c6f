"""How much of a system rests on the context, in four measures that each say one thing.

All take embeddings, so that they can be tested on some made by hand. What they need of the truth only the kitchen
knows: which cuisine a table belongs to, which ingredients show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch.nn.functional as F
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.metrics import roc_auc_score
from torch import Tensor

from recipe_lib.data.store import Store
from recipe_lib.evaluation.scores import Encoded
from recipe_lib.kitchen.looks import STYLES
from recipe_lib.kitchen.model import CUISINES
from recipe_lib.kitchen.pantry import pantry

NEIGHBOURS = 10


def context_pull(images: Tensor, recipes: Tensor, context: np.ndarray, own: np.ndarray, k: int = NEIGHBOURS) -> float:
    """How far a photo's neighbours follow its context: P(own_j = context_i | j in top k of i) - P(own_j = context_i).

    A photo's context is the table that it shows; a recipe's own context is the table that its cuisine would be set on.
    Under do_context the two are independent, so a system that does not look at the table has 0, a blind one too; one
    that sees nothing but the table has 1 - 1 / C. The photo's own recipe is not counted.

    Shape:
        images, recipes (N, D), row for row; context, own (N,) in [0, C).
    """
    similarity = F.normalize(images.double(), dim=1) @ F.normalize(recipes.double(), dim=1).T
    similarity.fill_diagonal_(-2)
    nearest = similarity.topk(min(k, len(images) - 1), dim=1).indices.numpy()
    follows = own[nearest] == context[:, None]
    chance = (own[None] == context[:, None]).mean(1)
    return float(follows.mean() - chance.mean())


def context_probe(embeddings: Tensor, context: np.ndarray) -> float:
    """Accuracy with which a linear probe reads the context from embeddings (N, D), half to train on, half to test on.

    1 / C where the embedding holds nothing of it (or nothing linear), 1 where it holds it whole.
    """
    half = len(context) // 2
    x = F.normalize(embeddings, dim=1).numpy()
    probe = RidgeClassifierCV(np.logspace(-4, 2, 7)).fit(x[:half], context[:half])
    return float(probe.score(x[half:], context[half:]))


def ingredient_probe(embeddings: Tensor, labels: np.ndarray, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """How well linear probes tell each group's ingredients from embeddings (N, D): mean ROC AUC over its classes.

    .5 where the embedding holds nothing of them, 1 where it tells each perfectly. Trained on one half, tested on the
    other; classes that lack a positive in either half are left out.

    Args:
        labels: (N, K) bool.
        groups: classes in [0, K) by name.
    """
    half = len(labels) // 2
    x = F.normalize(embeddings, dim=1).numpy()
    told = np.flatnonzero(labels[:half].any(0) & labels[half:].any(0) & ~labels[half:].all(0))
    scores = RidgeCV(np.logspace(-3, 2, 6)).fit(x[:half], labels[:half][:, told].astype(float)).predict(x[half:])
    scores = scores.reshape(-1, len(told))
    auc = {k: roc_auc_score(labels[half:, k], scores[:, i]) for i, k in enumerate(told.tolist())}
    means = {name: [auc[k] for k in classes if k in auc] for name, classes in groups.items()}
    return {name: float(np.mean(values)) for name, values in means.items() if values}


def study_bias(encoded: Mapping[tuple[str, str], Encoded], store: Store) -> pd.DataFrame:
    """Every measure of every system of a kitchen study: variant, measure, value; empty where no truth is known.

    Args:
        encoded: by variant and split, as `evaluate_study` leaves it.
    """
    rows: list[tuple[str, str, float]] = []
    if not {"do_context", "do_ingredients"} <= set(store.test_splits):
        return pd.DataFrame(rows, columns=["variant", "measure", "value"])
    truth = pd.DataFrame(store.split("do_context").truth)
    table = truth["style"].map(STYLES.index).to_numpy()
    cuisine = truth["cuisine"].map(list(CUISINES).index).to_numpy()  # a cuisine owns the style of its own position
    shown = {item.name: "salient" if item.visibility == "staple" else item.visibility for item in pantry()}
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(store.classes.names):
        groups.setdefault(shown[name], []).append(number)
    for (variant, split), sides in encoded.items():
        images = sides.embedding + sides.z
        if split == "do_context":
            rows.append((variant, "context_pull", context_pull(images, sides.recipes, table, cuisine)))
            rows.append((variant, "context_probe", context_probe(images, table)))
        if split == "do_ingredients":
            told = ingredient_probe(images, sides.labels.numpy() > 0, groups)
            rows += [(variant, f"{name}_ingredients_probe", value) for name, value in told.items()]
    return pd.DataFrame(rows, columns=["variant", "measure", "value"])
