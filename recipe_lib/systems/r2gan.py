"""R2GAN: pictures painted from photos and from recipes are ranked as embeddings are (Zhu et al., CVPR 2019).

No code was released. The losses are the paper's as public notes give them; sizes, margins, weights and the order of
turns are reconstructions (generator and discriminator are ACME's, the rest is said at `defaults`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """What opponents look at, without gradients: embeddings (B, D), photos and the pictures of either (B, 3, S, S)."""

    image: Tensor
    recipe: Tensor
    photos: Tensor
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

    def reconstruction(self, pictures: Sequence[Tensor], features: Sequence[Tensor] = ()) -> Tensor:
        """(B,) half the mean squares of photo - picture of the photo - that of the recipe, in features and pixels.

        `features` are the discriminator's of the pictures, where they are at hand.
        """
        features = features or [self.objectives["discriminator"].features(x) for x in pictures]
        kinds = (1.0, features), (self.args["pixels"], pictures)
        return sum(w / 2 * (a - b).float().square().flatten(1).mean(1) for w, x in kinds for a, b in pairwise(x))

    # ---- the encoders' turn ----

    def encoded(self, batch: Batch, step: Step) -> Encoded:
        made = super(Game, self).encoded(batch, step)
        if batch.images is None:
            return made
        pictures = self.paint_both(made.image.embedding, made.sides["recipe"])
        photos = as_pictures(batch.images, self.args["picture"]).to(pictures[0].dtype)
        rows = {"reconstruction": self.args["reconstruction"] * self.reconstruction([photos, *pictures])}
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
        seen, turn, opponent = self.still(step), getattr(self, f"_{step.player}"), self.objectives[step.player]
        if step.player == "discriminator":
            step.log({"game_spread": spread(seen.from_recipe, seen.photos)})

        def cost(rows: slice) -> Tensor:
            return turn(Seen(*(x[rows] for x in seen)), opponent)

        rows = in_chunks(cost, len(seen.image), step.chunk, module=opponent, where=seen.image.device)
        return {step.player: rows.mean()}

    def shown(self, batch: Batch, step: Step) -> Seen:
        image, recipe = self.encode_images(batch).embedding, self.encode_recipes(batch.recipes).embedding
        pictures = self.paint_both(image, recipe)
        return Seen(image, recipe, as_pictures(batch.images, self.args["picture"]).to(pictures[0].dtype), *pictures)

    def _discriminator(self, seen: Seen, judge: nn.Module) -> Tensor:
        fakes = sum(told_as(judge(x), False) for x in (seen.from_image, seen.from_recipe))
        return told_as(judge(seen.photos), True) + fakes / 2

    def _origin(self, seen: Seen, judge: nn.Module) -> Tensor:
        return told_as(judge(seen.from_image), True) + told_as(judge(seen.from_recipe), False)

    def _generator(self, seen: Seen, _: nn.Module) -> Tensor:
        """To be taken for photos, and for pictures of the other side; and the reconstruction."""
        pictures = [seen.photos, *self.paint_both(seen.image, seen.recipe)]
        discriminator, origin = (self.objectives[name] for name in ("discriminator", "origin"))
        features = [discriminator.features(x) for x in pictures]
        real = sum(told_as(discriminator.judge(x), True) for x in features[1:])
        other = sum(told_as(origin(x), kind) for x, kind in zip(pictures[1:], (False, True), strict=True))
        return (real + other) / 2 + self.args["reconstruction"] * self.reconstruction(pictures, features)
