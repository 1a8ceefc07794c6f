"""From raw ingredient lines to ingredient classes.

`ingredient_name` finds the canonical name of a line by English rules (no model); a line in another language comes out
as its words without numbers. `IngredientClasses` are the K most frequent names, the units of the ingredient dictionary.

A line may name several: "salt;pepper" is both. "salt;?pepper" is what the rules make of "salt and pepper": both where
both are classes of the table and "salt and pepper" is none, else the first alone.
"""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from recipe_lib.data.recipe import DataError

# Dropped in singular and plural. A clove is one too, unless it is all there is.
_UNITS = """bag batch block bottle box bunch c can clove cl cm cube cup dash dl dollop drizzle drop ear envelope
 fillet fl fluid g gallon glass gm gr gram gramme handful head inch jar kg kilogram knob l lb leaf liter litre loaf mg
 milliliter millilitre ml ounce oz pack package packet part piece pinch pint pkg portion pound qt quart recipe scoop
 serving sheet slice splash sprig sprinkle squeeze stalk stick strip t tb tbl tbs tbsp tablespoon teaspoon tin tsp tub
 wedge x""".split()
_WORDS = """about an any approx around baby beaten boiled boiling bone-in boneless canned chilled chopped coarse
 coarsely cold cooked cracked crumbled crushed cubed diced divided drained dried dry each enough extra few fine finely
 fresh freshly frozen full-fat generous good grated ground half halved halves hard-boiled heaped heaping homemade juiced
 large lean leaves lg lightly loaves loosely low-sodium mashed med medium melted minced mini more natural needed of one
 optional organic packed peeled pitted plain prepared pressed pure quality quartered raw rinsed ripe roasted room
 roughly salted scant seeded serve shelled shredded sifted skin-on skinless sliced sm small soft softened some squeezed
 store-bought taste temperature the thick thin thinly three toasted trimmed two uncooked unsalted up very warm whole
 your""".split()
_DROPPED = frozenset([*(unit + end for unit in _UNITS for end in ("", "s", "es")), *_WORDS]) - {"sprinkles"}
_CITRUS = {"lemon", "lemons", "lime", "limes", "orange", "oranges"}
_CITRUS_PARTS = {"juice", "zest", "rind", "peel"}  # the fruit is the ingredient
_MERGED = {
    "all purpose flour": "flour", "all-purpose flour": "flour", "bay": "bay leaf", "bicarbonate soda": "baking soda",
    "celery rib": "celery", "confectioners sugar": "powdered sugar", "confectioners' sugar": "powdered sugar",
    "corn starch": "cornstarch", "evoo": "olive oil", "extra-virgin olive oil": "olive oil", "kosher salt": "salt",
    "granulated sugar": "sugar", "hot water": "water", "icing sugar": "powdered sugar", "jalapeno": "jalapeño",
    "parmesan": "parmesan cheese", "rib celery": "celery", "ribs celery": "celery", "sea salt": "salt",
    "table salt": "salt", "veg oil": "vegetable oil", "virgin olive oil": "olive oil", "white sugar": "sugar",
}  # fmt: skip
_SINGULAR = {"brownies": "brownie", "chilies": "chili", "cookies": "cookie", "pies": "pie"}
_SINGULAR |= dict.fromkeys(("capers", "grits", "molasses", "oats", "schnapps", "sprinkles"))  # these have none

_COLUMNS = ["class", "name", "recipes", "aliases"]
_BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
_NUMBER = re.compile(r"(?<![^\W\d])\d(?:[\da-z./⁄%°'\"”″-]|,(?=\d))*(?:[^\W\d_]{1,2}(?!\w))?")  # 200г, 2个
_LABEL = re.compile(r"^[^:]*\b(?:optional|garnish\w*|toppings?|for)\b[^:]*:")
_END = re.compile(  # where a new thought starts; the first one that names something counts
    r"[,;|*•:&、([]|\s[-–—+]+\s|[–—]|--|->|(?<=\w)/|(?<=\w{6})\.\s|(?<![\w-])(?:or|for|to|plus|and|as|if|into|in|with|w/"
    r"|without|until|from|such|including|at|like|preferably|cut|per)(?![\w-])"
)
_JOINED = re.compile(r";\?")
_JOINS = frozenset(["and", "&"])
# Accents, and the vowel signs of Indian and South-East Asian scripts, are part of a word.
_WORD = re.compile(r"[^\W\d_](?:[^\W_]|[\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u109f]|['.-](?=[^\W_]))*")


