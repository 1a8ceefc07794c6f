"""Exact ranks of the true pairs, MedR / R@K, bags of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recipe_lib.retrieval.exact_ranks import Embeddings, Pairs, bag_ranks

RECALL_AT = (1, 5, 10)


def cross_modal_ranks(
    images: Embeddings,
    recipes: Embeddings,
    *,
    block: int | None = None,
    device: str | torch.device | None = None,
    ties: bool = False,
) -> tuple[Tensor, ...]:
    """Exact pessimistic ranks of the true pairs, both directions, in one pass.

    The rank of a query is 1 + the number of other candidates at least as similar as the true one: a tie counts
    against the model. Similarity is the cosine, in float64. With several embeddings per side it is minus the product of
    the distances 1 - cosine of the k-th image and the k-th recipe embedding; DAR++ (arXiv:2312.04763) is
    `(image, image, segments), (recipe, description, recipe)`. Memory O(N x D + block^2).

    Args:
        images, recipes: (N, D), or equally many (N, D_k); row i of one belongs to row i of the other.
        block: images per tile, which has four times as many recipes; default: 512 on a CPU, 2048 elsewhere.
        device: where to compute; default: where `images` lies.
        ties: also return, for each query, how many other candidates are exactly as similar as the true one.

    Returns:
        (i2r, r2i), each (N,) int64 on the CPU; with ties, (i2r, r2i, i2r_ties, r2i_ties).

    Raises:
        ValueError: shapes differ, or an embedding is not finite or zero: a NaN would rank first, not last.
    """
    pairs = Pairs(images, recipes, device)
    ranks = bag_ranks(pairs, torch.ones(pairs.n, 1), block)[..., 0].long().unbind()
    return ranks if ties else ranks[:2]


def rank_metrics(ranks: Tensor) -> dict[str, float]:
    """MedR and R@1, R@5, R@10 (shares, not percentages) of ranks (N,)."""
    ranks = ranks.double()
    recalls = {f"recall_{k}": float((ranks <= k).double().mean()) for k in RECALL_AT}
    return {"medr": float(ranks.quantile(0.5))} | recalls


class BagRanks(NamedTuple):
    """Ranks (n,) int64 of the pairs of one bag, and how many other candidates tie with the true one."""

    i2r: Tensor
    r2i: Tensor
    i2r_ties: Tensor
    r2i_ties: Tensor


def rank_bags(
    images: Embeddings, recipes: Embeddings, *, candidates: int | Sequence[int], bags: int = 10, seed: int = 0
) -> dict[int, list[BagRanks]]:
    """Exact ranks within random bags of pairs, by the size of the bags; the whole set is one bag, in its own order.

    Several sizes cost little more than one: the candidates above the true one are counted in all bags at once.

    Raises:
        ValueError: more candidates than pairs, or as for `cross_modal_ranks`.
    """
    n, sizes, draws = len(images if isinstance(images, Tensor) else images[0]), np.atleast_1d(candidates).tolist(), []
    if max(sizes) > n:
        raise ValueError(f"{max(sizes)} candidates asked for, but there are {n} pairs")
    for size in sizes:
        rng = np.random.default_rng([seed, size])
        draws.append([np.arange(n)] if size == n else [rng.permutation(n)[:size] for _ in range(bags)])
    members = torch.zeros(n, sum(map(len, draws)))
    for column, draw in enumerate(draw for drawn in draws for draw in drawn):
        members[draw, column] = 1
    columns = iter(bag_ranks(Pairs(images, recipes), members).long().unbind(2))
    return {
        size: [BagRanks(*column[:, draw]) for draw, column in zip(drawn, columns, strict=False)]
        for size, drawn in zip(sizes, draws, strict=True)
    }


def bag_metrics(ranked: dict[int, list[BagRanks]]) -> list[dict]:
    """Metrics of what `rank_bags` gives, in both directions, averaged over the bags of a size.

    Bags of a set not much larger overlap: their spread is no confidence interval, so none is given.
    """
    rows = []
    for size, bags in ranked.items():
        for direction in ("i2r", "r2i"):
            scores = [
                rank_metrics(getattr(bag, direction)) | {"ties": int((getattr(bag, f"{direction}_ties") > 0).sum())}
                for bag in bags
            ]
            means = {key: float(np.mean([score[key] for score in scores])) for key in scores[0]}
            rows.append({"direction": direction, "candidates": size} | means)
    return rows


def evaluate(
    images: Embeddings, recipes: Embeddings, *, candidates: int | Sequence[int], bags: int = 10, seed: int = 0
) -> list[dict]:
    """`bag_metrics` of `rank_bags`."""
    return bag_metrics(rank_bags(images, recipes, candidates=candidates, bags=bags, seed=seed))


def mean_cosine(embeddings: Tensor) -> float:
    """Mean cosine of two different rows of (N, D): 1 where a model has collapsed; 0 of a single row."""
    unit, n = torch.nn.functional.normalize(embeddings.double(), dim=1), len(embeddings)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))) if n > 1 else 0.0
