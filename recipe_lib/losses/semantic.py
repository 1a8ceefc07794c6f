"""Semantic triplets: recipes of one category belong together (AdaMine, arXiv:1804.11146)."""

from __future__ import annotations

import torch
from torch import Tensor

from recipe_lib.losses.similarity import cosine_matrix


def semantic_triplet_loss(
    a: Tensor, b: Tensor, category: Tensor, margin: float = 0.3, mining: str = "non_zero"
) -> Tensor:
    """Hinge [margin + cos(query, negative) - cos(query, positive)]_+ of labelled rows, a -> b and b -> a.

    The positive is the first other row of the query's category in the batch, as in the released code (the paper leaves
    the choice open); the negatives are all rows of other categories (the code drops some, so that each query has
    equally many).

    Args:
        mining: "non_zero": each direction's sum over the number of its hinges that are not zero, AdaMine's adaptive
            mean; "all": over the number of its triplets.

    Shape:
        a, b (B, D), category (B,) int64, -1 for none -> scalar; 0 where there is no triplet.
    """
    if mining not in ("all", "non_zero"):
        raise ValueError(f"semantic triplets with mining {mining!r}: choose all or non_zero")
    labelled = category >= 0
    same = (category[:, None] == category) & labelled
    same.fill_diagonal_(False)
    negative = (category[:, None] != category) & labelled & labelled[:, None] & same.any(1)[:, None]
    first = same.int().argmax(1)
    similarity, losses = cosine_matrix(a, b), []
    for way in (similarity, similarity.T):
        hinge = (margin + way - way.gather(1, first[:, None])).clamp(min=0).where(negative, 0)
        count = (hinge > 0) if mining == "non_zero" else negative
        losses.append(hinge.sum() / count.sum().clamp(min=1))
    return torch.stack(losses).sum()
