"""Recipe1M, in its official layout or as the pickles that the authors' preprocessing makes of it (arXiv:2103.13061).

    layer1.json      [{id, title, ingredients: [{text}], instructions: [{text}], partition}, ...]
    layer2.json      [{id, images: [{id: "0123456789.jpg"}, ...]}, ...]
    det_ingrs.json   [{id, valid: [bool], ingredients: [{text}]}, ...], needed for `names="det_ingrs"` only
    splits/train.txt val.txt test.txt, or the three in the folder itself: ids of the pairs to use; optional
    <image folder>/<train, val or test>/0/1/2/3/0123456789.jpg

One recipe is in memory at a time, with what the side files hold until `layer1.json` asks for it: nothing of a side file
with the same recipes in the same order, at most its ids, photo names or ingredient names.
One bad recipe is skipped and named; a file that cannot be parsed stops the reading, as more may be wrong with it.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recipe_lib.data.recipe import DataError, Recipe, clean
from recipe_lib.sources.quantities import repair_quantities
from recipe_lib.sources.recipe1m_assembly import (
    ID,
    PARTITIONS,
    Assembly,
    Recipe1MReport,
    Skip,
    check_file,
    check_folder,
    entry_id,
    given_description,
    shown,
)
from recipe_lib.sources.recipe1m_pickles import read_pickles

MAX_ITEM = 1 << 24  # characters of one JSON item; a recipe has a few thousand
_CHUNK = 1 << 20  # bytes
_SPACE = re.compile(r"[ \t\r\n]*")


def read_recipe1m(
    folder: Path, *, image_dir: Path | None = None, names: str = "rules"
) -> tuple[Iterator[Recipe], Recipe1MReport]:
    """Recipes as a stream, and the report, which is right when the stream is exhausted.

    Ids must be 10 hexadecimal digits; pickles may have others. A recipe may lack its ingredients or its instructions,
    not both, and its title may be empty, not absent. A recipe that layer2.json lacks is text-only, whatever the split
    lists say. Lost slashes of ingredient lines are put back (`quantities`). Photos are not opened, and
    `Recipe.image_root` is their partition's folder. An id that is twice in layer1.json comes twice.

    Args:
        folder: holds layer1.json and layer2.json, or else train.pkl, val.pkl and test.pkl (`recipe1m_pickles`), these
            also in its folder `traindata`.
        image_dir: holds the folders train, val and test of the photos; default: `folder`.
        names: "rules": `Recipe.names` is None; "det_ingrs": names from det_ingrs.json, in lower case, None where it
            says that a line is none. Pickles bring labels of their own, and `names` is not used.

    Raises:
        DataError: at the call, a folder or file missing, not readable or not of this kind, or bad split lists; while
            reading, a file that cannot be parsed, or an id twice in a side file.
    """
    if names not in ("rules", "det_ingrs"):
        raise DataError(f"names={names!r}: choose rules or det_ingrs")
    folder = Path(folder)
    check_folder(folder, "name the folder of Recipe1M")
    assembly = Assembly(Path(image_dir or folder), Recipe1MReport())
    official = os.path.lexists(folder / "layer1.json")
    pickles = folder if os.path.lexists(folder / "train.pkl") else folder / "traindata"
    if not official and not os.path.lexists(pickles / "train.pkl"):
        missing = "holds neither layer1.json (Recipe1M) nor train.pkl (the authors' pickles)"
        raise DataError(f"{folder}: {missing}, nor does its traindata")
    check_folder(assembly.image_dir, "name the folder of the photos (image_dir)")
    partitions = [path for name in PARTITIONS if os.path.lexists(path := assembly.image_dir / name)]
    if not partitions:
        raise DataError(
            f"{assembly.image_dir}: no folder train, val or test in it; name the photos' folder (image_dir)"
        )
    for path in partitions:
        check_folder(path, "unpack the photos again")
    if not official:
        return read_pickles(pickles, assembly), assembly.report
    files = ["layer1.json", "layer2.json"] + ["det_ingrs.json"] * (names == "det_ingrs")
    for name in files:
        check_file(folder / name, "download it again")
    recipes = _recipes(*(folder / name for name in files), splits=_split_lists(folder), assembly=assembly)
    return recipes, assembly.report


def _split_lists(folder: Path) -> dict[str, str] | None:
    """Partition of each listed id; None where there are no lists."""
    for base in (folder / "splits", folder):
        paths = {name: base / f"{name}.txt" for name in PARTITIONS}
        if not any(os.path.lexists(path) for path in paths.values()):
            continue
        listed: dict[str, str] = {}
        for partition, path in paths.items():
            check_file(path, "give all three split lists or none")
            try:
                words = path.read_text(encoding="utf-8-sig").split()
            except UnicodeDecodeError:
                raise DataError(f"{path}: not UTF-8 text; it must hold one id per line") from None
            for word in words:
                if not ID.fullmatch(word):
                    raise DataError(f"{path}: {shown(word)} is no id of 10 hexadecimal digits; correct the list")
                if listed.setdefault(word, partition) != partition:
                    raise DataError(f"{path}: id {word} is in {listed[word]}.txt too; keep one of them")
        return listed
    return None


def _recipes(
    layer1: Path, layer2: Path, det_ingrs: Path | None = None, *, splits: dict[str, str] | None, assembly: Assembly
) -> Iterator[Recipe]:
    report = assembly.report

    def pack_photos(entry: dict, where: str) -> str:
        photos = [image.get("id") if isinstance(image, dict) else image for image in _list(entry, "images")]
        return "".join(name[:10] for name in assembly.good_photos(where, photos))

    def pack_names(entry: dict, where: str) -> str:
        valid, texts = _list(entry, "valid"), _texts(entry, "ingredients")
        if len(valid) != len(texts):
            raise Skip(f"{len(valid)} valid, {len(texts)} ingredients")
        return "".join(f"\n{text.lower() if good is True else ''}" for good, text in zip(valid, texts, strict=True))

    photos_of, names_of = _SideFile(layer2, pack_photos, report), None
    if det_ingrs:
        names_of = _SideFile(det_ingrs, pack_names, report)
    for position, entry in enumerate(read_json_list(layer1)):
        where = f"{layer1.name} recipe {position}"
        try:
            id = entry_id(entry)
            where = f"{where} ({id})"
            packed, packed_names = photos_of.pop(id), names_of.pop(id) if names_of else None
            partition, title = entry.get("partition"), entry.get("title")
            if partition not in PARTITIONS:
                raise Skip(f"partition is {shown(partition)}, must be train, val or test")
            if not isinstance(title, str):
                raise Skip(f"title is {shown(title)}, must be text")
            lines, steps = _texts(entry, "ingredients"), _texts(entry, "instructions")
            if splits is not None and packed is not None and splits.pop(id, None) != partition:
                report.unlisted.append(id)
                continue
            names = packed_names and [name or None for name in packed_names.split("\n")[1:]]
            if names_of and len(names or ()) != len(lines):
                report.names_by_rules.append(id)
                names = None
            repaired = [repair_quantities(line) for line in lines]
            photos = [f"{digits}.jpg" for digits in ID.findall(packed or "")]
            recipe = assembly.recipe(
                id, partition, clean(title), repaired, steps, photos, names or None, given_description(entry)
            )
        except Skip as reason:
            report.skipped.append(f"{where}: {reason}")
            continue
        report.repaired_lines += sum(new != old for new, old in zip(repaired, lines, strict=True))
        yield recipe
    report.unknown_photo_entries = photos_of.rest()
    report.unknown_name_entries = names_of.rest() if names_of else 0
    report.listed_without_pair = len(splits or ())


class _SideFile:
    """What a second file says of each recipe, asked for in any order. Entries passed on the way wait, packed in a text.

    Args:
        pack: an entry and where it is -> text; Skip where that cannot be.
    """

    def __init__(self, path: Path, pack: Callable[[dict, str], str], report: Recipe1MReport):
        self._waiting: dict[str, str] = {}
        self._taken: set[str] = set()
        self._entries = self._packed(path, pack, report.skipped)

    def _packed(self, path: Path, pack: Callable[[dict, str], str], skipped: list[str]) -> Iterator[tuple[str, str]]:
        for position, entry in enumerate(read_json_list(path)):
            where = f"{path.name} entry {position}"
            try:
                id = entry_id(entry)
                if id in self._waiting or id in self._taken:
                    raise DataError(f"{path}: id {id} is there twice; keep one of the entries")
                where = f"{where} ({id})"
                yield id, pack(entry, where)
            except Skip as reason:
                skipped.append(f"{where}: {reason}")

    def pop(self, id: str) -> str | None:
        """The text of this id, once; None where the file lacks it."""
        while id not in self._waiting and (entry := next(self._entries, None)):
            self._waiting[entry[0]] = entry[1]
        if id in self._waiting:
            self._taken.add(id)  # the recipe's own string: no further copy
        return self._waiting.pop(id, None)

    def rest(self) -> int:
        """How many ids nobody asked for."""
        return len(self._waiting) + sum(1 for _ in self._entries)


def read_json_list(path: Path) -> Iterator[Any]:
    """Items of a file that is one JSON list, at any size; memory holds a megabyte and an item.

    The standard parser on a sliding text. (ijson's fast backend fails on half of a surrogate pair, which JSON allows,
    and 100 kB of brackets make it take all memory.)

    Raises:
        DataError: with the byte, not UTF-8, no list, broken, cut off, nested too deep or an item of over `MAX_ITEM`.
    """
    scan, decoder = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8-sig")()
    text, at, passed = "", 0, 0  # `passed` bytes came before text[0]

    def failure(reason: str, position: int) -> DataError:
        return DataError(f"{path}: {reason} near byte {passed + len(text[:position].encode())}; download it again")

    def more() -> bool:
        nonlocal text, at, passed
        # An item longer than a chunk is parsed anew after each reading: doubling keeps that cheap.
        data = file.read(max(_CHUNK, len(text) - at))
        passed, text, at = passed + len(text[:at].encode()), text[at:], 0
        try:
            text += decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            raise failure("not UTF-8", len(text)) from None
        return bool(data)

    def next_sign() -> str:
        nonlocal at
        while True:
            at = _SPACE.match(text, at).end()
            if at < len(text) or not more():
                return text[at : at + 1]

    with path.open("rb") as file:
        if next_sign() != "[":
            raise failure("not a JSON list", at)
        at += 1
        sign = "," if next_sign() != "]" else "]"
        while sign == ",":
            next_sign()
            try:
                item, end = scan(text, at)
            except RecursionError:
                raise failure("nested too deep", at) from None
            except ValueError as error:  # of an item that may go on in the next chunk
                if len(text) - at > MAX_ITEM:
                    raise failure(f"an item of over {MAX_ITEM} characters, or not complete JSON,", at) from None
                broken = getattr(error, "pos", at) - at  # more() moves the text
                if more():
                    continue
                reason = f" ({error.msg})" if isinstance(error, json.JSONDecodeError) else ""
                raise failure(f"not complete JSON{reason}", at + broken) from None
            length = end - at
            if end == len(text) and more():  # so may a number
                continue
            at += length
            yield item
            if (sign := next_sign()) == ",":
                at += 1
        if sign != "]":
            raise failure("not complete JSON (no ',' or ']' after an item)", at)
        at += 1
        if next_sign():
            raise failure("more text after the end of the list", at)


def _list(entry: dict, key: str) -> list:
    value = entry.get(key)
    if not isinstance(value, list):
        raise Skip(f"{key} is {shown(value)}, must be a list" if key in entry else f"no {key}")
    return value


def _texts(entry: dict, key: str) -> list[str]:
    texts = [item.get("text") if isinstance(item, dict) else None for item in _list(entry, key)]
    if wrong := [item for item, text in zip(entry[key], texts, strict=True) if not isinstance(text, str)]:
        raise Skip(f"{key} holds {shown(wrong[0])}, must hold objects with a text")
    return [clean(text) for text in texts]
