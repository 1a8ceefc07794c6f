"""A recipe typed or pasted as text."""

from __future__ import annotations

import re

from recipe_lib.data.recipe import DataError, clean

_INGREDIENTS = re.compile(r"[#*\s]*ingredients?[*:\s]*", re.IGNORECASE)
_STEPS = re.compile(r"[#*\s]*(instructions?|directions?|method|steps?|preparation)[*:\s]*", re.IGNORECASE)
_MARKER = re.compile(r"\s*(?:[-*+•>]+|\d{1,2}[.)])\s+")


def parse_recipe(text: str) -> tuple[str, list[str], list[str]]:
    """Title, ingredient lines and steps.

    The first line is the title. Lines after a heading such as "Ingredients" or "Method" are that part of it; without
    headings ingredients come first and the first blank line after them ends them.

    Raises:
        DataError: nothing in it.
    """
    lines = text.replace("\0", "").strip().splitlines()
    if not lines:
        raise DataError("the recipe is empty; type a title, its ingredients and its steps")
    title, *rest = lines
    parts: tuple[list[str], list[str]] = ([], [])
    headings, part = any(_STEPS.fullmatch(line) for line in rest), 0
    for line in rest:
        if _INGREDIENTS.fullmatch(line) or _STEPS.fullmatch(line):
            part = int(bool(_STEPS.fullmatch(line)))
        elif kept := clean(_MARKER.sub("", line, count=1)):
            parts[part].append(kept)
        elif parts[0] and not headings and not line.strip():
            part = 1
    return clean(title.lstrip("# ")), *parts
