"""From the store to batches: one object per step, made whole by the dataset, so that collation is not done twice."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from recipe_lib import devices
from recipe_lib.data import batches
from recipe_lib.data.context import Window, discs, stored_dish, swap_context
from recipe_lib.data.images import RandAugment, centre, decode_jpeg
from recipe_lib.data.store import Split, padded
from recipe_lib.data.text import PAD

GRACE = 30  # seconds that a loader's process lives on after SIGTERM


@dataclass
class RecipeBatch:
    """Recipes as token ids. Each distinct sentence of the batch is there once; recipes point to it.

    Shape:
        tokens (U, L) int64, padded with PAD; title (B,), ingredients (B, S), instructions (B, T): rows of `tokens`,
        -1 where a recipe has no more sentences.
    """

    tokens: Tensor
    title: Tensor
    ingredients: Tensor
    instructions: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RecipeBatch:
        return RecipeBatch(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def part(self, rows: slice) -> RecipeBatch:
        """Some of the recipes; the sentences stay all there."""
        return RecipeBatch(self.tokens, self.title[rows], self.ingredients[rows], self.instructions[rows])

    def pin_memory(self) -> RecipeBatch:
        """In page-locked memory, whence a GPU copies by itself; DataLoader calls this."""
        return RecipeBatch(*(getattr(self, f.name).pin_memory() for f in fields(self)))


@dataclass
class Batch:
    """One step; of text-only recipes there are no more than `recipes` and `rows`.

    Shape:
        images (B, 3, H, W) uint8, or what a frozen backbone made of them, (B, C, h, w) float16; labels (B, K) float;
        visible (B, K) float, the labels that show in the photo, None where nobody knows; descriptions (B, L) int64 ids
        of CLIP; segments (B, n, E) features or (B, n, 3, S, S) uint8 pixels, their mask (B, n) bool; category (B,)
        int64, -1 for none. The last four are None for systems that do not read them.
    """

    recipes: RecipeBatch
    rows: Tensor
    images: Tensor | None = None
    labels: Tensor | None = None
    descriptions: Tensor | None = None
    segments: Tensor | None = None
    segment_mask: Tensor | None = None
    visible: Tensor | None = None
    category: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        move = (getattr(self, f.name) for f in fields(self))
        return Batch(*(None if x is None else x.to(device, non_blocking=non_blocking) for x in move))

    def part(self, rows: slice) -> Batch:
        """Some rows of the batch."""
        rest = (getattr(self, f.name) for f in fields(self)[1:])
        return Batch(self.recipes.part(rows), *(None if x is None else x[rows] for x in rest))

    def pin_memory(self) -> Batch:
        """In page-locked memory, whence a GPU copies by itself; DataLoader calls this."""
        return Batch(*(None if (x := getattr(self, f.name)) is None else x.pin_memory() for f in fields(self)))


@dataclass
class Sentences:
    """Token ids of some recipes, as flat as a split has them: all that encoding asks of a split.

    Shape:
        words (W,); sentence_start (sentences + 1,); recipe_start (N + 1,) sentences before each recipe;
        ingredient_lines (N,).
    """

    words: np.ndarray
    sentence_start: np.ndarray
    recipe_start: np.ndarray
    ingredient_lines: np.ndarray

    @classmethod
    def of(cls, recipes: Sequence[Sequence[Sequence[int]]], lines: Sequence[int]) -> Sentences:
        """From the token ids of each recipe's sentences, title first, and the number of its ingredient lines."""
        sentences = [sentence for recipe in recipes for sentence in recipe]
        starts = (np.cumsum([0, *map(len, parts)]) for parts in (sentences, recipes))
        return cls(np.concatenate(sentences).astype(np.int32), *starts, np.asarray(lines))

    @classmethod
    def rows(cls, split: Split, start: int, stop: int) -> Sentences:
        """Some recipes of a split that lie together."""
        recipes, lines = split.recipe_start[start : stop + 1], split.ingredient_lines[start:stop]
        return cls(split.words, split.sentence_start, recipes, lines)

    def __len__(self) -> int:
        return len(self.ingredient_lines)


