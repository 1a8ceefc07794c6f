"""H-T with a frozen sentence encoder: a few hundred recipes teach no language, but one brings it along."""

from __future__ import annotations

from recipe_lib.encoders.sentence import SentenceRecipeEncoder
from recipe_lib.systems.base import System
from recipe_lib.systems.ht import image_encoder


class HTSentence(System):
    """Photo side and losses of H-T; `sentence_model` reads sentences, transformers over them are learnt."""

    def build(self) -> None:
        config = self.config
        self.image_encoder = image_encoder(config)
        self.recipe_encoder = SentenceRecipeEncoder(
            config.sentence_model, config.embed_dim, **config.recipe_transformer
        )
        self.project_components()
