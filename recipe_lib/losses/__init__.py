"""Losses, one per file."""

from recipe_lib.losses.asymmetric import asymmetric_loss, posterior
from recipe_lib.losses.circle import circle_loss
from recipe_lib.losses.triplet import triplet_loss

__all__ = ["asymmetric_loss", "circle_loss", "posterior", "triplet_loss"]
