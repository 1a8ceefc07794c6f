"""From a source's recipes to the prepared store, over all cores; a preparation that was killed goes on where it was.

The source is streamed and cut into shards of SHARD recipes. A shard's text and photos are written as soon as it is
full. Then the words and the ingredients of the paired training recipes are counted, and every shard gets its token ids
and labels. A shard's record in `shards/` says what it was made from: one that is there and whose recipes are the same
is not made again. The layout is described in `store`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from recipe_lib.data.clip_text import VOCABULARY, clip_ids
from recipe_lib.data.images import ImageError, read_image, to_jpeg
from recipe_lib.data.ingredients import IngredientClasses, ingredient_names, mentions
from recipe_lib.data.parallel import Workers
from recipe_lib.data.recipe import DataError, Recipe
from recipe_lib.data.shards import digest, finished, nested, parquet, remove, save
from recipe_lib.data.store import TEXT_ONLY, Store
from recipe_lib.data.text import SentenceEncoder, marked_ids, name_token, with_names, word_tokenizer
from recipe_lib.paths import atomic_write_text
from recipe_lib.progress import progress
from recipe_lib.reachable import code_digest

_STRING, _STRINGS = pa.string(), pa.list_(pa.string())
RECIPES = pa.schema(
    dict.fromkeys(("id", "title"), _STRING)
    | dict.fromkeys(("ingredients", "instructions", "names"), _STRINGS)
    | {"photo_bytes": pa.list_(pa.int64()), "truth": _STRING}
)
GIVEN = pa.schema({"description": _STRING, "segment_root": _STRING, "segments": _STRINGS})
TEXT = ["title", "ingredients", "instructions", "names"]
SHARD = 2048  # recipes of the source per shard; they may go to several splits
HELD = 1 << 27  # bytes of photo files that end a shard before: one for each core is in memory


@dataclass(frozen=True)
class StoreConfig:
    """How recipes are prepared.

    Args:
        image_size: shorter side of the stored photos, pixels.
        min_word_count: a word enters the vocabulary when the paired training recipes hold it this often.
        ingredient_classes: K, the most frequent ingredients of the paired training recipes.
        max_sentences: ingredient lines, and instruction steps, kept of each recipe.
        max_tokens: token ids kept of each sentence.
        text_tokens: "words"; "names": words, but a line is one token, the name of its ingredient, where at least
            `min_word_count` paired training recipes hold it, else its words; "clip": the byte pairs of CLIP's text
            towers, start and end among them; or "sentence": those of a sentence encoder, whose tokenizer is given.
        image_filter, jpeg_quality: how photos are resized and stored; see `to_jpeg`.
    """

    image_size: int = 256
    min_word_count: int = 10
    ingredient_classes: int = 500
    max_sentences: int = 20
    max_tokens: int = 15
    text_tokens: str = "words"
    image_filter: str = "bilinear"
    jpeg_quality: int = 95


def prepare(
    recipes: Iterable[Recipe],
    folder: Path,
    config: StoreConfig,
    *,
    classes: IngredientClasses | None = None,
    tokenizer: Tokenizer | None = None,
    workers: int = 0,
) -> dict:
    """Write the store; return the data card.

    It grows in `<folder>.partial` and gets its name when it is whole; an older store there is replaced then. Whatever
    stops a preparation, the next one takes over the shards that are finished.

    Args:
        recipes: read once, in order.
        folder: of the store.
        config: sizes and limits.
        classes: a table of ingredient classes to use in place of the most frequent names.
        tokenizer: one to use in place of that of the paired training recipes' words.
        workers: processes; 0: one per core. The store does not depend on it.

    Raises:
        DataError: a duplicate id, a split without pairs (train, val, test), fewer ingredients than classes, a table of
            another number of classes, or no space.
    """
    if classes and len(classes.names) != config.ingredient_classes:
        given = f"ingredient_classes is {config.ingredient_classes}"
        raise DataError(f"the table holds {len(classes.names)} ingredient classes, {given}; make them equal")
    partial, old = (folder.with_name(folder.name + end) for end in (".partial", ".old"))
    if folder.is_dir() and not partial.exists():
        copy = folder.with_name(folder.name + ".copy")  # what is copied in part is no store to go on with
        shutil.rmtree(copy, ignore_errors=True)
        try:
            shutil.copytree(folder, copy, copy_function=os.link)
        except OSError:  # no hard links on this file system
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
        copy.replace(partial)
    (partial / "shards").mkdir(parents=True, exist_ok=True)
    for unfinished in partial.glob("*/.*"):  # of processes that were killed while they wrote
        unfinished.unlink()
    with Workers(workers) as pool:
        card = _write_store(recipes, partial, config, classes, tokenizer, pool)
    atomic_write_text(partial / "card.json", json.dumps(card, indent=1, ensure_ascii=False))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
    return card


def _write_store(
    recipes: Iterable[Recipe],
    folder: Path,
    config: StoreConfig,
    classes: IngredientClasses | None,
    tokenizer: Tokenizer | None,
    pool: Workers,
) -> dict:
    jobs = ((folder, number, shard, config) for number, shard in enumerate(_shards(progress(recipes, "recipes"))))
    records = list(pool.map(_write_recipes, jobs))
    remove(folder, lambda number: number >= len(records))  # of a longer source
    counts, without_photo = (sum((Counter(r[key]) for r in records), Counter()) for key in ("recipes", "without_photo"))
    if not counts["train"]:
        raise DataError("no training recipe has a photo that can be read; nothing to learn retrieval from")
    if not counts["val"] or not set(counts) - {"train", "val", TEXT_ONLY}:
        raise DataError("no pair fell into the validation or into a test split; add recipes or raise the shares")

    words, recipes_with = Counter(), Counter()
    for shard_counts in pool.map(_count, ((folder, number, classes) for number in range(len(records)))):
        words.update(shard_counts[0])
        recipes_with.update(shard_counts[1])
    tokenizer = tokenizer or word_tokenizer(words, config.min_word_count)
    if classes:
        classes = classes.recounted(recipes_with)
    else:
        classes = IngredientClasses.from_counts(recipes_with, config.ingredient_classes)
        # Now that the classes are known, lines that join two of them count for both.
        jobs = ((folder, number, classes) for number in range(len(records)))
        classes = IngredientClasses.from_counts(sum(pool.map(_mention, jobs), Counter()), config.ingredient_classes)
    if config.text_tokens == "names":
        jobs = ((folder, number, None) for number in range(len(records)))
        tokenizer = with_names(tokenizer, sum(pool.map(_mention, jobs), Counter()), config.min_word_count)
    atomic_write_text(folder / "tokenizer.json", tokenizer.to_str())
    classes.save(folder / "classes.csv")

    jobs = [(folder, number, tokenizer.to_str(), classes, config) for number in range(len(records))]
    tokens = list(progress(pool.map(_write_tokens, jobs), "shards to token ids", len(jobs)))
    skipped = [line for record in records for line in record["skipped"]]
    atomic_write_text(folder / "left_out.txt", "".join(line + "\n" for line in skipped))
    first = min(folder.glob("train/*.recipes.parquet"))
    examples = pq.read_table(first, columns=["title"])["title"][:5].to_pylist()
    return {
        "recipes": dict(sorted(counts.items())),
        "without_photo": dict(sorted(without_photo.items())),  # of validation and test: no candidates, not stored
        "vocabulary": VOCABULARY if config.text_tokens == "clip" else tokenizer.get_vocab_size(),
        "ingredient_classes": dict(zip(classes.names, classes.counts, strict=True)),
        "examples": examples,
        "left_out": len(skipped),
        "skipped": skipped[:100],  # all: left_out.txt
        "config": asdict(config),
        "sha256": digest(*(f"{name} {sha}" for r in (*records, *tokens) for name, sha in sorted(r["files"].items()))),
    }


def prepare_more(recipes: Iterable[Recipe], folder: Path, store: Store, workers: int = 0) -> Store:
    """Further recipes beside a store, with its vocabulary, classes and sizes: nothing is learnt from them.

    Those with a photo are its split "train", the others TEXT_ONLY, whatever they say. It appears when it is whole.

    Args:
        workers: processes; 0: one per core.
    """
    partial = folder.with_name(folder.name + ".partial")
    (partial / "shards").mkdir(parents=True, exist_ok=True)
    config, tokenizer = StoreConfig(**store.card["config"]), store.tokenizer.to_str()
    with Workers(workers) as pool:
        one_split = (replace(recipe, split="train") for recipe in recipes)
        jobs = ((partial, number, shard, config) for number, shard in enumerate(_shards(one_split)))
        records = list(pool.map(_write_recipes, jobs))
        remove(partial, lambda number: number >= len(records))
        jobs = ((partial, number, tokenizer, store.classes, config) for number in range(len(records)))
        list(pool.map(_write_tokens, jobs))
    counts = sum((Counter(record["recipes"]) for record in records), Counter())
    store.classes.save(partial / "classes.csv")
    atomic_write_text(partial / "tokenizer.json", tokenizer)
    card = {"recipes": counts, "config": asdict(config), "skipped": [s for r in records for s in r["skipped"]]}
    atomic_write_text(partial / "card.json", json.dumps(card, ensure_ascii=False))
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return Store(folder)


def _shards(recipes: Iterable[Recipe]) -> Iterator[list[Recipe]]:
    seen: set[str] = set()
    shard: list[Recipe] = []
    held = 0
    for recipe in recipes:
        if recipe.id in seen:
            raise DataError(f"recipe {recipe.id}: the id is there twice; ids must be unique over all splits")
        seen.add(recipe.id)
        shard.append(recipe)
        held += sum(len(image) for image in recipe.images if isinstance(image, bytes))
        if len(shard) == SHARD or held > HELD:
            yield shard
            shard, held = [], 0
    if shard:
        yield shard


# ---- jobs: one shard each, in any process ----


def _write_recipes(folder: Path, number: int, recipes: list[Recipe], config: StoreConfig) -> dict:
    """Text and photos of a shard, a pair of files for each of its splits. Returns the shard's record."""
    path = folder / "shards" / f"{number:05d}.json"
    photo = f"{config.image_size} {config.image_filter} {config.jpeg_quality}"
    made_from = digest(code_digest(_write_recipes), photo, *map(_state, recipes))
    if record := finished(path, made_from, folder):
        return record
    remove(folder, lambda other: other == number)
    rows: dict[str, list[dict]] = {}
    photos: dict[str, list[bytes]] = {}
    record = {"made_from": made_from, "recipes": {}, "without_photo": {}, "skipped": [], "files": {}}
    for recipe in recipes:
        jpegs = _photos(recipe, config, record["skipped"])
        if not jpegs and recipe.split != "train":
            if recipe.images:
                record["skipped"].append(f"recipe {recipe.id}: no photo in split {recipe.split}; cannot be a candidate")
            else:
                record["without_photo"][recipe.split] = record["without_photo"].get(recipe.split, 0) + 1
            continue
        split = recipe.split if jpegs else TEXT_ONLY
        photos.setdefault(split, []).extend(jpegs.values())
        names = recipe.names
        if names is None:
            names = [ingredient_names(line) for line in recipe.ingredients]
        rows.setdefault(split, []).append(
            {
                "id": recipe.id,
                "title": recipe.title,
                "ingredients": recipe.ingredients,
                "instructions": recipe.instructions,
                "names": names,
                "photo_bytes": [len(jpeg) for jpeg in jpegs.values()],
                "truth": json.dumps(recipe.truth, ensure_ascii=False),
                "description": recipe.description,
                "segment_root": str(recipe.segment_root or ""),
                "segments": [str(recipe.segments[i]) for i in jpegs] if recipe.segments else [],
            }
        )
    for split, split_rows in rows.items():
        record["recipes"][split] = len(split_rows)
        files = {"recipes.parquet": parquet(pa.Table.from_pylist(split_rows, RECIPES))}
        if any(row["description"] or row["segments"] for row in split_rows):
            files["given.parquet"] = parquet(pa.Table.from_pylist(split_rows, GIVEN))
        if photos[split]:
            files["jpegs"] = b"".join(photos[split])
        for name, data in files.items():
            name = f"{split}/{number:05d}.{name}"
            record["files"][name] = save(folder / name, data)
    atomic_write_text(path, json.dumps(record))
    return record


