"""H-T: a photo backbone, and transformers over words and over sentences (Salvador et al., arXiv:2103.13061)."""

from __future__ import annotations

from recipe_lib.encoders.image import ImageEncoder
from recipe_lib.encoders.recipe import RecipeEncoder
from recipe_lib.systems.base import System


class HT(System):
    """Any timm backbone, hierarchical transformers, self-supervision among a recipe's components."""

    def build(self) -> None:
        config = self.config
        self.image_encoder = ImageEncoder(config.image_model, config.embed_dim, **config.photo_backbone)
        self.recipe_encoder = RecipeEncoder(
            config.vocabulary, config.embed_dim, dim=config.recipe_dim, **config.recipe_transformer
        )
        self.project_components()
