"""What a trained system scores: embeddings of a test split, test-time controls, tidy results, the verdict."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from recipe_lib.causal import corrupt_labels, ingredient_weights, permute_rows
from recipe_lib.data.loading import InOrder, StudyDataset, loader, recipe_batch
from recipe_lib.data.store import Split
from recipe_lib.losses import posterior
from recipe_lib.models import RetrievalSystem
from recipe_lib.paths import write_text
from recipe_lib.retrieval import cross_modal_ranks, evaluate, paired_bootstrap

COLUMNS = [
    "system",
    "variant",
    "seed",
    "split",
    "direction",
    "candidates",
    "medr",
    "recall_1",
    "recall_5",
    "recall_10",
    "ties",
]
CORRUPTION = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)


@dataclass
class Encoded:
    """A test split through one system, on the CPU: embedding, z, recipes (N, D); labels, logits (N, K) or None."""

    embedding: Tensor
    z: Tensor
    recipes: Tensor
    labels: Tensor
    logits: Tensor | None


@torch.inference_mode()
def encode(system: RetrievalSystem, split: Split, *, crop: int, batch_size: int = 256, workers: int = 0) -> Encoded:
    """Photos and recipes of a split in float32: centre crop of the first photo, no dropout."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    system = system.eval().to(device)
    parts = []
    for batch in loader(StudyDataset(split, crop), InOrder(len(split), batch_size), workers):
        moved = batch.to(device)
        image = system.encode_images(moved.images, moved.labels)
        recipes = system.encode_recipes(moved.recipes).embedding
        parts.append([image.embedding, image.z, recipes, batch.labels, image.logits])
    columns = [
        None if column[0] is None else torch.cat([x.cpu() for x in column]) for column in zip(*parts, strict=True)
    ]
    return Encoded(*columns)


@torch.inference_mode()
def queries(variant: str, system: RetrievalSystem, found: Encoded, seed: int) -> dict[str, Tensor]:
    """The image embeddings of a variant and of its test-time controls, by name; they cost no training.

    `variant@control` changes the trained variant at test time alone: `no_z` removes the term, `soft` drops the
    threshold, `true_labels` tells the ingredients; the oracle's labels are permuted over the recipes, corrupted at a
    rising rate, or left alone without the photo.
    """
    system = system.cpu()
    out = {variant: found.embedding + found.z}
    attached = system.config.debiasing
    if not attached.weights:
        return out
    generator = torch.Generator().manual_seed(seed)

    def told(labels: Tensor) -> Tensor:
        return system.adjustment(found.embedding, ingredient_weights(labels.float()))

    out[f"{variant}@no_z"] = found.embedding
    if attached.weights == "classifier":
        soft = ingredient_weights(system.probabilities(found.logits))
        out[f"{variant}@soft"] = found.embedding + system.adjustment(found.embedding, soft)
        out[f"{variant}@true_labels"] = found.embedding + told(found.labels)
    if attached.weights == "labels":
        out[f"{variant}@permuted_labels"] = found.embedding + told(permute_rows(found.labels, generator))
        # A recipe without any label has no z; one constant stands for it, since a zero vector cannot be ranked.
        nothing = found.z.norm(dim=1, keepdim=True) == 0
        out[f"{variant}@labels_only"] = torch.where(nothing, torch.ones_like(found.z), found.z)
        for rate in CORRUPTION:
            labels = corrupt_labels(found.labels, rate, generator)
            out[f"{variant}@corrupted_{rate}"] = found.embedding + told(labels)
    return out


