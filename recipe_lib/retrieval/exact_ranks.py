"""Exact ranks of the true pairs in float64, for about the price of a bfloat16 product.

Pairs are ordered by the similarity of the true pair, so that hard queries lie together, and similarities go by in
tiles. A tile is computed in bfloat16 where that is fast; cells farther from a query's true similarity than a proven
bound are decided. The open cells, few as a rule, are decided by float32 products summed in float64, and what then
remains by the float64 dot products that define the rank. A tile with too many open cells is computed again in float32,
and then in float64.

The bound, for |a|, |b| <= 1 of length d and their rounded copies a', b', with r the largest |a - a'| or |b - b'|, which
is measured: |a.b - a'.b'| <= |a - a'| |b'| + |a| |b - b'| <= r (2 + r) by Cauchy-Schwarz. Summing a'.b' in any order
adds at most c g (1 + r)^2, g = d u / (1 - d u), u = 2^-24 (Higham, 2002, 3.1; products of bfloat16 are exact in
float32), with c = 1, but 4 for bfloat16, where tensor cores truncate; storing it in bfloat16 at most 2^-8 of itself.
k distances of at most 2, each off by at most e, have a product off by at most (2 + e)^k - 2^k.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from recipe_lib import devices
from recipe_lib.progress import progress

LEVELS = (torch.bfloat16, torch.float32, torch.float64)
CROWDED = 1 / 256  # share of open cells above which the tile at the next level costs less than they do one by one

Embeddings = Tensor | Sequence[Tensor]


class Pairs:
    """True pairs in ascending order of their similarity `true`, and the similarity of any image to any recipe.

    Arguments are positions in that order (`order` holds their rows); side 0 is the images, side 1 the recipes.
    """

    @torch.no_grad()
    def __init__(self, images: Embeddings, recipes: Embeddings, device: str | torch.device | None = None) -> None:
        sides = [[x] if isinstance(x, Tensor) else list(x) for x in (images, recipes)]
        shapes = [[tuple(x.shape) for x in side] for side in sides]
        if shapes[0] != shapes[1] or {len(s) for s in shapes[0]} != {2} or len({s[0] for s in shapes[0]}) > 1:
            raise ValueError(f"images {shapes[0]} and recipes {shapes[1]} must both be (N, D)")
        self.device = torch.device(device or sides[0][0].device)
        moved = {id(x): x.to(self.device) for side in sides for x in side}  # one tensor may stand in several places
        self.sides = [[moved[id(x)] for x in side] for side in sides]
        self.n, self.kinds, self.widths = shapes[0][0][0], range(len(shapes[0])), [s[1] for s in shapes[0]]
        self.step = max(1, (1 << (19 if self.device.type == "cpu" else 25)) // max(self.widths))
        self.order = torch.arange(self.n, device=self.device)
        names = zip(self.sides, ("image", "recipe"), strict=True)
        self.norms = [[_norms(x, name, self.step) for x in side] for side, name in names]
        self.true, self.order = self.dots(self.order, self.order).sort()
        self.first = 0 if devices.fast_bfloat16(self.device) else 1
        copies = {id(x): self._copies(s, k) for s, side in enumerate(self.sides) for k, x in enumerate(side)}
        self.copies = [[copies[id(x)] for x in side] for side in self.sides]
        self.rooms: dict[object, Tensor] = {}

    def _copies(self, side: int, k: int) -> list[tuple[Tensor, float]]:
        """Unit vectors (N, D) in bfloat16 (empty where slow) and float32, each with its largest rounding error."""
        copies = []
        for level in (0, 1):
            shape, off = (self.n if level >= self.first else 0, self.widths[k]), 0.0
            copy = torch.empty(shape, dtype=LEVELS[level], device=self.device)
            for start in range(0, len(copy), self.step):
                at = slice(start, start + self.step)
                unit = self.unit(side, k, at)
                copy[at] = unit
                off = max(off, float((copy[at].double() - unit).norm(dim=1).max()))
            copies.append((copy, off))
        return copies

    def unit(self, side: int, k: int, at: Tensor | slice) -> Tensor:
        """float64 unit vectors."""
        rows = self.order[at]
        return self.sides[side][k][rows].double() / self.norms[side][k][rows, None]

    def near(self, level: int, pairwise: bool = False) -> Tensor:
        """(N,) how far a score near `true` may be from its float64 value: the bound at the top of this file."""
        u, stored = 2.0 ** -(53 if level == 2 else 24), 1.01 * 2.0**-8 * (level == 0)
        errors = []
        for k, d in enumerate(self.widths):
            r = max(side[k][level][1] for side in self.copies) if level < 2 else 0.0
            # At level 2 three float64 sums meet: the product, the score that defines the rank and the true one.
            summed = 2 * u if pairwise else (4, 1, 3)[level] * d * u / (1 - d * u)
            errors.append(r * (2 + r) + summed * (1 + r) ** 2 + 8 * u)  # 8 u: thresholds, 1 - cosine, their product
        if len(errors) == 1:
            return errors[0] + stored * (self.true.abs() + errors[0])
        return torch.full_like(self.true, prod(2 + e + stored * (1 + e) for e in errors) - 2 ** len(errors))

    def room(self, name: object, m: int, n: int, dtype: torch.dtype) -> Tensor:
        """(m, n) memory to write to, the same for every tile."""
        old = self.rooms.get((name, dtype))
        if old is None or old.numel() < m * n:
            self.rooms[name, dtype] = torch.empty(m * n, dtype=dtype, device=self.device)
        return self.rooms[name, dtype][: m * n].view(m, n)

    def tile(self, level: int, rows: slice, cols: slice) -> Tensor:
        """Scores (rows, cols), off by at most near(level), in float32, or float64 at level 2."""
        cosines = []
        for k in self.kinds:
            if level == 2:
                cosines.append(self.unit(0, k, rows) @ self.unit(1, k, cols).T)
                continue
            a, b = self.copies[0][k][level][0][rows], self.copies[1][k][level][0][cols]
            out = torch.mm(a, b.T, out=self.room(k, len(a), len(b), a.dtype))
            cosines.append(self.room(k, len(a), len(b), torch.float32).copy_(out) if level == 0 else out)
        return _combine(cosines)

    def dots(self, i: Tensor, j: Tensor, exact: bool = True) -> Tensor:
        """Scores (P,) of images i and recipes j: those that define a rank, or off by at most near(1, pairwise=True)."""

        def dot(k: int, i: Tensor, j: Tensor) -> Tensor:
            if exact:
                return (self.unit(0, k, i) * self.unit(1, k, j)).sum(1)
            a, b = (side[k][1][0].index_select(0, at) for side, at in zip(self.copies, (i, j), strict=True))
            return a.mul_(b).sum(1, dtype=torch.float64)

        pieces = zip(i.split(self.step), j.split(self.step), strict=True)
        return torch.cat([_combine([dot(k, *piece) for k in self.kinds]) for piece in pieces])

    def distinct_dots(self, i: Tensor, j: Tensor) -> Tensor:
        """`dots`, once for all pairs of the same vectors: a collapsed model leaves every pair to decide."""
        pair, back = (self.first_equal[0][i] * self.n + self.first_equal[1][j]).unique(return_inverse=True)
        return self.dots(pair // self.n, pair % self.n)[back]

    @cached_property
    def first_equal(self) -> list[Tensor]:
        """For images and for recipes, (N,): the position that stands for all with the same embeddings."""
        groups = [torch.cat(side, 1)[self.order].unique(dim=0, return_inverse=True)[1] for side in self.sides]
        every = torch.arange(self.n, device=self.device)
        return [torch.empty_like(every).scatter_(0, group, every)[group] for group in groups]


def _norms(x: Tensor, name: str, step: int) -> Tensor:
    norms = torch.cat([rows.double().norm(dim=1) for rows in x.split(step)])
    bad = ~((norms > 5e-13) & norms.isfinite())  # NaN fails every comparison
    if bad.any():
        raise ValueError(f"{name} embedding {int(bad.nonzero()[0])} is zero or not finite; it cannot be ranked")
    return norms.clamp_min(1e-12)


def _combine(cosines: list[Tensor]) -> Tensor:
    """The cosine, or minus the product of 1 - cosine; in place."""
    if len(cosines) == 1:
        return cosines[0]
    first, *others = (cosine.neg_().add_(1) for cosine in cosines)
    for other in others:
        first.mul_(other)
    return first.neg_()


@contextmanager
def _honest_products() -> Iterator[None]:
    """No TF32 or bfloat16 inside float32 products and no bfloat16 partial sums, whatever the program has chosen."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, cpu.fp32_precision, cuda.allow_bf16_reduced_precision_reduction
    cuda.fp32_precision, cpu.fp32_precision, cuda.allow_bf16_reduced_precision_reduction = "ieee", "ieee", False
    try:
        yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision, cuda.allow_bf16_reduced_precision_reduction = before


