"""What stands beside the prepared recipes and photos: imagined descriptions, and segments of photos (DAR).

    <folder>/<split>/00000.descriptions.parquet   text, where it comes from and CLIP's token ids, a row per recipe
    <folder>/<split>/00000.segments.parquet       bytes of each segment, a row per photo
    <folder>/<split>/00000.segments.jpegs         the segments, one after the other

Both may be given by the source, as DAR's authors' are. Both are made shard by shard for a store that is complete, and
the data card says so at the end. What is finished is not made again; what a slow model was interrupted at goes on
within the shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from recipe_lib.data.clip_text import CONTEXT, clip_ids
from recipe_lib.data.cues import describe_cues
from recipe_lib.data.descriptions import LLMDescriber
from recipe_lib.data.images import ImageError, decode_jpeg, read_image, to_jpeg
from recipe_lib.data.parallel import Workers
from recipe_lib.data.recipe import DataError
from recipe_lib.data.segments import Rank, SamSegmenter, Segment, cut, foreground, superpixel_segments
from recipe_lib.data.shards import digest, finished, nested, parquet, save
from recipe_lib.data.store import TEXT_ONLY
from recipe_lib.paths import atomic_write_text
from recipe_lib.progress import progress
from recipe_lib.reachable import code_digest

CHUNK = 64  # photos whose segments are written together: what a kill can lose
PICTURES = (".jpg", ".jpeg", ".png")
TEXT = ["id", "title", "ingredients", "instructions"]


def add_descriptions(
    folder: Path, describer: LLMDescriber | None, cache: Path, *, given: bool = False, workers: int = 0
) -> dict:
    """Describe the finished dish of every recipe that has a photo.

    Args:
        folder: a prepared store.
        describer: a language model; None: the rules of `cues`, over all cores.
        cache: JSON lines that keep the answers of language models; of no use to the rules.
        given: the descriptions that the source brings, and the rules for recipes without one, in place of `describer`.
        workers: processes; 0: one per core.

    Returns:
        The data card, with how many descriptions come from each source.

    Raises:
        DataError, ValueError, ConnectionError: as `LLMDescriber.describe`; DataError where none is given.
    """
    if given or describer is None:
        with Workers(workers) as pool:
            jobs = [(folder, number, given) for number in numbers(folder)]
            records = list(progress(pool.map(_describe_shard, jobs), "described shards", len(jobs)))
    else:
        told = describer.describe(_text(folder, numbers(folder)), cache)
        # Shards are written again from the cache: it tells what is described and by what, shards do not.
        records = [_write_descriptions(folder, number, told) for number in numbers(folder)]
        for _ in told:  # to its end, where it lets go of the cache
            pass
    sources = sum((Counter(record["sources"]) for record in records), Counter())
    if given and not sources["given"]:
        raise DataError(
            f"{folder}: no recipe of the source brings a description; choose description_backend cues or llm"
        )
    return note(folder, "descriptions", records, {"sources": dict(sorted(sources.items()))})


def add_segments(
    folder: Path,
    n: int,
    size: int,
    *,
    given: bool = False,
    sam: SamSegmenter | None = None,
    rank: Rank | None = None,
    workers: int = 0,
) -> dict:
    """Cut the n best parts out of every photo of the training recipes, and out of the first photo of the others.

    Args:
        folder: a prepared store.
        n: segments of a photo at most.
        size: side of the square pictures of them, pixels: what the image tower reads.
        given: the pictures that the source brings for each photo, in the order of their names; a photo without any has
            none. What cannot be read or lies outside the source is left out and named in the card.
        sam: a SAM; None: superpixels, over all cores where there is no `rank`.
        rank: scores crops in place of the rule; see `segments`.
        workers: processes; 0: one per core.

    Returns:
        The data card, with how many segments there are and how many photos have none.

    Raises:
        DataError: none is given.
    """
    jobs = [(folder, number, n, size, given, sam, rank) for number in numbers(folder)]
    # A model stays in this process, which may have a GPU.
    with Workers(1 if (sam or rank) and not given else workers) as pool:
        records = list(progress(pool.map(_segment_shard, jobs), "segmented shards", len(jobs)))
    counts = {key: sum(record[key] for record in records) for key in ("photos", "segments", "photos_without")}
    if given:
        counts["skipped"] = [line for record in records for line in record["skipped"]][:100]
        if not counts["segments"]:
            raise DataError(
                f"{folder}: the source brings no segment of a photo; choose segment_backend superpixels or sam"
            )
    return note(folder, "segments", records, {"n": n, "size": size} | counts)


def numbers(folder: Path) -> list[int]:
    """Shards, by their records."""
    return sorted(int(path.stem) for path in (folder / "shards").glob("[0-9]*.json") if path.stem.isdigit())


def splits(folder: Path, number: int) -> list[str]:
    """The splits of a shard whose recipes have photos."""
    record = json.loads((folder / "shards" / f"{number:05d}.json").read_text("utf-8"))
    return [split for split in record["recipes"] if split != TEXT_ONLY]


def _made_from(maker: Callable, folder: Path, number: int, *settings: str) -> str:
    recipes = (folder / "shards" / f"{number:05d}.json").read_text("utf-8")
    return digest(code_digest(maker), recipes, *settings)


def note(folder: Path, name: str, records: list[dict], facts: dict) -> dict:
    """The card tells that the store has them, and of which bytes they are."""
    card = json.loads((folder / "card.json").read_text("utf-8"))
    files = sorted(pair for record in records for pair in record["files"].items())
    card[name] = facts | {"sha256": digest(*(f"{file} {sha}" for file, sha in files))}
    atomic_write_text(folder / "card.json", json.dumps(card, indent=1, ensure_ascii=False))
    return card


# ---- descriptions ----


def _text(folder: Path, numbers: list[int]) -> Iterator[tuple]:
    for number in numbers:
        for split in splits(folder, number):
            table = pq.read_table(folder / split / f"{number:05d}.recipes.parquet", columns=TEXT)
            yield from zip(*(column.to_pylist() for column in table), strict=True)


def _describe_shard(folder: Path, number: int, given: bool) -> dict:
    made_by = "given" if given else "cues"
    if record := finished(_record(folder, number), _made_from(_describe_shard, folder, number, made_by), folder):
        return record
    texts = chain(*(_given(folder / split / f"{number:05d}", "description") for split in splits(folder, number)))
    told = (
        (id_, text, "given") if given and text else (id_, describe_cues(*recipe), "cues")
        for (id_, *recipe), text in zip(_text(folder, [number]), texts, strict=True)
    )  # fmt: skip
    return _write_descriptions(folder, number, told, made_by)


def _given(shard: Path, column: str) -> list:
    """What the source brings for each recipe of a shard; None where it brings nothing."""
    if not Path(f"{shard}.given.parquet").is_file():
        return [None] * pq.read_metadata(f"{shard}.recipes.parquet").num_rows
    return pq.read_table(f"{shard}.given.parquet", columns=[column])[column].to_pylist()


def _record(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:05d}.descriptions.json"


def _write_descriptions(folder: Path, number: int, told: Iterator[tuple[str, str, str]], made_by: str = "") -> dict:
    """Take a shard's descriptions from `told`, (id, text, source) in the order of its recipes."""
    made_from = _made_from(_describe_shard, folder, number, made_by)
    record = {"made_from": made_from, "files": {}, "sources": {}}
    for split in splits(folder, number):
        name = f"{split}/{number:05d}"
        rows = pq.read_metadata(folder / f"{name}.recipes.parquet").num_rows
        texts, sources = zip(*(next(told)[1:] for _ in range(rows)), strict=True)
        tokens = [clip_ids(text, CONTEXT) for text in texts]
        record["sources"] = dict(Counter(record["sources"]) + Counter(sources))
        starts = np.cumsum([0, *map(len, tokens)]).tolist()
        ids = nested(starts, pa.array([id_ for row in tokens for id_ in row], pa.int32()))
        table = pa.table({"text": list(texts), "source": list(sources), "tokens": ids})
        record["files"][f"{name}.descriptions.parquet"] = save(folder / f"{name}.descriptions.parquet", parquet(table))
    atomic_write_text(_record(folder, number), json.dumps(record))
    return record


