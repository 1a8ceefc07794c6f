"""What the finished dish looks like, in one sentence by rules: visible ingredients, cuts, cooking; offline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from recipe_lib.data.ingredients import ingredient_name, singular

MAX_WORDS, MAX_TOKENS = 32, 68  # of a description; CLIP reads 77 tokens, two of them its own marks


@lru_cache(1)
def _cues() -> dict[str, dict[str, str]]:
    """The tables of cues.json as word -> row. Words that belong together are joined by "_"; the first row counts."""
    tables = json.loads(Path(__file__).with_name("cues.json").read_text(encoding="utf-8"))
    for name, table in tables.items():
        rows = table.items() if isinstance(table, dict) else [(name, table)]
        pairs = [(word, row) for row, words in rows for word in words.split()]
        tables[name] = dict(pairs) | dict(reversed(pairs))
    return tables


def describe_cues(title: str, ingredients: Sequence[str], instructions: Sequence[str]) -> str:
    """One sentence about the finished dish, of at most 32 words.

    Only what the recipe says: its title, ingredients that can be seen (cues.json) with the colour they have and the cut
    on their line, the cooking of the last step that names them, and the shape or vessel that the kind of dish has. What
    the tables do not hold is not mentioned: of a recipe in another language the title remains. Without a title it is
    "a dish of food".
    """
    cues, dish = _cues(), _clean_title(title)
    named = {singular(word) for word in re.findall(r"\w+", dish.lower())}
    head = re.split(r" (?:with|in|on|over) |,", dish.lower())[0].split()
    kinds = [(w, cues[t][w]) for t in ("dishes", "vessels") for w, _ in _terms(head) if w in cues[t]]
    kind, place = kinds[0] if kinds else ("", "")
    implied = {singular(word) for word in place.split()}
    said = re.findall(r"\w+", " ".join(ingredients[:60]).lower())
    sauce = next((row for word, row in cues["sauces"].items() if word in said), "")
    place = re.sub(r"\[.*?\]", lambda m: m[0][1:-1].format(sauce) if sauce else "", place)
    if kind in cues["dough"] and "chocolate chip" not in dish.lower() and not named.isdisjoint({"chocolate", "cocoa"}):
        place = re.sub("golden(?: brown)?", "dark brown", place)

    steps = [_cooking(s) for step in instructions[:60] for s in re.split(r"[.;!]", step[:2000].lower())]
    baked = kind in cues["dough"] or (
        not kind and "flour" in said and any(heat == "golden baked" for heat, *_ in steps)
    )
    mains, tops, seen = [], [], set()
    for line in ingredients[:60]:
        term, shown = _visible(line)
        if not term or term in seen or (baked and term in cues["lost_in_dough"]):
            continue
        seen.add(term)
        last = term.split("_")[-1]
        if last in implied:  # "layered with bread" says so
            continue
        heat = next((heat for heat, _, words in reversed(steps) if heat and last in words), "") * (not baked)
        if term in cues["on_top"] and (not steps or any(top and last in words for _, top, words in steps)):
            tops.append((last not in named, "", shown))
        elif term not in cues["lost_unless_on_top"] or last in named:
            mains.append((last not in named, heat, shown))
    # What the title names comes first, then the recipe's own order.
    mains, tops = sorted(mains, key=lambda item: item[0])[:5], sorted(tops, key=lambda item: item[0])[:3]
    if not (mains or tops or place):
        place = next((heat for heat, *_ in reversed(steps) if heat not in ("", "tender", "fresh")), "")
    while True:
        text = _sentence(dish, mains, place, tops)
        if not (mains or tops) or (len(text.split()) <= MAX_WORDS and _tokens(text) <= MAX_TOKENS):
            return text
        (tops if len(tops) > 1 or not mains else mains).pop()


def _clean_title(title: str) -> str:
    """Without brackets, praise and subtitle; cut at 12 words and about 50 tokens."""
    text = re.sub(r"\([^)]*\)|\[[^]]*\]|[\"*#_]", " ", title[:400])
    text = next((part for part in re.split(r"[:|–—]| - ", text) if part.strip()), "")
    words = [word for word in text.split() if word.lower().strip(",.!?") not in _cues()["noise"]] or text.split()
    del words[12:]
    while len(words) > 1 and (_tokens(" ".join(words)) > 50 or words[-1].lower() in _cues()["link"]):
        words.pop()
    text = " ".join(words).strip(" ,.!?&-")
    while _tokens(text) > 50:  # a language written without spaces
        text = text[:-1]
    return (text.capitalize() if text.isupper() else text) or "a dish of food"


def _tokens(text: str) -> int:
    """About as many tokens as CLIP's byte-pair vocabulary needs, rather more."""
    return sum(-(-len(run) // 5) if run.isascii() else len(run.encode()) for run in re.findall(r"[a-zA-Z]+|\S", text))


def _terms(words: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(singular word or pair "first_second", place of its first word), from the last word on, pairs first."""
    for i in reversed(range(len(words))):
        if i:
            yield f"{words[i - 1]}_{singular(words[i])}", i - 1
        yield singular(words[i]), i


def _visible(line: str) -> tuple[str, str]:
    """(term of the table, "sliced red tomatoes") of an ingredient line; "" for what is not seen or not known."""
    cues, words = _cues(), (ingredient_name(line) or "").split()
    term, at = next((t for t in _terms(words) if t[0] in cues["unseen"] or t[0] in cues["colours"]), ("", 0))
    said = re.findall(r"\w+", line.lower())
    if not term or term in cues["unseen"] or not {"juice", "juiced"}.isdisjoint(said):
        return "", ""
    *name, last = words[at : at + term.count("_") + 1]
    colour = words[at - 1] if at and words[at - 1] in cues["colour_words"] else cues["colours"][term]
    colour = "" if words[at] in cues["colour_words"] else colour
    cut = next((word for word in reversed(said) if word in cues["cuts"]), "")
    if cut in ("wedges", "sticks", "rings", "florets"):
        return term, " ".join([*colour.split(), *name, last, cut])
    noun = next((plural for plural in (last + "es", last + "s", last[:-1] + "ies") if plural in said), last)
    return term, " ".join([*cut.split(), *colour.split(), *name, noun])


def _cooking(sentence: str) -> tuple[str, bool, set[str]]:
    """What a sentence of the steps does: the look of its cooking or "", whether it tops the dish, words in singular."""
    words = re.findall(r"[\w-]+", sentence)
    heat = next((look for word in reversed(words) if (look := _cues()["heat"].get(word))), "")
    return heat, any(word in _cues()["topping"] for word in words), {singular(word) for word in words}


def _sentence(dish: str, mains: list, place: str, tops: list) -> str:
    groups: dict[str, list[str]] = {}
    for _, heat, shown in mains:
        groups.setdefault(heat, []).append(shown)
    parts = [f"{heat} {_listed(shown)}".strip() for heat, shown in groups.items()] + [place] * bool(place)
    if tops:
        parts.append("topped with " * bool(parts) + _listed([shown for *_, shown in tops]))
    return f"A photo of {dish}{': ' * bool(parts)}{', '.join(parts)}."


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
