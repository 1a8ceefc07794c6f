"""A transformer over rows of unlike length that computes nothing for padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(NamedTuple):
    """Rows whose tokens attend together, as one grid (rows, length).

    cells (tokens,): where each token lies in the flattened grid; None: they fill it. mask: as attention takes it.
    """

    rows: int
    length: int
    tokens: int
    cells: Tensor | None = None
    mask: Tensor | None = None

    def grid(self, x: Tensor) -> Tensor:
        """(tokens, C) -> (rows, length, C)."""
        if self.cells is not None:
            x = x.new_zeros(self.rows * self.length, x.shape[1]).index_copy(0, self.cells, x)
        return x.view(self.rows, self.length, -1)

    def flat(self, grid: Tensor) -> Tensor:
        """(rows, length, C) -> (tokens, C)."""
        x = grid.flatten(0, 1)
        return x if self.cells is None else x.index_select(0, self.cells)


class Packing(NamedTuple):
    """The real cells of a padded grid (R, L), one after the other, in blocks of rows that attend together.

    Shape:
        cells (T,): real cells, of the flattened grid; column (T,) of each; length (rows of all blocks, 1); back (R,):
        where each row of the grid is among those of the blocks.
    """

    cells: Tensor
    column: Tensor
    blocks: list[Block]
    length: Tensor
    back: Tensor

    @classmethod
    def of(cls, mask: Tensor, one_grid: bool | None = None) -> Packing:
        """mask (R, L) bool, True where real: the first ones of each row, at least one.

        Args:
            one_grid: all rows are one padded block: wasteful, but few kernels, as a GPU likes it (the default there).
                Else rows of one length are a block: nothing is wasted.
        """
        if mask.is_cuda if one_grid is None else one_grid:
            row, column = mask.nonzero(as_tuple=True)
            cells = row * mask.shape[1] + column
            block = Block(*mask.shape, len(cells), cells, mask[:, None, None])
            return cls(cells, column, [block], mask.sum(1, keepdim=True), torch.arange(len(mask), device=mask.device))
        length, order = mask.sum(1).sort(stable=True)
        row, column = mask[order].nonzero(as_tuple=True)
        cells = order[row] * mask.shape[1] + column
        lengths, rows = (x.tolist() for x in length.unique_consecutive(return_counts=True))
        blocks = [Block(n, l, n * l) for l, n in zip(lengths, rows, strict=True)]
        # oneDNN builds new bfloat16 kernels for every number of rows (longer than a small product takes), so that
        # number is rounded up: the first cell is read a few times more, as rows of one token that nobody asks for.
        spare = -len(cells) % 64 if torch.is_autocast_enabled("cpu") else 0
        if spare:
            blocks.insert(0, Block(spare, 1, spare))
            cells, column = F.pad(cells, (spare, 0)), F.pad(column, (spare, 0))
        return cls(cells, column, blocks, F.pad(length, (spare, 0), value=1)[:, None], order.argsort() + spare)


class MaskedTransformer(nn.Module):
    """Post-norm transformer with learned positions, then the mean over the real positions.

    It computes what nn.TransformerEncoder does under a padding mask, without the padding: linear layers, norms and
    dropout work on one list of real tokens, attention on blocks of them. Dropout falls on tokens + positions too, and
    positions start as H-T's released code has them (Xavier's normal: std .06 for 50 x 512).

    Shape:
        x (R, L, E), mask (R, L) bool, True where real: the first ones of each row, at least one -> (R, E).
    """

    def __init__(
        self,
        dim: int,
        *,
        layers: int = 2,
        heads: int = 4,
        feedforward: int = 2048,
        dropout: float = 0.1,
        max_len: int = 50,
    ):
        super().__init__()
        self.position = nn.Parameter(nn.init.xavier_normal_(torch.empty(max_len, dim)))
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(dim, heads, feedforward, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
        return self.gather(x.flatten(0, 1), rows, mask)

    def gather(self, table: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        """The same where position (r, l) reads row `rows[r, l]` of table (N, E)."""
        if mask.shape[1] > len(self.position):
            raise ValueError(f"{mask.shape[1]} positions in a row; this transformer has {len(self.position)}")
        packing = Packing.of(mask)
        # F.embedding in place of indexing: its backward on a CPU adds whole rows, over all cores.
        x = F.embedding(rows.flatten()[packing.cells], table) + F.embedding(packing.column, self.position)  # (T, E)
        x = _dropout(x, self.dropout)
        for layer in self.encoder.layers:
            x = layer.norm1(x + _dropout(_attend(layer.self_attn, x, packing.blocks), layer.dropout1))
            hidden = _dropout(layer.activation(layer.linear1(x)), layer.dropout)
            x = layer.norm2(x + _dropout(layer.linear2(hidden), layer.dropout2))
        parts = x.split([block.tokens for block in packing.blocks])
        total = torch.cat([block.grid(part).sum(1) for part, block in zip(parts, packing.blocks, strict=True)])
        return F.embedding(packing.back, total / packing.length)


def _attend(attention: nn.MultiheadAttention, x: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Self-attention within the rows of each block. (T, E) -> (T, E)."""
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (T, 3 E)
    dropout, out = attention.dropout if attention.training else 0.0, []
    single = torch.promote_types(qkv.dtype, torch.float32)
    parts = (qkv.to(single) if qkv.device.type == "cpu" else qkv).split([block.tokens for block in blocks])
    with torch.autocast("cpu", enabled=False):  # rows are many and short: bfloat16 is slower there on a CPU
        for part, block in zip(parts, blocks, strict=True):
            heads = block.grid(part).unflatten(2, (3, attention.num_heads, -1))  # (n, L, 3, H, E / H)
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            values = F.scaled_dot_product_attention(q, k, v, attn_mask=block.mask, dropout_p=dropout)
            out.append(block.flat(values.transpose(1, 2).flatten(2)))
    return attention.out_proj(torch.cat(out).to(qkv.dtype))


def _dropout(x: Tensor, module: nn.Dropout) -> Tensor:
    """`module(x)`; on a CPU from 16 random bits per entry: torch draws 32 of them, entry by entry, on one core."""
    if x.device.type != "cpu" or not module.training or not module.p:
        return module(x)
    dropped = round(module.p * 2**16)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = (bits[: x.numel()].view(x.shape) >= dropped - 2**15).to(x.dtype)
    return x * keep.mul_(2**16 / (2**16 - dropped))