@lru_cache(maxsize=1 << 16)
def ingredient_name(line: str) -> str | None:
    """Canonical name of a raw ingredient line, lower case, last word singular; None where nothing is left.

    Quantities, units, brackets and preparation words are cut, and all after the first comma, dash, "or", "and", "for",
    unless nothing stands before it ("boneless, skinless thighs"). A heading ("Frosting") is a name: no rule can tell.
    """
    last_resort = None
    for part in _END.split(_plain(line)):
        words, kept = _named(part)
        if kept and not _CITRUS_PARTS.issuperset(kept):
            return _canonical(kept)
        # "Juice and zest of a lemon" is a lemon; "ground cloves" are a spice.
        if kept or not {"clove", "cloves"}.isdisjoint(words):
            last_resort = last_resort or _canonical(kept or ["clove"])
    return last_resort


@lru_cache(maxsize=1 << 16)
def ingredient_names(line: str) -> str | None:
    """`ingredient_name`, and the second name of a line that joins two by "and" or "&", as "first;?second".

    Only of two whole names at the start of the line: "salt and pepper to taste", not "salt, oil and pepper", "red and
    green pepper" (red is no class), "chopped and peeled apple" or "juice and zest of a lemon".
    """
    name, text = ingredient_name(line), _plain(line)
    ends = [end[0].strip() for end in _END.finditer(text)][:3]
    if not name or not ends or ends[0] not in _JOINS or _JOINS.intersection(ends[1:]):
        return name
    first, second = (_named(part)[1] for part in _END.split(text)[:2])
    if not first or not second or _canonical(first) != name or _CITRUS_PARTS.issuperset(second):
        return name
    return f"{name};?{_canonical(second)}" if _canonical(second) != name else name


def _plain(line: str) -> str:
    """The line in lower case, without brackets, numbers and a label before a colon."""
    text = unicodedata.normalize("NFKC", line[:400].replace("®", "").replace("™", "")).lower().replace("’", "'")
    text = re.sub(r"\b(low|full) (?=sodium|fat)", r"\1-", re.sub(r"\bhalf (?:and|&) half\b", "half-and-half", text))
    cuts = 1
    while cuts:  # nested brackets go from the inside out
        text, cuts = _BRACKETS.subn(" ", text)
    return _NUMBER.sub(" ", _LABEL.sub("", text))


def _named(part: str) -> tuple[list[str], list[str]]:
    """Words of a part of a line, and those of them that are neither units nor preparation."""
    words = [word for word in _WORD.findall(part) if len(word) > 1 or not word.isascii()]
    return words, [word for word in words if word not in _DROPPED][:6]


def _canonical(words: list[str]) -> str:
    if not _CITRUS.isdisjoint(words):
        words = [word for word in words if word not in _CITRUS_PARTS]
    name = " ".join([*words[:-1], singular(words[-1])])
    return _MERGED.get(name, name)


def singular(word: str) -> str:
    if word in _SINGULAR:
        return _SINGULAR[word] or word
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is", "'s")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("oes", "ches", "shes", "sses", "xes")) else word[:-1]


