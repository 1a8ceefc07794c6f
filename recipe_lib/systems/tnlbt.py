"""TNLBT: H-T's recipe encoder, hardest negatives, alignment and translation, large batches (arXiv:2205.04948).

No code was released: the weights and the game are ACME's (see `games`), without the faults of its code. The margin that
grows (`margin_step`) and the cross decoder are those of a follow-up known to us from slides: reconstructions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor

from recipe_lib.encoders.recipe import RecipeFeatures
from recipe_lib.objectives.cross_decoder import CrossDecoder
from recipe_lib.systems.base import ImageFeatures
from recipe_lib.systems.games import Game
from recipe_lib.systems.ht import HT


class TNLBT(Game, HT):
    """H-T with a critic, a generator and a discriminator.

    System arguments besides those of `Game`: `decoder_layers` and `decoder_heads` of the cross decoder; 0 layers: none.
    """

    defaults: ClassVar[dict[str, Any]] = Game.defaults | {"decoder_layers": 0, "decoder_heads": 4}

    def build(self) -> None:
        HT.build(self)
        config, args = self.config, self.args
        if args["decoder_layers"]:
            self.objectives["decoder"] = CrossDecoder(
                config.embed_dim,
                config.recipe_dim,
                self.image_encoder.channels,
                layers=args["decoder_layers"],
                heads=args["decoder_heads"],
                feedforward=config.recipe_feedforward,
                dropout=config.dropout,
            )
        self.play()

    def condition(self, image: ImageFeatures, recipes: RecipeFeatures) -> Tensor:
        """The recipe's embedding; with a cross decoder, what it finds in the photo (no features: in nothing)."""
        if "decoder" not in self.objectives:
            return recipes.embedding
        seen = None if image.features is None else self.image_encoder.feature_map(image.features)
        return self.objectives["decoder"](recipes.embedding, recipes.components, seen)

    def self_supervised_loss(self, components: tuple[Tensor, ...], loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Over all negatives, as H-T's: hardest ones are mined between photo and recipe alone."""
        if "mining" in signature(loss).parameters:
            loss = partial(loss, mining="all")
        return super().self_supervised_loss(components, loss)
