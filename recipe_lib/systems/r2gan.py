"""R2GAN: pictures painted from photos and from recipes are ranked as embeddings are (Zhu et al., CVPR 2019).

No code was released. The losses are the paper's as public notes give them; sizes, margins, weights and the order of
turns are reconstructions (generator and discriminator are ACME's, the rest is said at `defaults`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from recipe_lib.data.loading import Batch
from recipe_lib.encoders.chunks import in_chunks
from recipe_lib.losses import category_loss, picture_triplet_loss
from recipe_lib.objectives.discriminator import Discriminator, as_pictures, told_as
from recipe_lib.objectives.generator import Generator
from recipe_lib.systems.base import Encoded, Step
from recipe_lib.systems.games import Game, spread
from recipe_lib.systems.recurrent import Recurrent


class Seen(NamedTuple):
    """What opponents look at, without gradients: embeddings (B, D), and the pictures of them (B, 3, S, S)."""

    image: Tensor
    recipe: Tensor
    from_image: Tensor
    from_recipe: Tensor


class R2GAN(Game, Recurrent):
    """Players in turn: a discriminator of photos and pictures, one of what a picture was made from, the generator, the
    encoders. The encoders' loss is the ranking of embeddings and of pictures, reconstruction, and categories; the
    generator's is to fool both discriminators, and reconstruction. A player's loss moves nobody else.

    Args of its own (`Game` tells picture, channels, code and noise), all reconstructions:
        image_space, picture_margin: weight (mu) and margin of the ranking of pictures.
        reconstruction: weight of the reconstruction for encoders and generator (gamma, delta).
        pixels: weight of pixels beside features in the reconstruction (beta).
    """

    defaults: ClassVar[dict[str, Any]] = (
        Recurrent.defaults
        | {name: Game.defaults[name] for name in ("picture", "channels", "code", "noise")}
        | {"image_space": 0.1, "picture_margin": 0.1, "reconstruction": 0.01, "pixels": 1.0}
    )
    opponents: ClassVar = dict.fromkeys(("discriminator", "origin", "generator"), "retrieval")
    pairs: ClassVar = {"retrieval": ("image", "recipe"), "image_space": ("from_image", "from_recipe")}

    def build(self) -> None:
        Recurrent.build(self)
        args, config = self.args, self.config
        for name in ("discriminator", "origin"):
            self.objectives[name] = Discriminator(args["picture"], args["channels"], code=0)
        sizes = {"code": args["code"], "noise": args["noise"]}
        self.objectives["generator"] = Generator(config.embed_dim, args["picture"], args["channels"], **sizes)
        if config.num_categories:
            self.objectives["categories"] = nn.Linear(config.embed_dim, config.num_categories)

    def paint_both(self, image: Tensor, recipe: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) of each side -> pictures (B, 3, S, S) of each."""
        return tuple(self.objectives["generator"](x).pictures for x in (image, recipe))

    def reconstruction(self, batch: Batch, from_image: Tensor, from_recipe: Tensor) -> Tensor:
        """(B,) half the mean squared differences photo - image's picture - recipe's picture, in features and pixels."""
        photos = as_pictures(batch.images, self.args["picture"])
        chain = [x.float() for x in (photos, from_image, from_recipe)]
        features = [self.objectives["discriminator"].features(x).float() for x in chain]
        kinds = (1.0, features), (self.args["pixels"], chain)
        return sum(w / 2 * (a - b).square().flatten(1).mean(1) for w, kind in kinds for a, b in pairwise(kind))

    # ---- the encoders' turn ----

    def encoded(self, batch: Batch, step: Step) -> Encoded:
        made = super(Game, self).encoded(batch, step)
        if batch.images is None:
            return made
        pictures = self.paint_both(made.image.embedding, made.sides["recipe"])
        rows = {"reconstruction": self.args["reconstruction"] * self.reconstruction(batch, *pictures)}
        sides = {name: x.flatten(1) for name, x in zip(self.pairs["image_space"], pictures, strict=True)}
        return made._replace(sides=made.sides | sides, rows=rows)

    def row_losses(self, *_: Any) -> dict[str, Tensor]:
        return {}

    def compare(self, name: str, a: Tensor, b: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if name == "image_space":
            return self.args["image_space"] * picture_triplet_loss(a, b, self.args["picture_margin"])
        return loss(a, b)

    def further(self, sides: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        if not step.weight("category"):
            return {}
        category, classify = self.category(sides, "category"), self.objectives["categories"]
        return {"category": sum(category_loss(classify(sides[side]), category) for side in ("image", "recipe"))}

    # ---- the others' ----

    def losses(self, step: Step) -> dict[str, Tensor]:
        if step.player == "main":
            return super(Game, self).losses(step)
        if step.batch.images is None:
            return {}
        seen = self.still(step)
        module = self.objectives[step.player]
        rows = in_chunks(
            lambda rows: getattr(self, f"_{step.player}")(step.batch.part(rows), Seen(*(x[rows] for x in seen))),
            len(seen.image), step.chunk, module=module, where=seen.image.device,
        )  # fmt: skip
        if step.player == "discriminator":
            photos = as_pictures(step.batch.images, self.args["picture"])
            step.log({"game_spread": spread(seen.from_recipe, photos)})
        return {step.player: rows.mean()}

    def _seen(self, batch: Batch, step: Step) -> Seen:
        image, recipes = self.encode_images(batch), self.encode_recipes(batch.recipes)
        pictures = self.paint_both(image.embedding, recipes.embedding)
        return Seen(image.embedding, recipes.embedding, *pictures)

    def _discriminator(self, batch: Batch, seen: Seen) -> Tensor:
        judge = self.objectives["discriminator"]
        photos = as_pictures(batch.images, self.args["picture"]).to(seen.from_image.dtype)
        fakes = (told_as(judge(x), False) / 2 for x in (seen.from_image, seen.from_recipe))
        return told_as(judge(photos), True) + sum(fakes)

    def _origin(self, batch: Batch, seen: Seen) -> Tensor:
        judge = self.objectives["origin"]
        return told_as(judge(seen.from_image), True) + told_as(judge(seen.from_recipe), False)

    def _generator(self, batch: Batch, seen: Seen) -> Tensor:
        """The game's loss, which the discriminators oppose, and the reconstruction."""
        from_image, from_recipe = self.paint_both(seen.image, seen.recipe)
        judge, origin = self.objectives["discriminator"], self.objectives["origin"]
        fools = sum(told_as(judge(x), True) / 2 for x in (from_image, from_recipe))
        fools = fools + (told_as(origin(from_image), False) + told_as(origin(from_recipe), True)) / 2
        return fools + self.args["reconstruction"] * self.reconstruction(batch, from_image, from_recipe)
