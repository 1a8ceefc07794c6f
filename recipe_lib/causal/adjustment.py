"""The causal module: ingredient dictionary, backdoor adjustment, oracle and controls (Wang et al., arXiv:2511.15201).

Graph: Ing -> R, Ing -> I <- R. Ingredients open a backdoor between photo and recipe; adjusting for them adds the
expected ingredient embedding to the image embedding. Tensors in, tensors out: nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def ingredient_dictionary(batches: Iterable[tuple[Tensor, Tensor]], names: Sequence[str]) -> Tensor:
    """Mean sentence feature of the ingredient lines that mention each class, over the training recipes.

    Args:
        batches: (features (M, E), classes (M,) in [0, K)) of ingredient lines.
        names: the K class names.

    Returns:
        (K, E) float32.

    Raises:
        ValueError: a class that no line mentions; it is named.
    """
    total, count = None, torch.zeros(len(names), dtype=torch.float64)
    for features, classes in batches:
        if total is None:
            total = torch.zeros(len(names), features.shape[1], dtype=torch.float64)
        total.index_add_(0, classes.cpu(), features.double().cpu())
        count += torch.bincount(classes.cpu(), minlength=len(names))
    unseen = [name for name, n in zip(names, count.tolist(), strict=True) if n == 0]
    if unseen:
        raise ValueError(
            f"no training line mentions {', '.join(unseen[:5])}{' …' if len(unseen) > 5 else ''}; "
            "lower ingredient_classes or mend the class table"
        )
    return (total / count[:, None]).float()


def ingredient_weights(probabilities: Tensor, threshold: float = 0.0) -> Tensor:
    """P(ing | image) as the weights of an expectation: small ones dropped, the rest summing to one.

    Shape:
        (B, K) in [0, 1] -> (B, K). A row with nothing left stays zero, and so adds nothing to its image.
    """
    kept = torch.where(probabilities < threshold, 0, probabilities)
    return kept / kept.sum(1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)


class BackdoorAdjustment(nn.Module):
    """Add the expected ingredient embedding to an image embedding: e~ = e + weights @ Wv(D).

    The paper averages over P(ing | image) (`ingredient_weights`); the textbook formula averages over the marginal
    P(ing) (`marginal_weights`). Both are weights, so both go through here.

    Args:
        dictionary: D, (K, E); frozen.
        embed_dim: width of the image embedding.
        normalise: scale each row of Wv(D) to the length of the image embedding, so that the term cannot outgrow what
            it is added to. The paper leaves it unbounded.

    Shape:
        embedding (B, D), weights (B, K) -> z (B, D), to be added to the embedding.
    """

    def __init__(self, dictionary: Tensor, embed_dim: int, *, normalise: bool = False):
        super().__init__()
        self.register_buffer("dictionary", dictionary.clone())
        self.value = nn.Linear(dictionary.shape[1], embed_dim)
        self.normalise = normalise

    def forward(self, embedding: Tensor, weights: Tensor) -> Tensor:
        values = self.value(self.dictionary)  # (K, D)
        if self.normalise:
            # Detached: the term takes the scale of the image embedding, it does not set it.
            return weights @ F.normalize(values, dim=1) * embedding.detach().norm(dim=1, keepdim=True)
        return weights @ values


def marginal_weights(prior: Tensor, rows: int) -> Tensor:
    """P(ing), the same for every image: the textbook backdoor average.

    Shape:
        prior (K,): share of the training recipes that hold each ingredient -> (rows, K), each summing to one.
    """
    return (prior / prior.sum()).expand(rows, -1)


def permute_rows(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Leakage control: every image gets the labels of another recipe. (N, K) -> (N, K); no row keeps its own place."""
    n = len(labels)
    order = torch.randperm(n, generator=generator)
    # Going once round a random cycle moves every row.
    shuffled = torch.empty_like(labels)
    shuffled[order] = labels[order.roll(1)]
    return shuffled


def corrupt_labels(labels: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Leakage control: each true label is swapped, with probability `rate`, for a random class the row does not hold.

    The number of labels of a row stays. (N, K) in {0, 1} -> (N, K).
    """
    noise = torch.rand(labels.shape, generator=generator)
    swapped = (labels > 0) & (noise < rate)
    # No more than there are absent classes to take their place.
    swapped &= swapped.cumsum(1) <= (labels <= 0).sum(1, keepdim=True)
    # The random classes are those of the largest noise among the absent ones: as many as were taken away.
    score = torch.where(labels > 0, -1.0, torch.rand(labels.shape, generator=generator))
    rank = score.argsort(1, descending=True).argsort(1)
    added = rank < swapped.sum(1, keepdim=True)
    return torch.where(swapped, 0, labels) + added.to(labels.dtype)


def shuffle_dictionary(dictionary: Tensor, generator: torch.Generator) -> Tensor:
    """Control: every ingredient gets the vector of another one. (K, E) -> (K, E)."""
    return permute_rows(dictionary, generator)


def random_dictionary(dictionary: Tensor, generator: torch.Generator) -> Tensor:
    """Control: Gaussian vectors with the mean and spread of the real dictionary, and none of its content."""
    noise = torch.randn(dictionary.shape, generator=generator)
    return dictionary.mean(0) + noise * dictionary.std(0)
