"""A photo in, recipes out, on any finished study; and the other direction.

    kitchen = RecipeSearch.load("outputs/kitchen")
    for hit in kitchen.search("photo.jpg").hits:
        print(f"{hit.similarity:.2f} {hit.title}")

Photos and recipes are ranked by the cosine of their embeddings. Of a system that reads more (DAR's descriptions and
segments) this is the distance between photo and recipe alone.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recipe_lib import devices
from recipe_lib.data.loading import Batch, InOrder, Sentences, StudyDataset, recipe_batch
from recipe_lib.data.prepare import StoreConfig, prepare_more, sentences, token_ids
from recipe_lib.data.recipe import DataError
from recipe_lib.data.store import Split, Store
from recipe_lib.data.text import END
from recipe_lib.losses import posterior
from recipe_lib.paths import atomic_write_text
from recipe_lib.reachable import digest
from recipe_lib.retrieval.search import SearchIndex
from recipe_lib.search.photo import read_photo, stored_photo
from recipe_lib.search.studies import NO_TERM, study_folder, variants_of
from recipe_lib.search.text import parse_recipe
from recipe_lib.systems.saving import load_system

NAMED = 0.5  # calibrated probability from which an ingredient counts as seen in the photo
LARGE = 100_000  # embeddings from which an index is approximate
CHUNK = 2048  # recipes encoded between two signs of progress
Progress = Callable[[str, int, int], None]  # what is done, how many of how many


class Part(NamedTuple):
    """Recipes that are indexed together: a split of the study, or a folder of recipes.

    key: name of its index on disk. state: digest of what it is made of.
    """

    name: str
    split: Split
    key: str
    state: str


@dataclass(frozen=True)
class Hit:
    """A recipe that was found, or the photo of one. similarity: cosine, -1 to 1."""

    id: str
    title: str
    similarity: float
    part: Part
    row: int

    @cached_property
    def recipe(self) -> dict:
        """Its id, title, ingredients, instructions and the names of its ingredients."""
        return self.part.split.recipe(self.row)

    @property
    def photo(self) -> bytes | None:
        """Its first photo as JPEG; None where it has none."""
        return self.part.split.photo(self.row) if self.part.split.photo_count(self.row) else None


@dataclass(frozen=True)
class Answer:
    """What a photo brings.

    hits: the nearest recipes, best first. ingredients: calibrated P(ingredient | photo) of every class, likeliest
    first; empty where the system names no ingredients.
    """

    hits: list[Hit]
    ingredients: dict[str, float]


class RecipeSearch:
    """One trained system of a study and the recipes that it finds; see `load`.

    Attributes:
        study: its name. variant: the system's. variants: all that may be searched with. parts: what is searched.
    """

    def __init__(self, folder: Path, store: Store, parts: Sequence[Part], variant: str):
        self.folder, self.store, self.parts, self.variant = folder, store, list(parts), variant
        self.study, self.variants = folder.name, variants_of(folder)
        if variant not in self.variants:
            told = " (the oracle is told the ingredients, which nobody knows of a photo)" if "oracle" in variant else ""
            raise DataError(f"{folder}: no variant {variant!r}{told}; choose {', '.join(self.variants)}")
        self._trained = self.variants[variant]
        self.system = load_system(self._trained).to(devices.device())
        self.crop = json.loads((self._trained / "training.json").read_text())["crop_size"]
        self._kept: dict[str, list[SearchIndex]] = {}

    @classmethod
    def load(cls, study: str | Path = "kitchen", variant: str = "", recipes: Iterable[str | Path] = ()) -> RecipeSearch:
        """What notebooks 1 to 4 of a study left. Its indexes are made when first asked for, and kept with it.

        Args:
            study: its name below outputs/, or its folder.
            variant: "baseline", one of notebook 4, or either with "@no_z"; "": debiased, where it was trained.
            recipes: what to search: splits of the study, and folders of recipes as a cookbook holds them, with photos
                or without, which were not there when it was trained; nothing: every split.

        Raises:
            DataError: no such study, variant, split or folder, or nothing was trained; one line.
        """
        folder = study_folder(study)
        store = Store(folder / "01_data_preparation" / "data")
        names = list(recipes) or [*store.test_splits, *(n for n in store.card["recipes"] if n not in store.test_splits)]
        parts = [part for name in names for part in _parts(folder, store, name)]
        return cls(folder, store, parts, variant or ("debiased" if "debiased" in variants_of(folder) else "baseline"))

    def using(self, variant: str) -> RecipeSearch:
        """Another variant over the same recipes."""
        return self if variant == self.variant else RecipeSearch(self.folder, self.store, self.parts, variant)

    def __len__(self) -> int:
        return sum(len(part.split) for part in self.parts)

    def read(self, photo: str | Path | bytes, name: str = "") -> np.ndarray:
        """A photo as the system sees it, (S, S, 3) uint8; ImageError as `read_photo`."""
        photo = Path(photo).expanduser() if isinstance(photo, str) else photo
        return read_photo(photo, self.store.card["config"], self.crop, name)

    def stored(self, split: Split, row: int) -> np.ndarray:
        """The first photo of a prepared recipe as the system sees it."""
        return stored_photo(split.photo(row), self.crop)

    def search(self, photo: str | Path | bytes | np.ndarray, top: int = 10, progress: Progress | None = None) -> Answer:
        """The recipes nearest to a photo, and the ingredients that are seen in it.

        Args:
            photo: a file, its bytes, or what `read` made of it.
            top: recipes, each text once.
            progress: told while an index is made.

        Raises:
            ImageError: the photo cannot be used.
        """
        pixels = photo if isinstance(photo, np.ndarray) else self.read(photo)
        query, logits = self._encode(torch.tensor(pixels)[None].permute(0, 3, 1, 2))
        ingredients: dict[str, float] = {}
        if logits is not None:
            attached = self.system.config.debiasing
            p = posterior(logits[0], attached.gamma_neg, attached.gamma_pos)
            ingredients = {self.store.classes.names[i]: float(p[i]) for i in p.argsort(descending=True).tolist()}
        return Answer(self._nearest("recipes", query, top, progress), ingredients)

    @torch.inference_mode()
    def photos(self, recipe: str, top: int = 10, progress: Progress | None = None) -> list[Hit]:
        """The photos nearest to a recipe that is given as text; see `parse_recipe`.

        Raises:
            DataError: there is nothing in it, or no word that the system knows.
        """
        title, ingredients, steps = parse_recipe(recipe)
        config, tokenizer = StoreConfig(**self.store.card["config"]), self.store.tokenizer
        ids = [*map(token_ids(tokenizer.to_str(), config), sentences(title, ingredients, steps, config))]
        unknown = {tokenizer.token_to_id("<unk>")}
        if config.text_tokens != "clip" and not any(i > END for sentence in ids for i in set(sentence) - unknown):
            raise DataError("no word of this recipe is known to the study; write it in the language of its recipes")
        tokens = Sentences.of([ids], [max(1, min(config.max_sentences, len(ingredients)))])
        batch = recipe_batch(tokens, np.arange(1)).to(devices.device())
        query = self.system.encode_recipes(batch).embedding.float().cpu()
        return self._nearest("photos", query, top, progress)

    def lines(self, hit: Hit, answer: Answer) -> list[tuple[str, float]]:
        """Ingredient lines of a recipe, each with the calibrated probability that its ingredient is in the photo.

        0 for lines that hold no ingredient of the table.
        """
        likely: dict[int, float] = {}
        for position, index in self.store.classes.label(hit.recipe["names"]):
            p = answer.ingredients.get(self.store.classes.names[index], 0.0)
            likely[position] = max(likely.get(position, 0.0), p)
        return [(line, likely.get(position, 0.0)) for position, line in enumerate(hit.recipe["ingredients"])]

    @torch.inference_mode()
    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, S, S) uint8 -> what is compared (B, D), and logits (B, K)."""
        batch = Batch(None, torch.arange(len(images)), images).to(devices.device())
        image = self.system.encode_images(batch)
        embedding = image.embedding if self.variant.endswith(NO_TERM) else image.embedding + image.z
        return embedding.float().cpu(), None if image.logits is None else image.logits.float().cpu()

    def _nearest(self, kind: str, query: Tensor, top: int, progress: Progress | None) -> list[Hit]:
        """The best of all parts. Recipes of one text are one hit: splits of the kitchen share some."""
        indexes, wanted = self._indexes(kind, progress), top
        while True:
            hits = []
            for part, index in indexes:
                (rows,), (similarity,) = index.nearest(query, wanted)
                pairs = zip(rows.tolist(), similarity.tolist(), strict=True)
                hits += [Hit(index.ids[row], index.titles[row], cosine, part, row) for row, cosine in pairs]
            hits.sort(key=lambda hit: -hit.similarity)
            best = (_distinct(hits, self.parts) if kind == "recipes" else hits)[:top]
            if len(best) == top or wanted >= max(len(part.split) for part in self.parts):
                return best
            wanted *= 2

    def _indexes(self, kind: str, progress: Progress | None) -> list[tuple[Part, SearchIndex]]:
        parts = [part for part in self.parts if kind == "recipes" or part.split.photo_start[-1]]
        if kind not in self._kept:
            done, total, indexes = 0, sum(len(part.split) for part in parts), []
            tell = progress or (lambda *_: None)
            for part in parts:
                indexes.append(self._index(kind, part, lambda n, done=done: tell(f"encoding {kind}", done + n, total)))
                done += len(part.split)
            self._kept[kind] = indexes
        return list(zip(parts, self._kept[kind], strict=True))

    def _index(self, kind: str, part: Part, tell: Callable[[int], None]) -> SearchIndex:
        """An index as it was kept, or made anew where weights or recipes have changed."""
        # Recipes do not depend on the term.
        name = self.variant.removesuffix(NO_TERM) if kind == "recipes" else self.variant
        folder = self.folder / "search" / name / f"{part.key}-{kind}"
        weights = (self._trained / "model.safetensors").stat()
        made_from = digest([part.state, weights.st_size, weights.st_mtime_ns])
        with _made(folder, made_from) as make:
            if not make:
                with suppress(ValueError):  # broken: made again
                    return SearchIndex.load(folder)
            encode = self._encode_recipes if kind == "recipes" else self._encode_photos
            embeddings = torch.cat(list(encode(part.split, tell)))
            size = "approximate" if len(embeddings) >= LARGE else "exact"
            index = SearchIndex.build(embeddings, part.split.ids, part.split.titles, size)
            index.save(folder)
            return index

    def _encode_recipes(self, split: Split, tell: Callable[[int], None]) -> Iterator[Tensor]:
        from recipe_lib.evaluation.scores import encode_recipes  # scikit-learn, which a search does not need

        for start in range(0, len(split), CHUNK):
            tell(start)
            yield encode_recipes(self.system, Sentences.rows(split, start, start + CHUNK))

    def _encode_photos(self, split: Split, tell: Callable[[int], None]) -> Iterator[Tensor]:
        dataset = StudyDataset(split, self.crop)
        for draw in InOrder(len(split), 64):
            tell(int(draw.rows[0]))
            yield self._encode(dataset[draw].images)[0]