def _photos(recipe: Recipe, config: StoreConfig, skipped: list[str]) -> dict[int, bytes]:
    """JPEG bytes of the photos that can be read, by their position among the recipe's."""
    photos = {}
    for position, image in enumerate(recipe.images):
        try:
            if isinstance(image, Path):
                root = recipe.image_root
                if root and not Path(os.path.realpath(image)).is_relative_to(root):
                    raise ImageError(f"{image}: is a link that leaves {root}; it is not read")
            if not isinstance(image, np.ndarray):
                image = read_image(image)
            photos[position] = to_jpeg(
                image, config.image_size, resample=config.image_filter, quality=config.jpeg_quality
            )
        except ImageError as error:
            skipped.append(f"recipe {recipe.id}: {error}")
    return photos


def _count(folder: Path, number: int, classes: IngredientClasses | None) -> tuple[Counter[str], Counter[str]]:
    """Words of a shard's paired training recipes, and the number of these recipes that name each ingredient."""
    words, recipes_with = Counter(), Counter()
    path = folder / "train" / f"{number:05d}.recipes.parquet"
    if path.is_file():
        table = pq.read_table(path, columns=TEXT)
        texts = (table["title"], *(pa.compute.list_flatten(table[name]) for name in ("ingredients", "instructions")))
        for column in texts:
            for text in column.to_pylist():
                words.update(text.split())
        for names in table["names"].to_pylist():
            recipes_with.update(mentions(names, classes))
    return words, recipes_with


