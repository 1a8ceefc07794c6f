"""Write a dish down as people do: a title, ingredient lines with quantities, and steps; every phrase is one of several.

The title tells some of the truth (cuisine, dish, cooking, one or two ingredients), never all of it. Nothing here knows
of the table, so text and photo share the style only through the cuisine.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recipe_lib.kitchen.pantry import Ingredient

# In titles {p} is a place, {d} the dish, {c} the cooking, {a} and {b} salient ingredients, {s} a subtle one; units come
# as a little, middling, a lot; elsewhere {x} is a list of ingredients and {s} what the dish is made on.
SAY = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def ingredient_line(item: Ingredient, cut: str, amount: int, pick) -> str:
    """One line: quantity, ingredient (its name or plural) and preparation, as "2 large carrots, thinly sliced"."""
    units = (
        SAY["other_units"][item.unit]
        if item.unit in SAY["other_units"] and pick((0, 0, 1))
        else SAY["units"][item.unit]
    )
    name = item.name if item.unit == "count" and amount == 0 else item.plural
    if item.unit == "count":
        name = pick(("", "", "large ", "medium ", "small ")) + name
    quantity = units[amount] + pick((" of", "", "")) * (item.unit not in ("count", "weight"))
    if cut in ("", "whole"):
        return f"{quantity} {name}" + pick(("", "", "", ", to taste")) * (item.visibility == "invisible")
    how = pick(SAY["adverbs"].get(cut, ("",))) + cut
    if " " not in how and item.unit != "count" and pick((0, 1)):
        return f"{quantity} {how} {name}"
    return f"{quantity} {name}, {how}"


def _title(cuisine, dish, cooking, salient, subtle, pick) -> str:
    raw = pick(SAY["titles"]).format(
        p=pick(SAY["places"][cuisine]),
        d=pick(SAY["called"][dish]),
        c=pick(SAY["done"][cooking]),
        a=salient[0],
        b=salient[1],
        s=pick(subtle),
    )
    if pick((0, 0, 1)):
        return raw[0].upper() + raw[1:]
    return " ".join(w if w in ("and", "with") else w[0].upper() + w[1:] for w in raw.split())


def _steps(cuisine, dish, cooking, lines, pick) -> list[str]:
    """Four to eight steps of at most 15 words: prepare, cook, season, put together, finish, serve."""
    plural = {
        kind: [i.plural for i, _, _ in lines if i.visibility == kind] for kind in ("salient", "subtle", "invisible")
    }
    staple = next((i.plural for i, _, _ in lines if i.visibility == "staple"), "")
    steps, work = [], {}
    for item, cut, _ in lines:
        if item.visibility in ("salient", "subtle") and cut.split()[0] in (*SAY["verbs"], "cut") and pick((0, 1, 1)):
            verb, _, rest = cut.partition(" ")
            work.setdefault((SAY["verbs"].get(verb, verb), rest if verb == "cut" else ""), []).append(item.plural)
    jobs = [f"{verb} the {_listed(names[:3])} {rest}".strip() for (verb, rest), names in work.items()]
    if jobs:
        first = [jobs[0]] + [job for job in jobs[1:2] if len((jobs[0] + job).split()) < 13]
        steps.append(" and ".join(first).capitalize() + ".")
    hot = [i.plural for i, _, _ in lines if i.visibility == "salient" and (i.cooks or cooking == "raw")]
    cold = [name for name in plural["salient"] if name not in hot]
    if hot:
        steps.append(pick(SAY["cook"][cooking]).format(x=_listed(hot[:3])))
        cold = hot[3:] + cold
    steps.append(pick(SAY["season"]).format(x=_listed(plural["invisible"][:2])))
    if len(plural["invisible"]) > 2:
        steps.append(pick(SAY["season"]).format(x=_listed(plural["invisible"][2:])))
    steps.append(pick(SAY["build"][dish]).format(s=staple))
    if cold:
        steps.append(pick(SAY["cold"]).format(x=_listed(cold[:4])))
    steps.append(pick(SAY["finish"]).format(x=_listed(plural["subtle"])))
    if len(steps) < 4 or pick((0, 1)):
        steps.append(pick(SAY["serve"]).format(p=cuisine))
    return steps


def write(
    seed: int, cuisine: str, dish: str, cooking: str, lines: list[tuple[Ingredient, str, int]]
) -> tuple[str, list[str], list[str]]:
    """(title, ingredient lines, steps) from (ingredient, cut, amount 0..2) lines; the same seed, the same words."""
    draw = random.Random(seed).random

    def pick(options):  # an eighth of the time of random.choice
        return options[int(draw() * len(options))]

    salient = [item.name for item, _, _ in lines if item.visibility == "salient"]
    swap = pick((0, 0, 1))
    salient[:2] = salient[1::-1] if swap else salient[:2]
    subtle = [item.name for item, _, _ in lines if item.visibility == "subtle"]
    title = _title(cuisine, dish, cooking, salient, subtle, pick)
    return title, [ingredient_line(*line, pick) for line in lines], _steps(cuisine, dish, cooking, lines, pick)