def recipe_batch(split: Split | Sentences, rows: np.ndarray) -> RecipeBatch:
    """Gather the token ids of some recipes."""
    sentences = [np.arange(split.recipe_start[r], split.recipe_start[r + 1]) for r in rows]
    flat = np.concatenate(sentences)
    start, length = split.sentence_start[flat], split.sentence_start[flat + 1] - split.sentence_start[flat]
    tokens, which = np.unique(padded(split.words, start, length, PAD), axis=0, return_inverse=True)

    bounds = np.cumsum([0] + [len(s) for s in sentences])[:-1]
    lines = split.ingredient_lines[rows]
    steps = np.array([len(s) for s in sentences]) - 1 - lines
    return RecipeBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(which[bounds]),
        torch.from_numpy(padded(which, bounds + 1, lines, -1)),
        torch.from_numpy(padded(which, bounds + 1 + lines, steps, -1)),
    )


def segment_pixels(split: Split, photos: np.ndarray, most: int) -> tuple[Tensor, Tensor]:
    """Segments of some photos of a split, by the photos' numbers: (photos, n, 3, S, S) uint8, mask (photos, n) bool.

    n is `most`, or the most that one of these photos has where that is fewer, but at least 1.
    """
    counts = np.minimum(split.segment_counts[photos], most)
    recipes = np.searchsorted(split.photo_start, photos, "right") - 1
    places = zip(recipes.tolist(), (photos - split.photo_start[recipes]).tolist(), counts.tolist(), strict=True)
    parts = [
        np.asarray(decode_jpeg(jpeg)) for row, which, count in places for jpeg in split.segments(row, which)[:count]
    ]
    size = split.extras["segments"]["size"]
    mask = np.arange(max(1, counts.max(initial=0))) < counts[:, None]
    pixels = np.zeros((*mask.shape, size, size, 3), np.uint8)
    if parts:
        pixels[mask] = parts
    return torch.from_numpy(pixels).permute(0, 1, 4, 2, 3), torch.from_numpy(mask)


class Draw(NamedTuple):
    """What one step takes: rows of the paired or the text-only recipes, and the epoch that seeds augmentation."""

    rows: np.ndarray
    paired: bool
    epoch: int