def moves(hits: Sequence[Hit], before: Sequence[Hit]) -> list[int | None]:
    """How many places each recipe stands above where it stood before (below: negative); None: it was not there."""
    place = {(hit.part.key, hit.row): i for i, hit in enumerate(before)}
    return [None if (old := place.get((hit.part.key, hit.row))) is None else old - i for i, hit in enumerate(hits)]


def _parts(folder: Path, store: Store, name: str | Path) -> list[Part]:
    """A split, or what lies in a folder of recipes: prepared with the study's words and classes, and kept."""
    if str(name) in store.card["recipes"]:
        return [Part(str(name), store.split(str(name)), str(name), store.card["sha256"])]
    root = Path(name).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"{name}: no such split or folder; splits: {', '.join(store.card['recipes'])}")
    files = [(str(path.relative_to(root)), path.stat()) for path in sorted(root.rglob("*")) if path.is_file()]
    state = digest([store.card["sha256"], [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]])
    key = f"folder-{digest(str(root))}"
    place = folder / "search" / key
    with _made(place, state) as make:
        if make:
            from recipe_lib.sources.cookbook import read_cookbook  # needed once for each folder

            recipes, report = read_cookbook(root, photos=False)
            if left_out := str(report).splitlines()[1:]:
                logging.getLogger(__name__).warning("%s: left out: %s", name, "; ".join(left_out)[:600])
            prepare_more(recipes, place, store, workers=0 if len(recipes) > LARGE else 1)
    more = Store(place)
    return [Part(root.name, more.split(split), f"{key}-{split}", state) for split in more.card["recipes"]]


def _distinct(hits: Iterable[Hit], parts: Sequence[Part]) -> list[Hit]:
    """Recipes of one title and text once, as the one of the first part: equal texts differ in their last digits."""
    distinct: list[Hit] = []
    places: dict[str, list[int]] = {}  # of each title
    for hit in hits:
        same = places.setdefault(hit.title, [])
        place = next((place for place in same if _text(distinct[place]) == _text(hit)), None)
        if place is None:
            same.append(len(distinct))
            distinct.append(hit)
        elif parts.index(hit.part) < parts.index(distinct[place].part):
            distinct[place] = hit
    return distinct


def _text(hit: Hit) -> tuple:
    return hit.recipe["ingredients"], hit.recipe["instructions"]


@contextmanager
def _made(folder: Path, made_from: str) -> Iterator[bool]:
    """Whether what belongs into a folder has to be made; afterwards it counts as made. Two processes take turns."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    stamp = folder / "made_from"
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make = not stamp.is_file() or stamp.read_text() != made_from
        if make:
            stamp.unlink(missing_ok=True)
        yield make
        if make:
            atomic_write_text(stamp, made_from)