@dataclass(frozen=True)
class IngredientClasses:
    """The K ingredient classes, in order of falling frequency; the position of a class is its index everywhere."""

    names: list[str]  # (K,) canonical, all different
    counts: list[int]  # (K,) recipes that mention the class
    aliases: dict[str, int] = field(
        default_factory=dict
    )  # further names -> class; a person adds them to the saved table

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", self.aliases | {name: i for i, name in enumerate(self.names)})

    @classmethod
    def from_counts(cls, recipes: Mapping[str, int], k: int) -> IngredientClasses:
        """The `k` names that most recipes mention, ties in alphabetical order. DataError if there are fewer names.

        Args:
            recipes: number of recipes that mention each name, as `mentions` gives them.
        """
        if not 1 <= k <= len(recipes):
            raise DataError(f"{k} ingredient classes asked for: choose 1 to {len(recipes)}, the names in these recipes")
        top = sorted(recipes.items(), key=lambda item: (-item[1], item[0]))[:k]
        return cls([name for name, _ in top], [count for _, count in top])

    def recounted(self, recipes: Mapping[str, int]) -> IngredientClasses:
        """The same table with the numbers of other recipes. DataError names a class that none of them mentions."""
        for name in self.names:
            if not recipes.get(name):
                raise DataError(f"ingredient class {name!r}: no paired training recipe has it; take it off the table")
        return IngredientClasses(self.names, [recipes[name] for name in self.names], self.aliases)

    def label(self, names: Sequence[str | None]) -> list[tuple[int, int]]:
        """(position in the ingredient list, class index) of every line whose name has a class, in order.

        A line that names several classes comes once for each.
        """
        return [(position, index) for position, name in enumerate(names) if name for index in self._of_line(name)]

    def _of_line(self, text: str) -> list[int]:
        """Classes of a line's names, each once. "a and b" that is no class itself is both where both are classes."""
        classes: list[int | None] = []
        for name in _JOINED.sub(" and ", text).split(";"):
            whole = self._index.get(_key(name))
            parts = [self._index.get(_key(part)) for part in re.split(" (?:and|&) ", name)]
            if whole is not None:
                classes.append(whole)
            elif len(parts) == 2 and None not in parts:
                classes += parts
            elif ";?" in text:
                classes.append(parts[0])
        return [index for index in dict.fromkeys(classes) if index is not None]

    def save(self, path: Path) -> None:
        """Write the table class, name, recipes, aliases (';' between them) as CSV; a reader never sees half a file."""
        part = path.with_name(path.name + ".part")
        with part.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(_COLUMNS)
            for i, (name, count) in enumerate(zip(self.names, self.counts, strict=True)):
                table.writerow([i, name, count, ";".join(alias for alias, index in self.aliases.items() if index == i)])
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> IngredientClasses:
        """Read what `save` wrote, edited by hand or not. DataError names the line of a bad row or a repeated name."""
        classes, seen = cls([], []), {}
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                table = csv.reader(file)
                if next(table, None) != _COLUMNS:
                    raise DataError(f"{path}:1: the header must be {','.join(_COLUMNS)}")
                for row in filter(None, table):
                    classes._add_row(row, f"{path}:{table.line_num}", seen)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: cannot be read as a table of ingredient classes ({error})") from None
        if not classes.names:
            raise DataError(f"{path}: holds no ingredient class; prepare the data again")
        return cls(classes.names, classes.counts, classes.aliases)

    def _add_row(self, row: list[str], where: str, seen: dict[str, str]) -> None:
        index = len(self.names)
        if len(row) != 4 or row[0] != str(index) or not _key(row[1]) or not re.fullmatch("[0-9]{1,12}", row[2]):
            raise DataError(f"{where}: must be {index},name,number of recipes,aliases; correct the row")
        name, *aliases = filter(None, map(_key, [row[1], *row[3].split(";")]))
        for key in (name, *aliases):
            if key in seen:
                raise DataError(f"{where}: {key!r} is already at {seen[key]}; keep one of them")
            seen[key] = where
        self.names.append(name)
        self.counts.append(int(row[2]))
        self.aliases.update(dict.fromkeys(aliases, index))


def mentions(names: Sequence[str | None], classes: IngredientClasses | None = None) -> set[str]:
    """What one recipe's lines name, each once, however often it says salt: classes of a table, or any names.

    Without a table, of "salt;?pepper" the first name alone counts.
    """
    if classes:
        return {classes.names[index] for _, index in classes.label(names)}
    return {_key(part) for name in names if name for part in name.split(";") if part[:1] != "?"} - {""}


def _key(name: str) -> str:
    """One line without ';', which stands between names and between aliases."""
    return " ".join(name.replace(";", " ").split())