class StudyDataset(Dataset):
    """Batches of a split by `Draw`.

    Args:
        split: recipes with photos.
        text_only: recipes without.
        crop: side of the square that the network sees, pixels; at most the stored size.
        augment: random crop, flip and choice among a recipe's photos; else centre crop of the first photo.
        policy: a RandAugment on top of that, by timm's name; see `RandAugment`.
        first_photo_only: no choice among a recipe's photos.
        seed: the same seed, epoch and rows give the same batch in any worker.
        descriptions: batches hold the imagined descriptions.
        category: batches hold the kind of dish.
        segments: (photos of the split, n, E) features of each photo's segments; batches hold those of its photos. Or
            a number: batches hold the pixels of at most so many segments of each photo; 0: none.
        visible: batches hold the labels that show in the photo, where that is known.
        swap: share of the photos that get other surroundings; see `context`.
        swap_radius: of the discs that keep their own pixels, where no mask of the dish is stored with the photos.
        swap_strata: (pairs,) what surroundings are lent within; None: everywhere.
        features: (pairs, views, C, h, w) of a frozen backbone, and, with a swap, those of photos with other
            surroundings: batches hold a view of each in place of pixels; see `training.frozen_features`.
    """

    def __init__(
        self,
        split: Split,
        crop: int,
        *,
        text_only: Split | None = None,
        augment: bool = False,
        policy: str = "",
        first_photo_only: bool = False,
        seed: int = 0,
        descriptions: bool = False,
        segments: np.ndarray | int = 0,
        visible: bool = False,
        category: bool = False,
        swap: float = 0.0,
        swap_radius: tuple[float, float] = (0.28, 0.44),
        swap_strata: np.ndarray | None = None,
        features: Sequence[np.ndarray] = (),
    ):
        self.split, self.text_only, self.crop, self.augment, self.seed = split, text_only, crop, augment, seed
        self.descriptions, self.segments, self.category = descriptions, segments, category
        self.policy, self.choose = RandAugment(policy) if policy else None, augment and not first_photo_only
        self.visible, self.swap, self.swap_radius = visible and split.knows_visible, swap, swap_radius
        self.swap_strata, self.features = swap_strata, features

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, draw: Draw) -> Batch:
        rows = torch.from_numpy(draw.rows)
        if not draw.paired:
            return Batch(recipe_batch(self.text_only, draw.rows), rows)
        images, photos = self._views(draw) if self.features else self.photos(draw)
        labels = torch.from_numpy(self.split.label_matrix(draw.rows)).float()
        batch = Batch(recipe_batch(self.split, draw.rows), rows, images, labels)
        if self.visible:
            batch.visible = torch.from_numpy(self.split.visible_matrix(draw.rows)).float()
        if self.category:
            batch.category = torch.from_numpy(self.split.categories[draw.rows])
        if self.descriptions:
            batch.descriptions = torch.from_numpy(self.split.description_tokens(draw.rows))
        if isinstance(self.segments, int):
            if self.segments:
                batch.segments, batch.segment_mask = segment_pixels(self.split, photos, self.segments)
        else:
            batch.segments = torch.from_numpy(self.segments[photos])
            there = self.split.segment_counts[photos][:, None]
            batch.segment_mask = torch.from_numpy(np.arange(self.segments.shape[1]) < there)
        return batch

    def photos(self, draw: Draw) -> tuple[Tensor, np.ndarray]:
        """Photos (B, 3, S, S) uint8 of a step, and their numbers (B,) among those of the split."""
        rng = np.random.default_rng([self.seed, draw.epoch, int(draw.rows[0])])
        images = np.empty((len(draw.rows), self.crop, self.crop, 3), np.uint8)
        photos = np.empty(len(draw.rows), np.int64)
        windows: list[Window] = []
        for i, row in enumerate(draw.rows):
            which = int(rng.integers(self.split.photo_count(row))) if self.choose else 0
            images[i], window = self._image(row, which, rng)
            photos[i] = self.split.photo_start[row] + which
            windows.append(window)
        if self.swap:
            # A stream of its own: crops and choices stay those of the control.
            own = np.random.default_rng([self.seed, draw.epoch, int(draw.rows[0]), 1])
            dish = discs(len(images), self.crop, self.swap_radius, own)
            if self.split.foreground is not None:
                dish = stored_dish(self.split.foreground[photos], windows, dish)
            within = None if self.swap_strata is None else self.swap_strata[draw.rows]
            images = swap_context(images, dish, self.swap, own, within)
        return torch.from_numpy(images).permute(0, 3, 1, 2), photos

    def _views(self, draw: Draw) -> tuple[Tensor, np.ndarray]:
        """Features (B, C, h, w) float16 in place of photos, as many of swapped ones as the share says."""
        rng = np.random.default_rng([self.seed, draw.epoch, int(draw.rows[0])])
        views = rng.integers(self.features[0].shape[1], size=len(draw.rows))
        swapped = (rng.random(len(views)) < self.swap).astype(int)
        chosen = [self.features[s][row, view] for s, row, view in zip(swapped, draw.rows, views, strict=True)]
        return torch.from_numpy(np.stack(chosen)), self.split.photo_start[draw.rows]

    def _image(self, row: int, which: int, rng: np.random.Generator) -> tuple[np.ndarray, Window]:
        image = decode_jpeg(self.split.photo(row, which))
        spare = np.array(image.size[::-1]) - self.crop
        if spare.min() < 0:
            raise ValueError(f"crop_size {self.crop} is larger than the stored photos; lower it or prepare larger ones")
        top, left = rng.integers(spare + 1).tolist() if self.augment else centre(spare)
        # Cropped before it becomes an array: an array of the whole photo costs a third of the decoding.
        image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels = np.asarray(self.policy(image, rng) if self.policy else image)
        flip = bool(self.augment and rng.random() < 0.5)
        return pixels[:, ::-1] if flip else pixels, Window(top, left, *spare.tolist(), flip)