# ---- segments ----


def _superpixels(photos: list[np.ndarray], *, n: int, rank: Rank | None) -> list[list[Segment]]:
    return [superpixel_segments(photo, n=n, rank=rank) for photo in photos]


def _segment_shard(
    folder: Path,
    number: int,
    n: int,
    size: int,
    given: bool = False,
    sam: SamSegmenter | None = None,
    rank: Rank | None = None,
) -> dict:
    path = folder / "shards" / f"{number:05d}.segments.json"
    pictures = {
        s: _pictures(folder / s / f"{number:05d}", first_only=s != "train") for s in splits(folder, number) if given
    }
    made_by = [json.dumps(pictures, default=_state)] if given else [str(sam or "superpixels"), str(rank or "rule")]
    made_from = _made_from(_segment_shard, folder, number, *made_by, str(n), str(size))
    if record := finished(path, made_from, folder):
        return record
    record = {"made_from": made_from, "files": {}, "photos": 0, "segments": 0, "photos_without": 0, "skipped": []}
    parts = folder / "shards" / f"segments-{number:05d}"  # chunks that are finished
    for split in splits(folder, number):
        name = f"{split}/{number:05d}"
        sizes: list[list[int]] = []
        dishes: list[str] = []
        jpegs: list[bytes] = []
        photos = list(_photos(folder / name, first_only=split != "train"))
        for start in range(0, len(photos), CHUNK):
            chunk = parts / f"{split}-{start}-{made_from[:16]}"
            if not chunk.is_file() and given:
                save(chunk, _resized(pictures[split][start : start + CHUNK], n, size))
            elif not chunk.is_file():
                save(chunk, _segment(photos[start : start + CHUNK], n, size, sam or _superpixels, rank))
            head, _, data = chunk.read_bytes().partition(b"\n")
            rows, skipped, dish = json.loads(head)
            sizes += rows
            dishes += dish
            record["skipped"] += skipped
            jpegs.append(data)
        wanted = [row for row, photo in zip(sizes, photos, strict=True) if photo]
        record["photos"] += len(wanted)
        record["segments"] += sum(map(len, wanted))
        record["photos_without"] += sum(not row for row in wanted)
        masks = pa.array([bytes.fromhex(bits) for bits in dishes], pa.binary())
        table = pa.table({"segment_bytes": pa.array(sizes, pa.list_(pa.int64())), "foreground": masks})
        record["files"][f"{name}.segments.parquet"] = save(folder / f"{name}.segments.parquet", parquet(table))
        record["files"][f"{name}.segments.jpegs"] = save(folder / f"{name}.segments.jpegs", b"".join(jpegs))
    atomic_write_text(path, json.dumps(record))
    shutil.rmtree(parts, ignore_errors=True)
    return record


