"""Losses, one per file."""

from recipe_lib.losses.asymmetric import asymmetric_loss, posterior
from recipe_lib.losses.category import category_loss
from recipe_lib.losses.circle import circle_loss
from recipe_lib.losses.cosine import cosine_loss, mismatches
from recipe_lib.losses.nearest import nearest_triplet_loss
from recipe_lib.losses.picture import picture_triplet_loss
from recipe_lib.losses.semantic import semantic_triplet_loss
from recipe_lib.losses.triplet import triplet_loss

__all__ = [
    "asymmetric_loss", "category_loss", "circle_loss", "cosine_loss", "mismatches", "nearest_triplet_loss",
    "picture_triplet_loss", "posterior", "semantic_triplet_loss", "triplet_loss",
]  # fmt: skip
