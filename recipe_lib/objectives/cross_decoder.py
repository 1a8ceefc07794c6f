"""A cross decoder: a recipe's tokens query those of its photo, and the generator paints from what comes out.

A reconstruction: the follow-up of TNLBT is known to us from slides alone ("fusing before generating"), which give no
formula. TFood's released code has such a cross-attention, of 4 layers and 4 heads (mshukor/TFood).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CrossDecoder(nn.Module):
    """Transformer decoder layers over the recipe's tokens, with the photo's tokens and one learnt token as memory.

    The recipe's embedding is the first token and what is read out. The learnt token is all there is where no photo is
    given, so that one can look at what the recipe alone would have painted.

    Args:
        embed_dim: D, of the recipe's embedding and of what comes out.
        dim: E, of the recipe's component vectors, and the width inside.
        channels: C, of the photo's feature map.

    Shape:
        recipe (B, D), components (B, E) each, feature_map (B, C, h, w) or None -> (B, D) in (-1, 1).
    """

    def __init__(
        self, embed_dim: int, dim: int, channels: int, *, layers: int, heads: int, feedforward: int, dropout: float
    ):
        super().__init__()
        self.recipe, self.photo = nn.Linear(embed_dim, dim), nn.Linear(channels, dim)
        self.norm, self.nothing = nn.LayerNorm(dim), nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        layer = nn.TransformerDecoderLayer(dim, heads, feedforward, dropout, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers)
        self.fc = nn.Linear(dim, embed_dim)

    def forward(self, recipe: Tensor, components: tuple[Tensor, ...], feature_map: Tensor | None) -> Tensor:
        tokens = torch.stack([self.recipe(recipe), *components], 1)  # (B, 1 + components, E)
        memory = self.nothing.expand(len(recipe), -1, -1)
        if feature_map is not None:
            patches = self.norm(self.photo(feature_map.flatten(2).transpose(1, 2)))  # (B, h w, E)
            memory = torch.cat([memory.to(patches.dtype), patches], 1)
        return torch.tanh(self.fc(self.decoder(tokens, memory)[:, 0]))
