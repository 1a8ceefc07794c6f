"""Answers as HTML. Every text is escaped, and no script is in it: titles and file names come from anywhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

from recipe_lib.search.engine import NAMED, Hit

SHOWN = 6  # ingredient lines of a card that is not opened
MARKED = f'<p class="ck-soft">Calibrated probabilities; from {100 * NAMED:.0f} % on marked in the recipes.</p>'
Lines = list[tuple[str, float]]  # an ingredient line, and how likely its ingredient is in the photo


def source(image: bytes | np.ndarray) -> str:
    """JPEG bytes, or pixels (H, W, 3) uint8, as the address of a picture."""
    kind = "jpeg"
    if isinstance(image, np.ndarray):
        out, kind = io.BytesIO(), "png"
        Image.fromarray(image).save(out, "PNG")
        image = out.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def bars(ingredients: Mapping[str, float], top: int = 10) -> str:
    """The likeliest ingredients of a photo."""
    if not ingredients:
        return '<p class="ck-soft">This system names no ingredients.</p>'
    rows = [
        f'<li class="{"ck-seen" if _named(p) else ""}"><span>{escape(name)}</span>'
        f'<span class="ck-bar" aria-hidden="true"><i style="width:{100 * p:.0f}%"></i></span>'
        f"<span>{100 * p:.0f}&nbsp;%</span></li>"
        for name, p in list(ingredients.items())[:top]
    ]
    return f'<div class="ck-bars"><h2>Seen in the photo</h2>{MARKED}<ol>{"".join(rows)}</ol></div>'


def card(rank: int, hit: Hit, lines: Lines, note: str = "") -> str:
    """A recipe, or the recipe of a photo; note: HTML that is said of it besides."""
    photo = f'<img src="{source(hit.photo)}" alt="">' if hit.photo else '<div class="ck-none">no photo</div>'
    text = [f"<mark>{escape(line)}</mark> {100 * p:.0f}&nbsp;%" if _named(p) else escape(line) for line, p in lines]
    first, more, steps = text[:SHOWN], text[SHOWN:], [escape(step) for step in hit.recipe["instructions"]]
    counts = [_count(len(more), "more ingredient")] if more else []
    summary = " and ".join([*counts, _count(len(steps), "step")])
    title = escape(hit.title) or "(no title)"
    return (
        f'<li><article class="ck-card">{photo}<div><h3 class="ck-title" title="{title}">{title}</h3>'
        f'<div class="ck-facts"><span>{rank}.</span>{note}<span>similarity {hit.similarity:.2f}</span>'
        f"<span>{escape(hit.part.name)}</span></div>"
        f'<div class="ck-similar" aria-hidden="true"><i style="width:{100 * max(0, hit.similarity):.0f}%"></i></div>'
        f'<ul class="ck-lines">{_items(first)}</ul><details><summary>{summary}</summary>'
        f'<ul class="ck-lines">{_items(more)}</ul><ol>{_items(steps)}</ol></details></div></article></li>'
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _named(p: float) -> bool:
    return round(p, 2) >= NAMED  # as it is shown


def _items(lines: Sequence[str]) -> str:
    return "".join(f"<li>{line}</li>" for line in lines)


OWN = '<span class="ck-up">its own recipe</span>'


def movement(places: int | None) -> str:
    """How a recipe has moved against the other side, in an arrow and in words."""
    if places is None:
        return '<span class="ck-up">new</span>'
    if not places:
        return "<span>same place</span>"
    way, arrow = ("up", "▲") if places > 0 else ("down", "▼")
    return f'<span class="ck-{way}"><span aria-hidden="true">{arrow}</span> {way} {abs(places)}</span>'


def cards(hits: Sequence[Hit], lines: Sequence[Lines], notes: Sequence[str]) -> str:
    """A list of `card`s."""
    if not hits:
        return '<p class="ck-empty">Nothing is there to be found: the recipes that are searched have none of these.</p>'
    each = enumerate(zip(hits, lines, notes, strict=True), 1)
    return f'<ol class="ck-cards">{"".join(card(rank, *parts) for rank, parts in each)}</ol>'
