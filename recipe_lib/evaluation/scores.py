"""What a trained system scores: embeddings of a test split, test-time controls, products of distances, tidy results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from recipe_lib import devices
from recipe_lib.causal.adjustment import corrupt_labels, ingredient_weights, permute_rows
from recipe_lib.data.loading import InOrder, Sentences, StudyDataset, loader, recipe_batch
from recipe_lib.data.store import Split, padded, study_store
from recipe_lib.data.text import PAD
from recipe_lib.losses import posterior
from recipe_lib.paths import atomic_write_text, study_dir
from recipe_lib.progress import progress
from recipe_lib.retrieval.exact_ranks import Embeddings
from recipe_lib.retrieval.metrics import bag_metrics, rank_bags
from recipe_lib.systems.base import System
from recipe_lib.systems.saving import load_system
from recipe_lib.training.frozen_features import with_features
from recipe_lib.training.segment_features import load_features, segment_features

COLUMNS = "system variant seed split direction candidates medr recall_1 recall_5 recall_10 ties".split()
BATCH_TOKENS = 1 << 14  # of sentences that are encoded together
CORRUPTION = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)


@dataclass
class Encoded:
    """A test split through one system, on the CPU, in float32.

    Shape:
        embedding, z, recipes (N, D); labels (N, K); logits (N, K), descriptions and segments (N, D), each None where
        the system has no such part; visible (N, K), the labels that show in the photo, None where nobody knows.
    """

    embedding: Tensor
    z: Tensor
    recipes: Tensor
    labels: Tensor
    logits: Tensor | None
    descriptions: Tensor | None = None
    segments: Tensor | None = None
    visible: Tensor | None = None


@torch.inference_mode()
def encode(
    system: System,
    split: Split,
    *,
    crop: int,
    kept: Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
) -> Encoded:
    """Photos and recipes of a split: centre crop of the first photo, no dropout.

    Args:
        kept: folder where features of segments are found or left; needed for systems that encode segments.
    """
    device = devices.device()
    system = system.eval().to(device)
    parts = []
    dataset = with_features(system, StudyDataset(split, crop, visible=True))
    photos = loader(dataset, InOrder(len(split), batch_size), workers)
    for batch in progress(photos, f"photos of {split.name}, batches"):
        image = system.encode_images(batch.to(device))
        parts.append([image.embedding, image.z, batch.labels, image.logits, batch.visible])
    embedding, z, labels, logits, visible = (
        None if column[0] is None else torch.cat([x.cpu() for x in column]) for column in zip(*parts, strict=True)
    )
    recipes = system.adjusted_recipes(encode_recipes(system, split, told=True).to(device), labels.to(device)).cpu()
    encoded = Encoded(embedding, z, recipes, labels, logits, visible=visible)
    batches = np.array_split(np.arange(len(split)), -(-len(split) // batch_size))
    if "descriptions" in system.reads:
        tokens = (torch.from_numpy(split.description_tokens(rows)).to(device) for rows in batches)
        encoded.descriptions = torch.cat([system.encode_descriptions(ids).cpu() for ids in tokens])
    if "segments" in system.reads:
        features = load_features(system, segment_features(system, split, kept, first_only=True))
        features = torch.from_numpy(np.array(features))
        counts = torch.from_numpy(split.segment_counts[split.photo_start[:-1]])[:, None]
        mask = torch.arange(features.shape[1]) < counts
        segments = system.encode_segments(features.to(device), mask.to(device)).cpu()
        # A photo without any: one constant stands for them, since a zero vector cannot be ranked.
        encoded.segments = torch.where(mask.any(1, keepdim=True), segments, torch.ones_like(segments))
    return encoded


def encode_with_study(study: str, split: Split, kept: Path) -> Encoded:
    """The same recipes through the baseline of another study, which reads descriptions or segments.

    Args:
        study: its name.
        split: of this study.
        kept: folder where features of segments are found or left.

    Raises:
        ValueError: that study has no such recipes, or reads neither.
    """
    folder = study_dir(study)
    other = load_system(folder / "02_baseline_training")
    if not other.reads & {"descriptions", "segments"}:
        raise ValueError(f"distances_from: the study {study} reads neither descriptions nor segments")
    theirs = study_store(study).split(split.name)
    if theirs.ids != split.ids:
        raise ValueError(f"distances_from: {split.name} of the study {study} holds other recipes than this one's")
    return encode(other, theirs, crop=other.image_encoder.tower.size[0], kept=kept)


def distances(images: Tensor, recipes: Tensor, source: Encoded | None) -> dict[str, tuple]:
    """What is ranked: the distances 1 - cosine whose product orders the candidates (DAR, arXiv:2312.04763).

    Args:
        images, recipes: (N, D) embeddings of a system, the photos' with its term z.
        source: where descriptions and segments come from, and the photos and recipes they are held against: the same
            system, or another one for the same recipes.

    Returns:
        By suffix, two arguments of `cross_modal_ranks`: "" the photo against the recipe; "+" times the photo against
        the description; "++" times the segments against the recipe; "+s" segments alone, without descriptions.
    """
    sides = {"": (images, recipes)}
    if source is None:
        return sides
    photo = source.embedding + source.z
    if source.descriptions is not None:
        sides["+"] = ((images, photo), (recipes, source.descriptions))
        if source.segments is not None:
            sides["++"] = ((images, photo, source.segments), (recipes, source.descriptions, source.recipes))
    elif source.segments is not None:
        sides["+s"] = ((images, source.segments), (recipes, source.recipes))
    return sides


@torch.inference_mode()
def encode_recipes(
    system: System, split: Split | Sentences, batch_tokens: int = BATCH_TOKENS, told: bool = False
) -> Tensor:
    """Embeddings (N, D) of the recipes of a split in float32, on the CPU: each distinct sentence is encoded once.

    Args:
        told: say how far it is, where it lasts.
    """
    device = devices.device()
    encoder = system.eval().to(device).recipe_encoder
    if not hasattr(encoder, "join_sentences"):  # a recipe is one text
        rows = np.array_split(np.arange(len(split)), -(-len(split) // 256))
        return torch.cat([encoder(recipe_batch(split, part).to(device)).embedding.cpu() for part in rows])
    start, stop, lines = split.recipe_start[:-1, None], split.recipe_start[1:, None], split.ingredient_lines[:, None]
    bounds = {"title": (start, start + 1), "ingredients": (start + 1, start + 1 + lines)}
    bounds["instructions"] = (start + 1 + lines, stop)
    components = []
    for name, (first, end) in bounds.items():
        rows = first + np.arange((end - first).max())  # (N, S) numbers of sentences
        inside = rows < end
        batches, which = distinct_sentences(split, rows[inside], batch_tokens)
        batches = progress(batches, f"{name}, batches") if told else batches
        vectors = torch.cat([encoder.encode_sentences(name, tokens.to(device)) for tokens in batches])
        rows = torch.full(rows.shape, -1).masked_scatter(torch.from_numpy(inside), torch.from_numpy(which)).to(device)
        rows = rows[:, 0] if name == "title" else rows
        components.append(torch.cat([encoder.join_sentences(name, vectors, part) for part in rows.split(1024)]))
    return encoder.embed(components).embedding.cpu()


def distinct_sentences(
    split: Split | Sentences, sentences: np.ndarray, batch_tokens: int
) -> tuple[list[Tensor], np.ndarray]:
    """Each distinct one of some sentences once, and where to find them.

    Args:
        sentences: (M,) their numbers in the split.
        batch_tokens: about as many token ids are a batch, padding not counted.

    Returns:
        Token ids (u, L) in batches, short sentences first; (M,) the row of each sentence among those of all batches.
    """
    # Arrow hashes the bytes of each sentence where they lie: some millions take a second and no table of padded rows.
    ends = pa.py_buffer(split.sentence_start.astype(np.int64) * split.words.itemsize)
    every = pa.Array.from_buffers(
        pa.large_binary(), len(split.sentence_start) - 1, [None, ends, pa.py_buffer(split.words)]
    )
    which = every.take(pa.array(sentences)).dictionary_encode().indices.to_numpy()
    one = np.empty(which.max() + 1, np.int64)
    one[which] = sentences
    start, length = split.sentence_start[one], np.diff(split.sentence_start)[one]
    order = np.argsort(length, kind="stable")
    cuts = np.flatnonzero(np.diff(np.cumsum(length[order]) // batch_tokens)) + 1
    parts = np.split(order, cuts)
    batches = [torch.from_numpy(padded(split.words, start[rows], length[rows], PAD)) for rows in parts]
    return batches, np.argsort(order)[which]


@torch.inference_mode()
def test_time_embeddings(variant: str, system: System, encoded: Encoded, seed: int) -> dict[str, Tensor]:
    """The image embeddings of a variant and of its test-time controls, by name; they cost no training.

    `variant@control` changes the trained variant at test time alone: `no_z` removes the term, `soft` drops the
    threshold, `true_labels` tells the ingredients; an oracle's labels are left alone without the photo. Those of the
    oracle that is told all are permuted over the recipes, corrupted at a rising rate, or only those that show
    (`visible`, where that is known).
    """
    system = system.cpu()
    out = {variant: encoded.embedding + encoded.z}
    attached = system.config.debiasing
    if not attached.weights or attached.sides == "text":
        return out
    generator = torch.Generator().manual_seed(seed)

    def told(labels: Tensor) -> Tensor:
        return system.adjustment(encoded.embedding, ingredient_weights(labels.float()))

    out[f"{variant}@no_z"] = encoded.embedding
    if attached.weights == "classifier":
        soft = ingredient_weights(system.probabilities(encoded.logits))
        out[f"{variant}@soft"] = encoded.embedding + system.adjustment(encoded.embedding, soft)
        out[f"{variant}@true_labels"] = encoded.embedding + told(encoded.labels)
    if attached.weights in ("labels", "visible"):
        # A recipe without any label has no z; one constant stands for it, since a zero vector cannot be ranked.
        nothing = encoded.z.norm(dim=1, keepdim=True) == 0
        out[f"{variant}@labels_only"] = torch.where(nothing, torch.ones_like(encoded.z), encoded.z)
    if attached.weights == "labels":
        out[f"{variant}@permuted_labels"] = encoded.embedding + told(permute_rows(encoded.labels, generator))
        for rate in CORRUPTION:
            labels = corrupt_labels(encoded.labels, rate, generator)
            out[f"{variant}@corrupted_{rate}"] = encoded.embedding + told(labels)
        if encoded.visible is not None:
            out[f"{variant}@visible"] = encoded.embedding + told(encoded.visible)
    return out


def score(
    name: dict, images: Embeddings, recipes: Embeddings, *, candidates: Sequence[int], bags: int, seed: int
) -> tuple[list[dict], pd.DataFrame]:
    """Tidy rows for the whole split and for bags of it, and the rank of every query in the whole split.

    Args:
        name: the columns system, variant, seed and split.
        images, recipes: as `cross_modal_ranks` takes them.
        candidates: bag sizes; those not smaller than the split are left out, the whole split is always scored.
    """
    pairs = len(images if isinstance(images, Tensor) else images[0])
    sizes = [size for size in candidates if size < pairs] + [pairs]
    ranked = rank_bags(images, recipes, candidates=sizes, bags=bags, seed=seed)
    rows = [name | row for row in bag_metrics(ranked)]
    whole = ranked[pairs][0]
    ranks = [
        pd.DataFrame(name | {"direction": way, "query": np.arange(pairs), "rank": r.numpy()})
        for way, r in (("i2r", whole.i2r), ("r2i", whole.r2i))
    ]
    return rows, pd.concat(ranks, ignore_index=True)


def classifier_metrics(logits: Tensor, labels: Tensor, gamma_neg: float, gamma_pos: float) -> pd.DataFrame:
    """How well ingredients are named, where sigmoid(logit) and where the calibrated posterior passes 0.5.

    Micro figures are over all decisions, macro ones means over classes. Macro F1 is read in two ways, which differ:
    `macro_f1` is the mean of the classes' F1; `macro_f1_of_means` the harmonic mean of macro precision and macro
    recall, the one printed with arXiv:2511.15201. Classes without a positive in the split have no recall: macro means
    are over the others. A class that is never named has precision 0.

    Returns:
        A row per reading of the probability: the figures above and macro_average_precision, the mean over classes.
    """
    truth = labels.numpy() > 0
    truth, scores = truth[:, truth.any(0)], logits.numpy()[:, truth.any(0)]
    ranked = {"macro_average_precision": average_precision_score(truth, scores, average="macro")}
    rows = []
    for reading in ("sigmoid", "calibrated"):
        p = torch.from_numpy(scores)
        predicted = (torch.sigmoid(p) if reading == "sigmoid" else posterior(p, gamma_neg, gamma_pos)).numpy() >= 0.5
        hits, named, there = (predicted & truth).sum(0), predicted.sum(0), truth.sum(0)  # (classes,) each
        row = {"probability": reading}
        for average, (h, n, t) in {
            "micro": (hits.sum(), named.sum(), there.sum()),
            "macro": (hits, named, there),
        }.items():
            row[f"{average}_precision"], row[f"{average}_recall"] = np.mean(h / np.maximum(n, 1)), np.mean(h / t)
            row[f"{average}_f1"] = np.mean(2 * h / (n + t))
        both = row["macro_precision"] + row["macro_recall"]
        row["macro_f1_of_means"] = 2 * row["macro_precision"] * row["macro_recall"] / both if both else 0.0
        rows.append({key: value if isinstance(value, str) else float(value) for key, value in (row | ranked).items()})
    return pd.DataFrame(rows)


def told_classes(system: System, split: Split, *, crop: int) -> Tensor:
    """(K,) how well each class is told from photos: average precision, brought to 0 for chance, 1 for all.

    Where nobody knows what shows in a photo, this stands for it. Classes without a positive in the split have 0.
    """
    encoded = encode(system, split, crop=crop)
    share = (encoded.labels > 0).double().mean(0)
    precision = [
        average_precision_score(encoded.labels[:, k] > 0, encoded.logits[:, k]) if share[k] else 0.0
        for k in range(len(share))
    ]
    return ((torch.tensor(precision) - share) / (1 - share).clamp(min=1e-6)).clamp(0, 1).float()


def near_duplicate_pairs(ids: Sequence[str], near_duplicates: Sequence[str]) -> np.ndarray:
    """(P, 2) rows of the recipes that have a near-duplicate in the split, each with the row of it.

    Args:
        ids: (N,) of the split.
        near_duplicates: (N,) the id of each recipe's near-duplicate, or any other text.
    """
    row = {id_: i for i, id_ in enumerate(ids)}
    pairs = [(i, row[other]) for i, other in enumerate(near_duplicates) if other in row]
    return np.array(pairs, np.int64).reshape(-1, 2)


def near_duplicate_accuracy(queries: Tensor, answers: Tensor, pairs: np.ndarray) -> float | None:
    """Share of the queries that stand nearer to their own answer than to its near-duplicate; None without pairs.

    Shape:
        queries, answers (N, D): photos and recipes, or recipes and photos, row for row; pairs (P, 2).
    """
    if not len(pairs):
        return None
    own, other = torch.from_numpy(pairs).T
    cosine = torch.nn.functional.cosine_similarity
    return float((cosine(queries[own], answers[own]) > cosine(queries[own], answers[other])).double().mean())


@torch.inference_mode()
def ingredient_lines(system: System, split: Split, batch_tokens: int = BATCH_TOKENS) -> Iterator[tuple[Tensor, Tensor]]:
    """First-level vectors of the ingredient lines that mention a class: (features (M, E), classes (M,)) per batch.

    Lines come sorted by their length; those of the same words are encoded once, and lie in one batch.
    """
    device = devices.device()
    encoder = system.eval().to(device).recipe_encoder
    kept = split.positions >= 0  # lines beyond max_sentences were not tokenised
    if not kept.any():
        return
    title = np.repeat(split.recipe_start[:-1], np.diff(split.label_start))
    batches, which = distinct_sentences(split, (title + 1 + split.positions)[kept], batch_tokens)
    order = np.argsort(which, kind="stable")
    which, classes = which[order], torch.from_numpy(split.labels[kept][order]).long()
    first = 0
    for tokens in batches:
        features = encoder.encode_sentences("ingredients", tokens.to(device)).cpu()
        own = slice(*np.searchsorted(which, [first, first + len(tokens)]))
        yield features[which[own] - first], classes[own]
        first += len(tokens)


def write_results(folder: Path, results: pd.DataFrame, ranks: pd.DataFrame, metrics: dict) -> None:
    """results.csv, ranks.parquet and metrics.json of a study."""
    atomic_write_text(folder / "results.csv", results.to_csv(index=False, float_format="%.6g"))
    atomic_write_text(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False))
    partial = folder / "ranks.partial"
    ranks.to_parquet(partial, index=False)
    os.replace(partial, folder / "ranks.parquet")
