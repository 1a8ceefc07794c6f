"""Query2Label: a learned query per ingredient looks for it in the image feature map (Liu et al., arXiv:2107.10834)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sine_positions(height: int, width: int, dim: int) -> Tensor:
    """(height * width, dim) fixed 2-D positions: half of the channels for rows, half for columns (arXiv:2005.12872)."""
    if dim % 4:
        raise ValueError(f"classifier_dim {dim}: sine positions need a multiple of 4")
    frequency = torch.exp(-math.log(10_000) * torch.arange(0, dim // 2, 2) / (dim // 2))  # (dim / 4,)

    def wave(steps: int) -> Tensor:
        angle = 2 * math.pi * (torch.arange(steps) + 1)[:, None] / steps * frequency
        return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)  # (steps, dim / 2)

    rows = wave(height)[:, None].expand(-1, width, -1)
    columns = wave(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


class AttentionLayer(nn.Module):
    """Post-norm attention and feed-forward; positions enter queries and keys, never values (DETR).

    As an encoder layer it attends to its own input. As a decoder layer it attends to the memory alone: without
    self-attention the queries of different ingredients do not see each other.
    """

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, feedforward), nn.ReLU(), nn.Dropout(dropout), nn.Linear(feedforward, dim)
        )
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, memory: Tensor, memory_position: Tensor) -> Tensor:
        attended = self.attention(x + position, memory + memory_position, memory, need_weights=False)[0]
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.dropout(self.feedforward(x)))


class IngredientClassifier(nn.Module):
    """Image feature map -> one logit per ingredient class.

    One encoder layer, two decoder layers, a LayerNorm after the last. The class queries start at N(0, 1): at the small
    scale that is usual for embeddings they start out alike, and classes part slowly.

    Args:
        channels: C of the feature map. Where it is `dim`, the map enters as it is, else through a 1 x 1 convolution.
        classes: K.
        dim, heads, feedforward: of the transformer; 2048, 4 and 8192 in the paper.

    Shape:
        (B, C, h, w) -> logits (B, K). They are not log-odds of the truth: see `losses.posterior`.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        dim: int = 2048,
        heads: int = 4,
        feedforward: int = 8192,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.project = nn.Identity() if channels == dim else nn.Conv2d(channels, dim, 1)
        self.encoder = AttentionLayer(dim, heads, feedforward, dropout)
        self.decoder = nn.ModuleList(AttentionLayer(dim, heads, feedforward, dropout) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        for part in (self.encoder, self.decoder):
            for weight in part.parameters():
                if weight.ndim > 1:
                    nn.init.xavier_uniform_(weight)
        self.queries = nn.Parameter(torch.randn(classes, dim))
        # Group-wise linear: each query has its own row and bias.
        self.weight = nn.Parameter(torch.empty(classes, dim).uniform_(-1, 1) / math.sqrt(dim))
        self.bias = nn.Parameter(torch.empty(classes).uniform_(-1, 1) / math.sqrt(dim))

    def forward(self, feature_map: Tensor) -> Tensor:
        x = self.project(feature_map)
        where = sine_positions(*x.shape[2:], x.shape[1]).to(x)
        x = x.flatten(2).transpose(1, 2)  # (B, h w, dim)
        memory = self.encoder(x, where, x, where)
        classes = torch.zeros_like(self.queries).expand(len(x), -1, -1)  # (B, K, dim)
        for layer in self.decoder:
            classes = layer(classes, self.queries, memory, where)
        return (self.norm(classes) * self.weight).sum(2) + self.bias