def _mention(folder: Path, number: int, classes: IngredientClasses | None) -> Counter[str]:
    """The number of a shard's paired training recipes that name each class; None: each ingredient."""
    path = folder / "train" / f"{number:05d}.recipes.parquet"
    lists = pq.read_table(path, columns=["names"])["names"].to_pylist() if path.is_file() else []
    return Counter(name for names in lists for name in mentions(names, classes))


def _write_tokens(folder: Path, number: int, tokenizer: str, classes: IngredientClasses, config: StoreConfig) -> dict:
    """Token ids and labels beside the recipes. Sentence 0 is the title, then come ingredient lines, then steps."""
    path, recipes = (folder / "shards" / f"{number:05d}{end}.json" for end in (".tokens", ""))
    limits = f"{config.max_sentences} {config.max_tokens} {config.text_tokens}"
    code, aliases = code_digest(_write_tokens), json.dumps(classes.aliases)
    made_from = digest(code, recipes.read_text("utf-8"), tokenizer, limits, *classes.names, aliases)
    if record := finished(path, made_from, folder):
        return record
    encode = token_ids(tokenizer, config)
    record = {"made_from": made_from, "files": {}}
    for split in json.loads(recipes.read_text("utf-8"))["recipes"]:
        words: list[int] = []
        sentence_start, recipe_start, lines, labels, positions, label_start = [0], [0], [], [], [], [0]
        table = pq.read_table(folder / split / f"{number:05d}.recipes.parquet", columns=TEXT)
        for title, ingredients, steps, names in zip(*(column.to_pylist() for column in table), strict=True):
            kept = [i for i, line in enumerate(ingredients) if line.split()][: config.max_sentences]
            fields = sentences(title, ingredients, steps, config, names)
            lines.append(max(1, len(kept)))
            for sentence in fields:
                words += encode(sentence)
                sentence_start.append(len(words))
            recipe_start.append(len(sentence_start) - 1)
            for i, label in classes.label(names):
                labels.append(label)
                positions.append(kept.index(i) if i in kept else -1)
            label_start.append(len(labels))
        columns = {
            "sentences": nested(recipe_start, nested(sentence_start, pa.array(words, pa.int32()))),
            "ingredient_lines": pa.array(lines, pa.int32()),
            "labels": nested(label_start, pa.array(labels, pa.int32())),
            "positions": nested(label_start, pa.array(positions, pa.int32())),
        }
        name = f"{split}/{number:05d}.tokens.parquet"
        record["files"][name] = save(folder / name, parquet(pa.table(columns)))
    atomic_write_text(path, json.dumps(record))
    return record


