"""A whole study evaluated: every variant on every split, the comparisons that matter, and the verdict in words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from recipe_lib.data.store import Split, Store
from recipe_lib.evaluation.comparisons import compare, compare_falls, sentence
from recipe_lib.evaluation.scores import (
    COLUMNS,
    Encoded,
    distances,
    encode,
    encode_with_study,
    near_duplicate_accuracy,
    near_duplicate_pairs,
    score,
    test_time_embeddings,
)
from recipe_lib.systems.base import System

ZERO_SHOT = "zero_shot"  # towers that nobody trained here: no products of distances are claimed of them
MAIN = ("baseline", "equal_compute", "classifier_only", "debiased", "oracle")
CLAIM = ("debiased", "equal_compute")
_COMPARED = (
    ("equal_compute", "baseline"),
    CLAIM,
    ("classifier_only", "equal_compute"),
    ("debiased", "classifier_only"),
    ("debiased", "debiased@no_z"),
)


@dataclass
class StudyScores:
    """What `evaluate_study` finds."""

    results: pd.DataFrame  # COLUMNS, a row per variant, split, direction and number of candidates
    ranks: pd.DataFrame  # a row per query: system, variant, seed, split, direction, query, rank, cluster, test_set
    encoded: dict[tuple[str, str], Encoded]  # by system and split
    near_duplicates: pd.DataFrame  # variant, split, direction, accuracy; empty where none are known


def evaluate_study(
    systems: Mapping[str, Callable[[], System]],
    store: Store,
    out: Path,
    *,
    system: str,
    seed: int,
    crop: int,
    candidates: Sequence[int],
    bags: int,
    distances_from: str = "",
    workers: int = 0,
) -> StudyScores:
    """Encode every test split once through every system; rank it with all test-time controls and products of distances.

    Args:
        systems: by variant, what loads it; one is in memory at a time.
        out: folder where features of segments are found or left.
        system: the name for results; products of distances are "<name>+", "<name>++" and "<name>+s".
        seed: of bags, controls, and the column of that name.
        distances_from: study whose description and segment distances multiply those of these systems.
    """
    splits = [store.split(name) for name in store.test_splits]
    lent = {s.name: encode_with_study(distances_from, s, out) for s in splits if distances_from}
    rows, ranks, encoded, accuracy = [], [], {}, []
    for name, load in systems.items():
        model = load()
        for split in splits:
            own = encoded[name, split.name] = encode(model, split, crop=crop, kept=out, workers=workers)
            pairs = near_duplicate_pairs(split.ids, [truth.get("twin", "") for truth in split.truth])
            marks = query_marks(split, pairs)
            for variant, images in test_time_embeddings(name, model, own, seed).items():
                source = lent.get(split.name, own) if variant == name != ZERO_SHOT else None
                for suffix, sides in distances(images, own.recipes, source).items():
                    key = {"system": system + suffix, "variant": variant, "seed": seed, "split": split.name}
                    scores, rank = score(key, *sides, candidates=candidates, bags=bags, seed=seed)
                    rows += scores
                    ranks.append(rank.assign(**marks))
            sides = own.embedding + own.z, own.recipes
            for direction, (queries, answers) in (("i2r", sides), ("r2i", sides[::-1])):
                share = near_duplicate_accuracy(queries, answers, pairs)
                if share is not None:
                    key = {"variant": name, "split": split.name, "direction": direction}
                    accuracy.append(key | {"accuracy": share})
    return StudyScores(
        pd.DataFrame(rows)[COLUMNS],
        pd.concat(ranks, ignore_index=True),
        encoded,
        pd.DataFrame(accuracy, columns=["variant", "split", "direction", "accuracy"]),
    )


def query_marks(split: Split, pairs: np.ndarray) -> dict:
    """What an interval must know of a split's queries, for both directions of them.

    Returns:
        cluster: (2N,) equal for near-duplicates; test_set: a digest of the recipes, equal where studies share them.
    """
    cluster = np.arange(len(split))
    cluster[pairs[:, 0]] = pairs.min(1)
    test_set = hashlib.sha256("\0".join(split.ids).encode()).hexdigest()[:12]
    return {"cluster": np.tile(cluster, 2), "test_set": test_set}


def study_comparisons(ranks: pd.DataFrame, splits: Sequence[str]) -> list[dict]:
    """Every comparison that a study claims something of: by pair of variants, split and direction.

    Args:
        ranks: `labelled`, so that products of distances are variants.
        splits: names; where iid and do_context are among them, what each variant loses from one to the other is too.
    """
    there = list(ranks["variant"].unique())
    products = [(name, name.split("+")[0]) for name in there if "+" in name]
    pairs = [*_COMPARED, *products, tuple(f"{name}++" for name in CLAIM)]
    comparisons = [
        compare(ranks, a, b, split=split, direction=direction)
        for a, b in pairs
        if {a, b} <= set(there)
        for split in splits
        for direction in ("i2r", "r2i")
    ]
    if {"iid", "do_context"} <= set(splits):
        for direction in ("i2r", "r2i"):
            for name in (name for name in MAIN if name in there):
                where = {"split": "do_context", "against_split": "iid", "direction": direction}
                comparisons.append(compare(ranks, name, name, **where))
            if set(CLAIM) <= set(there):
                comparisons.append(compare_falls(ranks, *CLAIM, start="iid", end="do_context", direction=direction))
    return comparisons


def verdict(comparisons: Sequence[dict]) -> str:
    """The claim: the method against its control on the first split, on do_context, and the fall between the two.

    Only together do the last two speak of bias: whoever loses half of all hits falls less too.
    """
    claims = [row for row in comparisons if (row["a"], row["b"]) == CLAIM]
    if not claims:
        return "nothing was trained on from the baseline, so nothing is claimed of the causal term"
    first = [row for row in claims if row["split"] == claims[0]["split"]]
    do = [row for row in claims if "do_context" in row["split"] and row["direction"] == "i2r" and row not in first]
    return ".\n".join(sentence(row) for row in (*first, *do)) + "."
