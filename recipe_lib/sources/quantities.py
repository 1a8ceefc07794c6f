"""Fractions whose slash was lost: many of Recipe1M's ingredient lines say "12 cup" for 1/2 cup.

Nothing in the number tells "12 cup" from twelve; the grammar of the unit does. Sources that lost the slash write the
unit of a fraction in the singular, and true twelves take the plural. What stays unrepaired, because the line alone
does not say what was meant: plurals after a bare number ("12 cups"), ounces and metric units, in which packages are
measured, counts ("12 onion"), the short forms c, T and tbsp, and pounds of what is bought whole ("12 lb turkey").
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

_FRACTIONS = {digits: "/".join(digits) for digits in "12 13 14 18 23 34 38 58 78".split()}
_SUSPECT = re.compile(rf"\b(?:{'|'.join(_FRACTIONS)})\b")
_AMOUNT = re.compile(
    r"(?<![\w.,/⁄%$°-])(?<![\d½⅓⅔¼¾⅛]\s)(?P<numbers>\d\d?(?:(?:\s?[-–]\s?|\s(?:to|or)\s|\s)\d\d?)*)\s"
    r"(?P<unit>(?P<spoon>cup|teaspoon|tsp|tablespoon)|(?:pint|quart|gallon|lit(?:er|re))|(?P<pound>pound|lb)"
    r"|tbsp)(?P<plural>s?)(?![\w-])"
    # A 12 cup pan holds twelve cups.
    r"(?!(?:\s[\w-]+){0,2}\s(?:pan|tin|mou?ld|dish|pot|stockpot|saucepan|cooker|jar|bottle|bucket|basket)s?\b)",
    re.IGNORECASE,
)
_WHOLE = re.compile(
    r"turkey|\bham\b|goose|brisket|roast|\bribs?\b|\bpig\b|lamb|salmon|melon|pumpkin|shoulder|butt\b|whole|bone|"
    r"\b(?:bags?|sacks?|box|boxes|packages?|pkgs?|cans?|blocks?)\b|\b(?:lb|pound)\.",
    re.IGNORECASE,
)


def repair_quantities(line: str) -> str:
    """The line with its lost slashes put back: "1 12 cups" -> "1 1/2 cups". Lines in doubt come back unchanged."""
    if not _SUSPECT.search(line):  # nearly all lines end here
        return line
    return _AMOUNT.sub(lambda match: _repair(match, line), line)


def _repair(match: re.Match, line: str) -> str:
    numbers = re.findall(r"\d+", match["numbers"])
    singular = not match["plural"] and match["unit"].lower() != "tbsp"
    in_pounds = match["pound"] is not None
    # f: digits of a fraction, d: one digit, n: another number; ' ' and '-' as they stand between them.
    gaps = [" " if gap.isspace() else "-" for gap in re.findall(r"(?<=\d)\D+(?=\d)", match["numbers"])]
    kinds = ["f" if number in _FRACTIONS else "d" if len(number) == 1 else "n" for number in numbers]
    shape = "".join(kind + gap for kind, gap in zip(kinds, [*gaps, ""], strict=True))
    if in_pounds and singular and _WHOLE.search(line):
        return match[0]
    repaired: Iterable[int] = ()
    if singular and shape in ("f", "f-f", "f f"):  # 12 cup; 14-12 cup; 14 12 cup, for hyphens were lost too
        values = [Fraction(_FRACTIONS[number]) for number in numbers]
        repaired = range(len(numbers)) if values == sorted(set(values)) else ()
    elif shape in ("d f", "d-d f", "d d f") and not (in_pounds and singular):  # 1 12 cups; 1-1 12 cups
        repaired = [len(numbers) - 1]
    elif shape in ("n f", "f f") and match["plural"]:  # 10 12 cups
        repaired = [1]
    elif shape in ("f-d", "f-d f") or (shape in ("f d", "f d f") and match["spoon"]):  # 12-1 cup; 12-1 12 cups
        repaired = [i for i, kind in enumerate(kinds) if kind == "f"]
    parts = re.split(r"(\d+)", match[0])  # number i is part 2 i + 1
    for i in repaired:
        parts[2 * i + 1] = _FRACTIONS[numbers[i]]
    return "".join(parts)
