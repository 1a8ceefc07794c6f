"""The four file formats of a cookbook folder: each reader turns one file into raw fields, which `cookbook` then judges.

A reader yields (line number or None, fields) per recipe. `fields` is a dict of id, title, ingredients, instructions and
images as the file has them, of any type, or a text that says why there is none. A file that cannot be parsed at all is
a `DataError` with file and line; of JSON lines each stands for itself.
"""

from __future__ import annotations

import ast
import csv
import html
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from recipe_lib.data.recipe import DataError

Fields = tuple[int | None, Any]

_OTHER_NAMES = {
    "title": ("name",),
    "ingredients": ("recipeingredient",),
    "instructions": ("recipeinstructions", "directions", "method", "steps"),
    "images": ("image", "photos", "photo"),
}
_SECTIONS = {other: name for name in ("ingredients", "instructions") for other in (name, *_OTHER_NAMES[name])}
# Every repeat below stops at the character that would start it anew: a hostile text costs linear time.
_STRING = r"""(?:'(?:[^'\\\n]|\\.)*+'|"(?:[^"\\\n]|\\.)*+")\s*+"""
_LITERAL = re.compile(rf"\[\s*+(?:{_STRING}(?:,\s*+{_STRING})*+,?\s*+)?\]")
_HEADING = re.compile(r"(#{1,6})\s+(.*)")
_MARKER = re.compile(r"\s*(?:[-*+•>]+|\d{1,4}[.)])\s+(?:\[[ xX]\]\s+)?")
_PHOTO = re.compile(r"!\[[^\[\]\n]*\]\(\s{0,9}(?:<([^<>\n]+)>|([^()\s]++))[^()\n]*+\)")
_LINK = re.compile(r"\[([^\[\]]*)\]\([^()]*\)")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


def read_json_lines(path: Path) -> Iterator[Fields]:
    """One object per line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    fields = _parse_json(line)
                except ValueError as error:
                    yield number, str(error)
                    continue
                yield number, renamed(fields) if isinstance(fields, dict) else "the line is not an object {...}"


def read_csv(path: Path, cells: Callable[[dict[str, str]], dict[str, Any]] | None = None) -> Iterator[Fields]:
    """A table with a header; comma, semicolon or tab between cells. Nothing is yielded when no column is a title.

    Args:
        cells: fields of a row by its texts under their names in lower case; default: lists as `lines` has them.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        table = csv.DictReader(file, restval="", delimiter=max(",;\t", key=header.count), strict=True)
        try:
            table.fieldnames = [name.strip().lower() for name in table.fieldnames or ()]
            if not {"title", "name"}.isdisjoint(table.fieldnames):
                for row in table:
                    fields = "more cells than the header" if None in row else renamed((cells or _split_cells)(row))
                    yield table.line_num, fields
        except csv.Error as error:
            raise DataError(f"{path}:{table.reader.line_num}: not a sound CSV table ({error}); correct it") from None


def _split_cells(row: dict[str, str]) -> dict[str, Any]:
    plain = {"id", "title", "name"}
    return {name: text if name in plain else lines(text) for name, text in row.items()}


def lines(text: str) -> list[str]:
    """The list in a cell: its lines; in a cell of one line '|' parts them."""
    return text.splitlines() if "\n" in text else text.split("|")


def literal_lines(text: str) -> list[str] | str:
    """The texts of a Python list literal, or the text itself where it is anything else.

    Only a flat list of plain strings reaches Python's parser, of which a nested one could take the whole stack.
    """
    if len(text) > 1 << 17 or not _LITERAL.fullmatch(text.strip()):
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd backslashes, which it keeps
            return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):  # \N{...} of no such name, a null byte
        return text


def read_json_ld(path: Path) -> Iterator[Fields]:
    """Every schema.org/Recipe in the file, however deep. In JSON-LD one value and a list of one are the same."""
    try:
        stack = [_parse_json(path.read_bytes())]
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(reversed(node))
        elif isinstance(node, dict):
            if any(re.fullmatch(r"(.*[/:])?Recipe", str(kind)) for kind in _as_list(node.get("@type"))):
                fields = renamed(node)
                fields.pop("id", None)
                for name in ("ingredients", "images"):
                    fields[name] = [_address(item) for item in _as_list(fields.get(name))]
                yield None, fields | {"instructions": _steps(fields.get("instructions"))}
            else:
                stack.extend(reversed(node.values()))