class PairedBatches(Sampler[Draw]):
    """Shuffled paired batches, each followed by a text-only batch of twice the size where there are text-only recipes.

    A last batch of fewer than two pairs is dropped: it would hold no negative.

    Args:
        batch_size: pairs per step over all processes; each takes every world-th row of the same batch.
        strata, stratified: (pairs,) stratum of each pair, and the share of the batches drawn within one.
        category: (pairs,) kind of dish of each pair, -1 for none: half of each batch are two of a kind, so far as they
            reach; of the batches that are neither of one stratum nor hard.
        nearest, hard: (pairs, n) near ones of each pair, and the share of the batches that bring such together.
        rank, world: this process among all. Rows of a batch that do not divide among all are dropped.

    Raises:
        ValueError: the batch does not divide among the processes.
    """

    def __init__(
        self,
        pairs: int,
        batch_size: int,
        *,
        text_only: int = 0,
        seed: int = 0,
        strata: np.ndarray | None = None,
        stratified: float = 0.0,
        nearest: np.ndarray | None = None,
        hard: float = 0.0,
        category: np.ndarray | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        if batch_size % world:
            raise ValueError(f"a batch of {batch_size} does not divide among {world} devices")
        self.pairs, self.batch_size, self.text_only, self.seed = pairs, batch_size, text_only, seed
        self.epoch = self.done = 0
        self.strata, self.stratified, self.nearest, self.hard = strata, stratified, nearest, hard
        self.category, self.rank, self.world = category, rank, world

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Lightning calls this: the order follows from the seed and the epoch, so a resumed run sees the same.

        Args:
            done: steps of this epoch that are left out, until another one is set.
        """
        if epoch != self.epoch or done:
            self.epoch, self.done = epoch, done

    def _paired(self) -> int:
        rest = self.pairs % self.batch_size
        return self.pairs // self.batch_size + (rest - rest % self.world > 1)

    def _with_text(self) -> bool:
        return self.text_only >= self.world

    def __len__(self) -> int:
        return self._paired() * (2 if self._with_text() else 1)

    def _share(self, rows: np.ndarray) -> np.ndarray:
        return rows[: len(rows) - len(rows) % self.world][self.rank :: self.world]

    def __iter__(self) -> Iterator[Draw]:
        return islice(self._draws(), self.done, None)

    def _draws(self) -> Iterator[Draw]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order, text = rng.permutation(self.pairs), rng.permutation(self.text_only)
        if self.stratified or self.hard or self.category is not None:
            order = self._arranged(order, np.random.default_rng([self.seed, self.epoch, 1]))
        for step in range(self._paired()):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield Draw(self._share(rows), True, self.epoch)
            if self._with_text():
                # Round and round the text-only recipes: one epoch is one pass over the pairs.
                take = np.arange(2 * self.batch_size) + step * 2 * self.batch_size
                yield Draw(self._share(text[np.unique(take % self.text_only)]), False, self.epoch)

    def _arranged(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The same rows with some of the batches made of one stratum, some of near ones, the others half of two of a
        kind; batches in random order."""
        whole = self.pairs // self.batch_size
        stratified, hard = (round(share * whole) * self.batch_size for share in (self.stratified, self.hard))
        if hard:  # near ones are looked for among all pairs, then some are taken
            order = batches.with_neighbours(order, self.nearest)
            order[hard:] = rng.permutation(order[hard:])
        one = slice(hard, hard + stratified)
        if stratified:
            order[one] = batches.of_one_stratum(order[one], self.strata, rng)
        if self.category is not None:
            rest = slice(hard + stratified, None)
            order[rest] = batches.half_of_a_kind(order[rest], self.category, self.batch_size)
        arranged = order[: whole * self.batch_size].reshape(whole, self.batch_size)
        return np.concatenate([arranged[rng.permutation(whole)].ravel(), order[whole * self.batch_size :]])


class InOrder(Sampler[Draw]):
    """Every pair once, in order: validation, extraction and evaluation.

    Of several processes each takes every world-th row; the last row fills up those that would be one short.
    """

    def __init__(self, pairs: int, batch_size: int, *, rank: int = 0, world: int = 1):
        self.rows = np.arange(rank, -(-pairs // world) * world, world).clip(max=pairs - 1)
        self.batch_size = max(1, batch_size // world)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Draw]:
        for start in range(0, len(self.rows), self.batch_size):
            yield Draw(self.rows[start : start + self.batch_size], True, 0)


def _outlive_the_signal(_: int) -> None:
    """A worker goes on for a while after SIGTERM: where a whole job gets it, its trainer still writes a checkpoint."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def loader(dataset: StudyDataset, sampler: Sampler[Draw], workers: int = 0) -> DataLoader:
    """A DataLoader whose samples are whole batches."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=devices.device() == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_outlive_the_signal,
        # Its own: from the global one it would draw a number per epoch, and a resumed run would drop out other units.
        generator=torch.Generator(),
    )