def score(
    name: dict, images: Tensor, recipes: Tensor, *, candidates: Sequence[int], bags: int, seed: int
) -> tuple[list[dict], pd.DataFrame]:
    """Tidy rows for the whole split and for bags of it, and the rank of every query in the whole split.

    Args:
        name: the columns system, variant, seed and split.
        candidates: bag sizes; those not smaller than the split are left out, the whole split is always scored.
    """
    sizes = [size for size in candidates if size < len(images)] + [len(images)]
    rows = [name | row for size in sizes for row in evaluate(images, recipes, candidates=size, bags=bags, seed=seed)]
    i2r, r2i = cross_modal_ranks(images, recipes)
    ranks = [
        pd.DataFrame(name | {"direction": way, "query": np.arange(len(r)), "rank": r.numpy()})
        for way, r in (("i2r", i2r), ("r2i", r2i))
    ]
    return rows, pd.concat(ranks, ignore_index=True)


def classifier_metrics(logits: Tensor, labels: Tensor, gamma_neg: float, gamma_pos: float) -> pd.DataFrame:
    """Precision, recall and F1, micro and macro, where sigmoid(logit) and where the calibrated posterior passes 0.5.

    Classes without a positive in the split have no recall: macro means are over the others.
    """
    truth = labels.numpy() > 0
    truth, scores = truth[:, truth.any(0)], logits.numpy()[:, truth.any(0)]
    rows = []
    for reading in ("sigmoid", "calibrated"):
        p = torch.from_numpy(scores)
        predicted = (torch.sigmoid(p) if reading == "sigmoid" else posterior(p, gamma_neg, gamma_pos)).numpy() >= 0.5
        counts = np.stack([(predicted & truth).sum(0), predicted.sum(0), truth.sum(0)])  # (3, classes)
        for average, (hits, named, there) in (("micro", counts.sum(1, keepdims=True)), ("macro", counts)):
            rows.append(
                {
                    "probability": reading,
                    "average": average,
                    "precision": (hits / np.maximum(named, 1)).mean(),
                    "recall": (hits / there).mean(),
                    "f1": (2 * hits / (named + there)).mean(),
                }
            )
    return pd.DataFrame(rows).assign(mean_average_precision=average_precision_score(truth, scores, average="macro"))


def twin_accuracy(images: Tensor, recipes: Tensor, ids: Sequence[str], twins: Sequence[str]) -> float | None:
    """Share of the queries that stand nearer to their own recipe than to its near-duplicate; None without twins."""
    row = {id_: i for i, id_ in enumerate(ids)}
    pairs = [(i, row[twin]) for i, twin in enumerate(twins) if twin in row]
    if not pairs:
        return None
    own, other = torch.tensor(pairs).T
    cosine = torch.nn.functional.cosine_similarity
    return float((cosine(images[own], recipes[own]) > cosine(images[own], recipes[other])).double().mean())


def compare(
    ranks: pd.DataFrame,
    a: str,
    b: str,
    *,
    split: str,
    direction: str = "i2r",
    k: int = 1,
    against_split: str | None = None,
) -> dict:
    """R@k of variant `a` minus that of `b` over the same queries, whole split, with a 95 % paired bootstrap interval.

    Seeds, where `ranks` holds several, are drawn again too. `against_split` scores `b` on another split that holds the
    same recipes in the same order.
    """

    found = paired_bootstrap(
        _hits(ranks, a, split, direction, k), _hits(ranks, b, against_split or split, direction, k)
    )
    difference, low, high = found
    return {
        "a": a, "b": b, "split": split, "against_split": against_split or split, "direction": direction,
        "metric": f"recall_{k}", "difference": difference, "low": low, "high": high, "seeds": int(ranks.seed.nunique()),
    }  # fmt: skip


def _hits(ranks: pd.DataFrame, variant: str, split: str, direction: str, k: int) -> np.ndarray:
    """(seeds, queries) bool: the true candidate is among the first k."""
    rows = ranks[(ranks.variant == variant) & (ranks.split == split) & (ranks.direction == direction)]
    return (rows.pivot(index="seed", columns="query", values="rank") <= k).to_numpy()