def _cells(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the True cells of (m, n); eight cells per look, because few are."""
    m, n = mask.shape
    if n % 8 or not mask.numel():
        return mask.nonzero(as_tuple=True)
    row, word = mask.view(torch.int64).nonzero(as_tuple=True)
    which, bit = mask.view(m, n // 8, 8)[row, word].nonzero(as_tuple=True)
    return row[which], word[which] * 8 + bit


@torch.no_grad()
@_honest_products()
def bag_ranks(pairs: Pairs, members: Tensor, block: int | None = None) -> Tensor:
    """(4, N, B) int32 i2r, r2i, i2r_ties, r2i_ties of every pair among the members (N, B), 0 or 1, of B bags."""
    tall = block or (512 if pairs.device.type == "cpu" else 2048)
    counter = _Counter(pairs, members)
    for top in progress(range(0, pairs.n, tall), "exact ranks, strips"):
        for left in range(0, pairs.n, 4 * tall):
            counter.add_tile((slice(top, min(top + tall, pairs.n)), slice(left, min(left + 4 * tall, pairs.n))))
    return torch.empty_like(counter.counts).index_copy_(1, pairs.order, counter.counts).cpu()


class _Screened(NamedTuple):
    """One direction of a tile: its queries that have something to count, a row each (a column each in direction 1)."""

    queries: Tensor  # (Q,) numbers within the strip
    above: Tensor  # bool: candidates that are surely above the true one
    open_cells: tuple[Tensor, Tensor]  # rows and columns of the candidates that may be


class _Counter:
    """Counts the candidates above the true one in all bags, tile by tile.

    Direction 0 has the images, the rows of a tile, as queries; direction 1 the recipes, its columns. `strips` are the
    rows and the columns of a tile: strips[direction] holds its queries, strips[1 - direction] its candidates.
    """

    def __init__(self, pairs: Pairs, members: Tensor) -> None:
        self.pairs, self.members = pairs, members.to(pairs.device)[pairs.order]
        self.counts = torch.zeros(4, pairs.n, members.shape[1], dtype=torch.int32, device=pairs.device)
        self.counts[:2] = 1
        self.near = {level: pairs.near(level) for level in range(pairs.first, 3)}
        self.near_pair = pairs.near(1, pairwise=True)
        # The level that a strip of tiles needs, by direction and first query: its neighbours will need it too.
        self.levels: dict[tuple[int, int], int] = defaultdict(lambda: pairs.first)

    def add_tile(self, strips: Sequence[slice]) -> None:
        """Screen both directions at the first level that leaves few cells open, count, decide the open cells."""
        level = max(self.levels[way, strip.start] for way, strip in enumerate(strips))
        while (screened := self.screen(level, strips)) is None:
            level += 1
        for way, part in enumerate(screened):
            self.count_above(way, part, strips)
            if len(part.open_cells[0]):
                cells = (part.queries[x] if side == way else x for side, x in enumerate(part.open_cells))
                self.decide(way, level, [x + strip.start for x, strip in zip(cells, strips, strict=True)])

    def screen(self, level: int, strips: Sequence[slice]) -> list[_Screened] | None:
        """Both directions of a tile; None where a direction is too crowded at this level."""
        score, screened = self.pairs.tile(level, *strips), []
        offset = strips[0].start - strips[1].start
        if -score.shape[0] < offset < score.shape[1]:
            score.diagonal(offset).fill_(-torch.inf)  # the true pairs themselves
        for way, strip in enumerate(strips):
            part = self.screen_direction(way, level, score, strip)
            if level < 2 and len(part.open_cells[0]) > CROWDED * score.numel():
                self.levels[way, strip.start] = level + 1
                return None
            screened.append(part)
        return screened

    def screen_direction(self, way: int, level: int, score: Tensor, strip: slice) -> _Screened:
        """Each candidate of a tile is above the true one, below it, or too near to tell."""
        true, near = self.pairs.true[strip], self.near[level][strip]
        low, high = ((true + sign * near).to(score.dtype) for sign in (-1, 1))
        queries = torch.arange(len(low), device=score.device)
        if level == self.pairs.first:  # as a rule few queries have anything to count
            busy = (score.amax(1 - way) >= low).nonzero()[:, 0]
            if 2 * len(busy) < len(low):
                score, queries = score.index_select(way, busy), busy
        low, high = (bound[queries].unsqueeze(1 - way) for bound in (low, high))
        above = torch.gt(score, high, out=self.pairs.room(("above", way), *score.shape, torch.bool))
        near_true = torch.ge(score, low, out=self.pairs.room("open", *score.shape, torch.bool)).bitwise_xor_(above)
        return _Screened(queries, above, _cells(near_true))

    def count_above(self, way: int, part: _Screened, strips: Sequence[slice]) -> None:
        """Count those that are surely above, in every bag that holds them: one product with the members."""
        above = self.pairs.room("counted", *part.above.shape, torch.float32).copy_(part.above)
        counted = (above if way == 0 else above.T) @ self.members[strips[1 - way]]
        self.counts[way].index_add_(0, part.queries + strips[way].start, counted.int())

    def decide(self, way: int, level: int, cells: Sequence[Tensor]) -> None:
        """Count the open cells of one direction, given as images and recipes: in float32 where that tells, exactly."""
        true = self.pairs.true
        if level < 2:
            near, gap = self.near_pair[cells[way]], self.pairs.dots(*cells, exact=False) - true[cells[way]]
            self.add(way, way, cells, gap > near)
            cells = [x[gap.abs() <= near] for x in cells]
        score = (self.pairs.distinct_dots if len(cells[0]) > 4096 else self.pairs.dots)(*cells)
        self.add(way, way, cells, score >= true[cells[way]])
        self.add(2 + way, way, cells, score == true[cells[way]])

    def add(self, row: int, way: int, cells: Sequence[Tensor], where: Tensor) -> None:
        """Count some cells, one by one, in every bag that holds their candidate."""
        self.counts[row].index_add_(0, cells[way][where], self.members[cells[1 - way][where]].int())
