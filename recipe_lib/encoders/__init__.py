"""Encoders of photos and of recipes."""

from recipe_lib.encoders.image import ImageEncoder
from recipe_lib.encoders.recipe import RecipeEncoder, RecipeFeatures

__all__ = ["ImageEncoder", "RecipeEncoder", "RecipeFeatures"]
