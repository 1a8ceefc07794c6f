"""What systems with opponents have in common: modality alignment, and translation between photo and recipe (ACME)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipe_lib.data.loading import Batch
from recipe_lib.devices import mean_over_devices
from recipe_lib.encoders.chunks import in_chunks, resting_statistics
from recipe_lib.encoders.recipe import RecipeFeatures
from recipe_lib.losses import category_loss
from recipe_lib.objectives.critic import ModalityCritic, critic_loss
from recipe_lib.objectives.discriminator import Discriminator, as_pictures, told_as
from recipe_lib.objectives.generator import Generator, Painted
from recipe_lib.systems.base import ImageFeatures, Step, System


class Still(NamedTuple):
    """What opponents look at, without gradients: embeddings (B, D); photos and what is painted, where pictures are."""

    image: Tensor
    recipe: Tensor
    photos: Tensor | None = None
    painted: Painted | None = None


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
        """Make the opponents and what translates; with `categories`, the discriminator and the photo tell them too."""
        args, dim = self.args, self.config.embed_dim
        size, code = (args["picture"], args["channels"]), args["code"]
        self.objectives["critic"] = ModalityCritic(dim)
        self.objectives["discriminator"] = Discriminator(*size, code=code, categories=categories)
        self.objectives["generator"] = Generator(dim, *size, code=code, noise=args["noise"])
        self.objectives["ingredients"] = _layers(dim, *args["hidden"], self.config.num_classes)
        if categories:
            self.objectives["categories"] = _layers(dim, *args["hidden"][:1], categories)

    def players(self) -> dict[str, list[nn.Parameter]]:
        opponents = {name: list(self.objectives[name].parameters()) for name in self.opponents}
        theirs = {id(parameter) for own in opponents.values() for parameter in own}
        main = [p for p in self.parameters() if p.requires_grad and id(p) not in theirs]
        return opponents | {"main": main}

    def condition(self, image: ImageFeatures, recipes: RecipeFeatures) -> Tensor:
        """(B, D) that the generator paints from."""
        return self.read(recipes.embedding)

    def apart(self, image: ImageFeatures, recipes: RecipeFeatures) -> tuple[Tensor, Tensor]:
        """Photos and recipes (B, D) as the critic sees them."""
        return image.embedding, recipes.embedding

    def read(self, embedding: Tensor) -> Tensor:
        """An embedding (B, D) as the generator and the classifiers read it."""
        return embedding

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

        def judged(rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
            photos, code = opponent.features(still.photos[rows]), still.painted.mean[rows]
            kind = opponent.category(photos) if opponent.category else None
            return opponent.judge(photos, code), opponent(still.painted.pictures[rows], code), kind

        photos = still.photos
        real, fake, kind = in_chunks(judged, len(photos), step.chunk, module=opponent, where=photos.device)
        told = {"photo": real, "painted": fake}
        figures = {f"game_{name}_real": logits.detach().sigmoid().mean() for name, logits in told.items()}
        step.log(figures | {"game_spread": spread(still.painted.pictures, photos)})
        loss = told_as(real, True).mean() + told_as(fake, False).mean()
        if kind is None:
            return {"discriminator": loss}
        # A mean over the labelled rows of all devices, of which this one has its share.
        labelled = (step.batch.category >= 0).sum()
        share = labelled / mean_over_devices(labelled).clamp(1e-12)
        return {"discriminator": loss + share * category_loss(kind, step.batch.category)}

    @torch.no_grad()
    def still(self, step: Step) -> Still:
        """Made once for all opponents of a step; statistics are left to the encoders' own turn."""
        shared = {} if step.shared is None else step.shared
        if "still" not in shared:
            with resting_statistics(self):
                shared["still"] = self.in_chunks(step, lambda batch: self.shown(batch, step))
        return shared["still"]

    def shown(self, batch: Batch, step: Step) -> Still:
        """What opponents see of a batch, or of a chunk of one."""
        image, recipes = self.encode_images(batch), self.encode_recipes(batch.recipes)
        if not step.weight("translation"):
            return Still(*self.apart(image, recipes))
        painted = self.objectives["generator"](self.condition(image, recipes))
        photos = as_pictures(batch.images, self.args["picture"]).to(painted.pictures.dtype)
        return Still(*self.apart(image, recipes), photos, painted)

    def row_losses(self, batch: Batch, step: Step, image: ImageFeatures, recipes: RecipeFeatures) -> dict[str, Tensor]:
        rows = {}
        if step.weight("alignment"):
            rows["alignment"] = -self.objectives["critic"](self.apart(image, recipes)[1])
        if step.weight("translation"):
            painted = self.objectives["generator"](self.condition(image, recipes))
            discriminator, seen = self.objectives["discriminator"], self.read(image.embedding)
            features = discriminator.features(painted.pictures)
            judged = discriminator.judge(features, painted.mean)
            rows["picture"] = told_as(judged, True) + self.args["divergence"] * painted.divergence()
            told = self.objectives["ingredients"](seen).float()
            rows["ingredients"] = F.binary_cross_entropy_with_logits(told, batch.labels, reduction="none").mean(1)
            if batch.category is not None:
                rows["picture"] = rows["picture"] + _told_kind(discriminator.category(features), batch.category)
                kind = self.objectives["categories"](seen)
                rows["ingredients"] = rows["ingredients"] + _told_kind(kind, batch.category)
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
            said.append(f"the game is lost: the discriminator is hardly ever wrong (loss {loss:.4f})")
        return said


def _layers(*widths: int) -> nn.Sequential:
    layers = [x for a, b in pairwise(widths) for x in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers[:-1])


def _told_kind(logits: Tensor, category: Tensor) -> Tensor:
    """(B, C) logits, (B,) categories, -1 for none -> (B,) cross-entropy, 0 for none."""
    return F.cross_entropy(logits.float(), category, ignore_index=-1, reduction="none")


def spread(painted: Tensor, photos: Tensor) -> Tensor:
    """How much pictures (B, 3, S, S) differ within a batch, as a share of how much photos do."""
    own, theirs = (x.float().std(0, unbiased=False).mean() for x in (painted, photos))
    return own / theirs.clamp(1e-6)


def balanced(a: Tensor, b: Tensor) -> Tensor:
    """Sum of two losses, the larger one scaled down to the value of the other, as ACME's code does.

    Their values are those of all devices, so that all scale alike.
    """
    values = [mean_over_devices(loss.detach()) for loss in (a, b)]
    low = torch.minimum(*values)
    return sum(loss * (low / value.clamp(1e-12)) for loss, value in zip((a, b), values, strict=True))
