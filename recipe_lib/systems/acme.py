"""ACME: hardest triplets, alignment and translation on JE's encoders (Wang et al., CVPR 2019, arXiv:1905.01273).

As the paper, without the faults of the released code: ingredients are told by a cross-entropy each (its
MultiLabelMarginLoss reads a multi-hot vector as indices), the discriminator's categories train on photos, photos and
pictures have one range, nothing is chosen on the test split. Two of its habits are arguments.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipe_lib.data.loading import Batch
from recipe_lib.encoders.recipe import RecipeFeatures
from recipe_lib.losses import nearest_triplet_loss
from recipe_lib.systems.base import ImageFeatures, Step
from recipe_lib.systems.games import Game
from recipe_lib.systems.recurrent import Recurrent


class SharedHead(nn.Module):
    """One linear layer and one scale for both sides, each side normalised by its own batches; a tanh follows.

    Args:
        of: the head whose weights this one uses; None: it has its own.
        batch_statistics: normalise by the batch in evaluation too.

    Shape:
        (B, D) -> (B, D).
    """

    def __init__(self, dim: int, of: SharedHead | None = None, batch_statistics: bool = False):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, track_running_stats=not batch_statistics)
        if of is None:
            self.linear, self.gain = nn.Linear(dim, dim), nn.Parameter(torch.ones(dim))
            self.shift = nn.Parameter(torch.zeros(dim))
        self._of = (of or self,)  # a tuple is no submodule: what is shared is there, and saved, once

    def forward(self, x: Tensor) -> Tensor:
        own = self._of[0]
        return self.norm(own.linear(x)) * own.gain + own.shift


class ACME(Game, Recurrent):
    """LSTMs and a backbone, a head that both share, a critic before it, categories in either translation.

    Args of its own, besides those of `Game` and `Recurrent`:
        cross_modal_only: the nearest negative is one of the other side; see `nearest_triplet_loss`.
        head: "trained", or "random": as in the code, where no optimizer holds it.
        statistics: of the head in evaluation, "running", or "batch": as in the code, which never sets it to
            evaluation. Embeddings then depend on what else is in the batch.
    """

    defaults: ClassVar[dict[str, Any]] = (
        Game.defaults | Recurrent.defaults | {"cross_modal_only": False, "head": "trained", "statistics": "running"}
    )

    def build(self) -> None:
        Recurrent.build(self)
        args, head = self.args, None
        for name, choices in {"head": ("trained", "random"), "statistics": ("running", "batch")}.items():
            if args[name] not in choices:
                raise ValueError(f"system_args {name}: {args[name]!r} is not in [{'|'.join(choices)}]")
        for encoder in (self.recipe_encoder, self.image_encoder):
            head = SharedHead(self.config.embed_dim, head, args["statistics"] == "batch")
            encoder.fc = nn.Sequential(encoder.fc, nn.Tanh(), head.requires_grad_(args["head"] == "trained"))
        self.play(self.config.num_categories)

    def sides(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return {}  # a category concerns its own row alone

    def apart(self, image: ImageFeatures, recipes: RecipeFeatures) -> tuple[Tensor, Tensor]:
        """Before the shared head."""
        photo = self.image_encoder.backbone.forward_head(image.features, pre_logits=True)
        return self.image_encoder.fc[:2](photo), self.recipe_encoder.fc[:2](torch.cat(recipes.components, 1))

    def read(self, embedding: Tensor) -> Tensor:
        return F.normalize(embedding, dim=1)

    def losses(self, step: Step) -> dict[str, Tensor]:
        nearest = partial(nearest_triplet_loss, margin=step.margin, cross_modal_only=self.args["cross_modal_only"])
        return super().losses(step._replace(loss=nearest))
