"""H-T with a frozen sentence encoder: a few hundred recipes teach no language, but one brings it along."""

from __future__ import annotations

from recipe_lib.encoders.image import ImageEncoder
from recipe_lib.encoders.sentence import SentenceRecipeEncoder
from recipe_lib.systems.base import System


class HTSentence(System):
    """Photo side and losses of H-T; `sentence_model` reads sentences, transformers over them are learnt."""

    def build(self) -> None:
        config = self.config
        self.image_encoder = ImageEncoder(config.image_model, config.embed_dim, **config.photo_backbone)
        self.recipe_encoder = SentenceRecipeEncoder(
            config.sentence_model, config.embed_dim, **config.recipe_transformer
        )
        self.project_components()
