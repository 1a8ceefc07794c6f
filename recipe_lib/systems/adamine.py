"""AdaMine: triplets of instances and of categories, each kind normalised by those that still cost (arXiv:1804.11146).

As the paper, L_instance + .3 L_semantic; its code takes .1 and divides the total by the four terms. Its ablations:
`semantic_weight: 0.0` (instances alone), `triplets: semantic` of `system_args` (categories alone), `mining: all` (plain
means).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from recipe_lib.losses import semantic_triplet_loss
from recipe_lib.systems.base import Step
from recipe_lib.systems.recurrent import Recurrent


class AdaMine(Recurrent):
    """JE's encoders; in half of each batch are pairs of one category.

    Args of its own:
        triplets: "both", or "semantic": those of categories alone; the loss "retrieval" is theirs then.
    """

    defaults: ClassVar[dict[str, Any]] = Recurrent.defaults | {"triplets": "both"}
    half_of_a_kind = True

    def build(self) -> None:
        super().build()
        if self.args["triplets"] not in ("both", "semantic"):
            raise ValueError(f"system_args triplets: {self.args['triplets']!r} is not in [both|semantic]")

    def losses(self, step: Step) -> dict[str, Tensor]:
        losses = super().losses(step)
        if self.args["triplets"] == "semantic" and "semantic" in losses:
            losses["retrieval"] = losses.pop("semantic")
        return losses

    def further(self, sides: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        if not step.weight("semantic"):
            return {}
        category = self.category(sides, "semantic")
        loss = semantic_triplet_loss(sides["image"], sides["recipe"], category, step.margin, step.mining)
        return {"semantic": loss}