def _steps(node: Any) -> list[Any]:
    """Texts of strings, HowToStep, HowToSection, ItemList and lists of them, in order."""
    steps, stack = [], [node]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(reversed(item))
        elif isinstance(item, dict):
            stack.append(
                next((item[key] for key in ("itemListElement", "item", "text", "name") if item.get(key)), None)
            )
        elif isinstance(item, str):  # many sites write all steps as one text, with HTML or line ends between them
            steps += html.unescape(_TAG.sub("\n", item)).splitlines()
        elif item is not None:
            steps.append(item)  # a number: refused later
    return steps


def _address(image: Any) -> Any:
    """An ImageObject stands for its file."""
    keys = [key for key in ("url", "contentUrl", "@id") if key in image] if isinstance(image, dict) else []
    return image[keys[0]] if keys else image


class _FrontMatterLoader(yaml.SafeLoader):
    """Plain values only: no tags, and no aliases, of which a few lines can unfold to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias (*name)", problem_mark=event.start_mark)
        if event.tag:
            raise yaml.MarkedYAMLError(problem="a tag (!name)", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def read_markdown(path: Path) -> Iterator[Fields]:
    """YAML front matter and / or sections; front matter wins. A text with neither is no recipe."""
    front, body = {}, path.read_text(encoding="utf-8-sig")
    if match := re.match(r"---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|$)", body, re.DOTALL):
        try:
            front, body = yaml.load(match.group(1) or "", _FrontMatterLoader) or {}, body[match.end() :]
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
            mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
            line, reason = (mark.line if mark else 0) + 2, str(reason).splitlines()[0]
            raise DataError(f"{path}:{line}: front matter is not plain YAML ({reason}); correct it") from None
    if not isinstance(front, dict):
        yield None, "front matter is not made of lines 'name: value'"
        return
    fields, sections = renamed(front), _sections(body)
    if _named(front) or sections["ingredients"] or sections["instructions"]:
        images = [*_as_list(fields.get("images")), *sections["images"]]
        yield (
            None,
            sections | {name: value for name, value in fields.items() if value not in ("", None)} | {"images": images},
        )


def _sections(body: str) -> dict[str, Any]:
    """Title, photos and the two lists of a markdown text. A heading below a section's own level stays inside it."""
    sections: dict[str, Any] = {"title": None, "ingredients": [], "instructions": []}
    sections["images"] = [bracketed or plain for bracketed, plain in _PHOTO.findall(body)]
    section, level, goes_on = None, 7, False
    for line in _PHOTO.sub("", body).splitlines():
        if heading := _HEADING.match(line):
            name = heading.group(2).strip("# \t")
            known = _SECTIONS.get((re.findall(r"\w+", name.lower()) or [""])[0])
            if known or len(heading.group(1)) <= level:
                section, level = known, len(heading.group(1))
            sections["title"] = sections["title"] or (None if known else name)
        elif section and line.strip():
            marker = _MARKER.match(line)
            text = _LINK.sub(r"\1", line[marker.end() if marker else 0 :]).replace("**", "").strip()
            if goes_on and section == "instructions" and not marker:
                sections[section][-1] += f" {text}"  # a paragraph of several lines is one step
            else:
                sections[section].append(text)
        goes_on = bool(line.strip()) and not heading
    return sections


def _named(fields: dict) -> dict[str, Any]:
    """The fields of a recipe under our names, whatever the file calls them."""
    fields = {str(name).lower(): value for name, value in fields.items()}
    known = {"id": fields["id"]} if "id" in fields else {}
    for name, others in _OTHER_NAMES.items():
        if key := next((key for key in (name, *others) if key in fields), None):
            known[name] = fields[key]
    return known


def renamed(fields: dict) -> dict[str, Any]:
    """The same with every other field under its own name: `read_cookbook` may be told to look at one."""
    return {str(name).lower(): value for name, value in fields.items()} | _named(fields)


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _parse_json(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"not complete UTF-8 JSON ({error}); correct or remove it") from None


READERS = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": read_json_ld,
    ".jsonld": read_json_ld,
    ".md": read_markdown,
    ".markdown": read_markdown,
}
