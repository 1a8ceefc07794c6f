"""What JE and its successors share: a photo backbone, LSTMs over the recipe, categories of dishes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from recipe_lib.data.loading import Batch
from recipe_lib.encoders.image import ImageEncoder
from recipe_lib.encoders.lstm import LSTMEncoder
from recipe_lib.systems.base import Step, System


class Recurrent(System):
    """Any timm backbone; LSTMs over ingredients and steps. A subclass says what it is trained on.

    Args of its own: instruction_dim, see `LSTMEncoder`; `config.recipe_dim` is the width of a word vector.
    """

    defaults: ClassVar[dict[str, Any]] = {"instruction_dim": 1024}

    def build(self) -> None:
        config = self.config
        self.image_encoder = ImageEncoder(config.image_model, config.embed_dim, **config.photo_backbone)
        steps = self.args["instruction_dim"]
        self.recipe_encoder = LSTMEncoder(
            config.vocabulary, config.embed_dim, dim=config.recipe_dim, instruction_dim=steps
        )

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"category"} if self.config.num_categories else ())

    def sides(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The category (B, 1) goes with the embeddings: a loss over all devices needs those of all pairs."""
        return {} if batch.category is None else {"category": batch.category[:, None].float()}

    def category(self, sides: dict[str, Tensor], loss: str) -> Tensor:
        """(B,) int64, -1 for none. ValueError where the study has none at all."""
        if "category" not in sides:
            raise ValueError(f"{self.config.method}: there are no categories; set categories, or {loss}_weight: 0.0")
        return sides["category"][:, 0].long()
