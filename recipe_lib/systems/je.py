"""JE, the joint embedding of im2recipe: cosine loss with mismatched pairs, and categories (Salvador et al., CVPR 2017).

As the paper; where the released code differs, it is said in `params/methods/je_recipe1m.yaml`. Two things are not
JE's: vectors of steps (see `encoders/lstm.py`), and that a mismatched photo is another of the batch, of which there are
as many as recipes, in place of any other of the data set.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipe_lib.losses import category_loss, cosine_loss, mismatches
from recipe_lib.systems.base import Step
from recipe_lib.systems.recurrent import Recurrent


class JE(Recurrent):
    """One classifier of categories for both sides, on normalised embeddings.

    Args of its own: mismatched, the probability that a recipe meets the photo of another.
    """

    defaults: ClassVar[dict[str, Any]] = Recurrent.defaults | {"mismatched": 0.8}

    def build(self) -> None:
        super().build()
        if self.config.num_categories:
            self.objectives["categories"] = nn.Linear(self.config.embed_dim, self.config.num_categories)

    def losses(self, step: Step) -> dict[str, Tensor]:
        return super().losses(step._replace(loss=partial(self._cosine, step)))

    def _cosine(self, step: Step, image: Tensor, recipe: Tensor) -> Tensor:
        # One draw for all devices, and the same in a resumed run.
        generator = torch.Generator().manual_seed(int(step.epoch * 2**24))
        partner = mismatches(len(recipe), self.args["mismatched"], generator).to(recipe.device)
        return cosine_loss(image, recipe, partner, step.margin)

    def further(self, sides: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
        if not step.weight("category"):
            return {}
        category, classify = self.category(sides, "category"), self.objectives["categories"]
        both = (classify(F.normalize(sides[side].float(), dim=1)) for side in ("image", "recipe"))
        return {"category": torch.stack([category_loss(logits, category) for logits in both]).sum()}