def sentences(
    title: str,
    ingredients: Sequence[str],
    steps: Iterable[str],
    config: StoreConfig,
    names: Sequence[str | None] | None = None,
) -> list[str]:
    """What is tokenised of a recipe, in order: title, ingredient lines, steps; an empty one where there is none.

    Args:
        names: of the lines, where the source knows them; for `text_tokens` "names".
    """
    lines = [i for i, line in enumerate(ingredients) if line.split()][: config.max_sentences]
    if config.text_tokens == "names":
        names = [ingredient_names(line) for line in ingredients] if names is None else names
        parts = [[name_token(names[i]) for i in lines]]
    else:
        parts = [[ingredients[i] for i in lines]]
    parts.append([step for step in steps if step.split()][: config.max_sentences])
    return [title, *(sentence for part in parts for sentence in part or [""])]


@lru_cache(1)
def token_ids(tokenizer: str, config: StoreConfig) -> Callable[[str], list[int]]:
    """What makes a sentence's token ids, as the store has them.

    Args:
        tokenizer: the store's, as JSON.
    """
    if config.text_tokens == "clip":
        return partial(clip_ids, length=config.max_tokens)
    if config.text_tokens == "sentence":
        return partial(marked_ids, Tokenizer.from_str(tokenizer), config.max_tokens)
    return SentenceEncoder(Tokenizer.from_str(tokenizer), config.max_tokens)


def _state(recipe: Recipe) -> str:
    """All that a shard takes from a recipe; of a photo file its name, size and time."""
    images = []
    for image in recipe.images:
        if isinstance(image, Path):
            state = image.stat() if image.is_file() else None
            images.append(f"{image} {state and (state.st_size, state.st_mtime_ns)}")
        elif isinstance(image, bytes):
            images.append(hashlib.sha256(image).hexdigest())
        else:
            images.append(f"{image.shape} {hashlib.sha256(image.tobytes()).hexdigest()}")
    fields = [recipe.id, recipe.title, recipe.ingredients, recipe.instructions, recipe.split, recipe.names]
    given = [recipe.description, str(recipe.segment_root), *map(str, recipe.segments or ())]
    return json.dumps([*fields, recipe.truth, images, given])
