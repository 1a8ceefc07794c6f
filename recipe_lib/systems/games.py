"""What systems with opponents have in common: modality alignment, and translation between photo and recipe (ACME)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipe_lib.data.loading import Batch
from recipe_lib.encoders.chunks import in_chunks, resting_statistics
from recipe_lib.encoders.recipe import RecipeFeatures
from recipe_lib.objectives.critic import ModalityCritic, critic_loss
from recipe_lib.objectives.discriminator import Discriminator, as_pictures, told_as
from recipe_lib.objectives.generator import Generator, Painted
from recipe_lib.systems.base import ImageFeatures, Step, System


class Still(NamedTuple):
    """What opponents look at, without gradients: embeddings (B, D), and what is painted where pictures are."""

    image: Tensor
    recipe: Tensor
    painted: Painted | None


class Game(System):
    """Three players: a critic, a discriminator, and the encoders with the generator (ACME, arXiv:1905.01273).

    Alignment (the loss `alignment`): the critic tells photos from recipes, the recipe encoder fools it. Translation
    (the loss `translation`): a generator paints the dish from the recipe's embedding, past the discriminator, and the
    photo's embedding tells the recipe's ingredients; the larger of the two is scaled down to the other. Where the
    weight of one is 0 its opponent does not play. In a step each opponent moves once, then the encoders.
    The causal module's term takes no part: it may hold the labels that are to be told.

    `build` of a subclass makes the encoders, then calls `play`. System arguments: `picture`, pixels that are painted;
    `channels`, the discriminator's first; `code` and `noise`, widths of the generator's input; `hidden`, of the layers
    before the ingredients; `divergence`, weight of the code's divergence.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "picture": 128, "channels": 64, "code": 128, "noise": 100, "hidden": [512, 256], "divergence": 2.0
    }  # fmt: skip
    opponents: ClassVar = {"critic": "alignment", "discriminator": "translation"}  # and the loss that they oppose

    def play(self, categories: int = 0) -> None:
        """Make the opponents and what translates."""
        args, dim = self.args, self.config.embed_dim
        size = {name: args[name] for name in ("size", "channels", "code") if name in args} | {"size": args["picture"]}
        self.objectives["critic"] = ModalityCritic(dim)
        self.objectives["discriminator"] = Discriminator(**size, categories=categories)
        self.objectives["generator"] = Generator(dim, **size, noise=args["noise"])
        widths = [dim, *args["hidden"]]
        layers = [x for a, b in pairwise(widths) for x in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
        self.objectives["ingredients"] = nn.Sequential(*layers, nn.Linear(widths[-1], self.config.num_classes))

    def players(self) -> dict[str, list[nn.Parameter]]:
        opponents = {name: list(self.objectives[name].parameters()) for name in self.opponents}
        theirs = {id(parameter) for own in opponents.values() for parameter in own}
        main = [p for p in self.parameters() if p.requires_grad and id(p) not in theirs]
        return opponents | {"main": main}

    def condition(self, image: ImageFeatures, recipes: RecipeFeatures) -> Tensor:
        """(B, D) that the generator paints from."""
        return recipes.embedding

    def losses(self, step: Step) -> dict[str, Tensor]:
        if step.player == "main":
            losses = super().losses(step)
            if "picture" in losses:
                parts = {name: losses.pop(name) for name in ("picture", "ingredients")}
                step.log({f"game_{name}": loss.detach() for name, loss in parts.items()})
                losses["translation"] = balanced(*parts.values())
            return losses
        if step.batch.images is None or not step.weight(self.opponents[step.player]):
            return {}
        still, opponent = self.still(step), self.objectives[step.player]
        if step.player == "critic":
            loss, gap, slope = critic_loss(opponent, still.image, still.recipe)
            step.log({"game_gap": gap, "game_slope": slope})
            return {"critic": loss}
        return {"discriminator": self.discriminator_loss(step, still.painted)}

    def discriminator_loss(self, step: Step, painted: Painted) -> Tensor:
        """Cross-entropy of photos and painted pictures, each given the condition's code."""
        photos = as_pictures(step.batch.images, self.args["picture"])
        discriminator = self.objectives["discriminator"]

        def judged(rows: slice) -> tuple[Tensor, Tensor]:
            fakes, code = painted.pictures[rows], painted.mean[rows]
            return discriminator(photos[rows].to(fakes.dtype), code), discriminator(fakes, code)

        real, fake = in_chunks(judged, len(photos), step.chunk, module=discriminator, where=photos.device)
        spread = painted.pictures.float().std(0, unbiased=False).mean() / photos.std(0, unbiased=False).mean().clamp(
            1e-6
        )
        told = {"photo": real, "painted": fake}
        step.log(
            {"game_spread": spread} | {f"game_{name}_real": x.detach().sigmoid().mean() for name, x in told.items()}
        )
        return told_as(real, True).mean() + told_as(fake, False).mean()

    @torch.no_grad()
    def still(self, step: Step) -> Still:
        """Made once for all opponents of a step; statistics are left to the encoders' own turn."""
        if step.shared is None or "still" not in step.shared:
            with resting_statistics(self):
                still = self.in_chunks(step, lambda batch: self._seen(batch, step))
            if step.shared is None:
                return still
            step.shared["still"] = still
        return step.shared["still"]

    def _seen(self, batch: Batch, step: Step) -> Still:
        image, recipes = self.encode_images(batch), self.encode_recipes(batch.recipes)
        painted = self.objectives["generator"](self.condition(image, recipes)) if step.weight("translation") else None
        return Still(image.embedding, recipes.embedding, painted)

    def row_losses(self, batch: Batch, step: Step, image: ImageFeatures, recipes: RecipeFeatures) -> dict[str, Tensor]:
        rows = {}
        if step.weight("alignment"):
            rows["alignment"] = -self.objectives["critic"](recipes.embedding)
        if step.weight("translation"):
            painted = self.objectives["generator"](self.condition(image, recipes))
            judged = self.objectives["discriminator"](painted.pictures, painted.mean)
            rows["picture"] = told_as(judged, True) + self.args["divergence"] * painted.divergence()
            told = self.objectives["ingredients"](image.embedding).float()
            rows["ingredients"] = F.binary_cross_entropy_with_logits(told, batch.labels, reduction="none").mean(1)
        return rows

    @torch.no_grad()
    def paint(self, image: ImageFeatures, recipes: RecipeFeatures, seed: int = 0) -> Tensor:
        """What the generator makes of some recipes: (B, 3, S, S) in [0, 1]. Where it reads photos, these are theirs."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.objectives["generator"](self.condition(image, recipes)).pictures.float() / 2 + 0.5

    def remarks(self, row: Mapping[str, float]) -> list[str]:
        said = []
        if (spread := row.get("game_spread", 1.0)) < 0.1:
            said.append(f"the game collapsed: painted pictures differ {spread:.3f} times as much as photos do")
        if (loss := row.get("discriminator", 1.0)) < 0.05:
            said.append(
                f"the game is lost: the discriminator is hardly ever wrong (loss {loss:.4f}) and teaches little"
            )
        return said


def balanced(a: Tensor, b: Tensor) -> Tensor:
    """Sum of two losses, the larger one scaled down to the value of the other, as ACME's code does."""
    low = torch.minimum(a, b).detach()
    return sum(loss * (low / loss.detach().clamp(1e-12)) for loss in (a, b))