def compare_falls(
    ranks: pd.DataFrame, a: str, b: str, *, start: str, end: str, direction: str = "i2r", k: int = 1
) -> dict:
    """The change of R@k from split `start` to `end` of variant `a` minus that of `b`; positive: `a` falls less.

    Both splits hold the same recipes in the same order, so each query is its own control.
    """
    change = [
        _hits(ranks, variant, end, direction, k) - _hits(ranks, variant, start, direction, k).astype(float)
        for variant in (a, b)
    ]
    difference, low, high = paired_bootstrap(*change)
    return {
        "a": a, "b": b, "split": f"change from {start} to {end}", "against_split": f"change from {start} to {end}",
        "direction": direction, "metric": f"recall_{k}", "difference": difference, "low": low, "high": high,
        "seeds": int(ranks.seed.nunique()),
    }  # fmt: skip


def sentence(row: dict) -> str:
    """A comparison in words: gain, loss or neither, with its interval."""
    word = "above" if row["low"] > 0 else "below" if row["high"] < 0 else "not apart from"
    where = row["split"] if row["split"] == row["against_split"] else f"{row['split']} against {row['against_split']}"
    names = row["a"] if row["a"] == row["b"] else f"{row['a']} {word} {row['b']}"
    return (
        f"{names}: {row['direction']} {row['metric']} {row['difference']:+.3f} "
        f"[{row['low']:+.3f}, {row['high']:+.3f}] on {where}, {row['seeds']} seed{'s' * (row['seeds'] > 1)}"
    )


def intervals(ranks: pd.DataFrame, direction: str, k: int = 1) -> pd.DataFrame:
    """R@k of each variant in each whole split with a 95 % bootstrap interval: variant, split, value, low, high."""
    rows = []
    for (variant, split), group in ranks[ranks.direction == direction].groupby(["variant", "split"], sort=False):
        hits = (group.pivot(index="seed", columns="query", values="rank") <= k).to_numpy()
        value, low, high = paired_bootstrap(hits, np.zeros_like(hits))
        rows.append({"variant": variant, "split": split, "value": value, "low": low, "high": high})
    return pd.DataFrame(rows)


def nearest(images: Tensor, recipes: Tensor, rows: Sequence[int], k: int) -> list[list[int]]:
    """The k recipes nearest to some photos by cosine, best first."""
    normalise = torch.nn.functional.normalize
    return (
        (normalise(images[rows], dim=1) @ normalise(recipes, dim=1).T)
        .topk(min(k, len(recipes)), dim=1)
        .indices.tolist()
    )


@torch.inference_mode()
def ingredient_lines(system: RetrievalSystem, split: Split, batch_size: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
    """First-level vectors of the ingredient lines that mention a class: (features (M, E), classes (M,)) a batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = system.eval().to(device).recipe_encoder
    for start in range(0, len(split), batch_size):
        rows = np.arange(start, min(start + batch_size, len(split)))
        batch = recipe_batch(split, rows).to(device)
        labelled = slice(split.label_start[rows[0]], split.label_start[rows[-1] + 1])
        recipe = np.repeat(np.arange(len(rows)), np.diff(split.label_start[start : rows[-1] + 2]))
        position = split.positions[labelled]
        kept = position >= 0  # lines beyond max_sentences were not tokenised
        if not kept.any():
            continue
        sentences = batch.ingredients[recipe[kept], position[kept]]
        used, which = sentences.unique(return_inverse=True)
        features = encoder.encode_sentences("ingredients", batch.tokens[used])[which]
        yield features.cpu(), torch.from_numpy(split.labels[labelled][kept]).long()


def write_results(folder: Path, results: pd.DataFrame, ranks: pd.DataFrame, metrics: dict) -> None:
    """results.csv, ranks.parquet and metrics.json of a study."""
    write_text(folder / "results.csv", results.to_csv(index=False, float_format="%.6g"))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False))
    partial = folder / "ranks.partial"
    ranks.to_parquet(partial, index=False)
    os.replace(partial, folder / "ranks.parquet")