def _photos(shard: Path, first_only: bool) -> Iterator[bytes]:
    """JPEG bytes of the photos of a shard's recipes; b"" for those that nobody reads."""
    table = pq.read_table(f"{shard}.recipes.parquet", columns=["photo_bytes"])
    with open(f"{shard}.jpegs", "rb") as file:
        for sizes in table["photo_bytes"].to_pylist():
            for which, length in enumerate(sizes):
                data = file.read(length)
                yield b"" if first_only and which else data


def _segment(photos: list[bytes], n: int, size: int, find: Callable, rank: Rank | None) -> bytes:
    """A line of JSON with the bytes of each photo's segments and where its dish lies, then the segments."""
    decoded = [np.asarray(decode_jpeg(photo)) if photo else None for photo in photos]
    segments = iter(find([pixels for pixels in decoded if pixels is not None], n=n, rank=rank))
    parts = [[] if pixels is None else next(segments) for pixels in decoded]
    rows = [[to_jpeg(cut(p, segment, size), size) for segment in row] for p, row in zip(decoded, parts, strict=True)]
    dishes = [
        "" if pixels is None else foreground(pixels, row).hex() for pixels, row in zip(decoded, parts, strict=True)
    ]
    return _chunk(rows, [], dishes)


def _chunk(rows: list[list[bytes]], skipped: list[str], dishes: list[str]) -> bytes:
    head = json.dumps([[[len(part) for part in row] for row in rows], skipped, dishes]).encode()
    return b"\n".join([head, b"".join(part for row in rows for part in row)])


def _pictures(shard: Path, first_only: bool) -> list[tuple[str, list[Path]]]:
    """For each photo of a shard, the folder that its segments may not leave, and their files by name."""
    sizes = pq.read_table(f"{shard}.recipes.parquet", columns=["photo_bytes"])["photo_bytes"].to_pylist()
    listed = []
    for photos, root, folders in zip(sizes, _given(shard, "segment_root"), _given(shard, "segments"), strict=True):
        for which in range(len(photos)):
            folder = Path(root, folders[which]) if folders and not (first_only and which) else None
            files = folder.iterdir() if folder and folder.is_dir() else ()
            listed.append((root or "", sorted(path for path in files if path.suffix.lower() in PICTURES)))
    return listed


def _state(path: Path) -> list:
    """What tells a picture from another one of its name."""
    state = path.stat() if path.is_file() else None
    return [str(path), state and [state.st_size, state.st_mtime_ns]]


def _resized(pictures: list[tuple[str, list[Path]]], n: int, size: int) -> bytes:
    """The first n pictures of each photo that can be read, as squares: what DAR's code makes of them."""
    rows, skipped = [], []
    for root, paths in pictures:
        row: list[bytes] = []
        for path in paths:
            if len(row) == n:
                break
            try:
                if not Path(os.path.realpath(path)).is_relative_to(root):
                    raise ImageError(f"{path}: is a link that leaves {root}; it is not read")
                square = read_image(path).resize((size, size), Image.Resampling.BICUBIC)
                row.append(to_jpeg(square, size))
            except ImageError as error:
                skipped.append(str(error))
        rows.append(row)
    return _chunk(rows, skipped, [""] * len(rows))  # squares that do not tell where they lay
