"""What kind of dish a recipe is: a label from its title, as JE took it from frequent pairs of words (CVPR 2017).

    <folder>/categories.csv                     class, name, recipes, aliases: to be read, edited and given back
    <folder>/<split>/00000.categories.parquet   the category of each recipe, -1 for none

A category is a phrase, such as "chicken soup"; a title that holds it as a string, or one of its aliases, has it, and
the first of the table wins. Unlike JE's released code, whose list depends on validation and test titles, the table is
made of paired training titles alone, pairs of words do not reach over the end of a title, and names of Food-101 are
not added: give a table that has them. The kitchen knows its dishes; there the dish is the category.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recipe_lib.data.derived import note, numbers, splits
from recipe_lib.data.ingredients import IngredientClasses
from recipe_lib.data.recipe import DataError
from recipe_lib.data.shards import parquet, save

EXAMINED = 2000  # pairs of words, the most frequent first
RARE = 20  # a category of no more training recipes than this is none

_WORD = re.compile(r"[^\W\d_][\w'’-]*")
# Words that say nothing of the dish itself.
_EMPTY = frozenset(
    """amazing awesome basic best better cooker copycat crock crockpot day days delicious diet dinner easiest easy ever
    family fashioned fast fat favorite favourite free friendly good grandma grandma's great healthy holiday home
    homemade hour hours ii inspired instant low made make minute minutes mom's my new old perfect quick
    real recipe recipes simple skinny slow style super tasty traditional ultimate version yummy""".split()
)


def frequent_pairs(titles: Iterable[str], most: int = EXAMINED) -> list[str]:
    """The pairs of neighbouring words that most lower-case titles hold, stop words left out, ties by the alphabet."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # a second, for those alone who ask for it

    counts: Counter[str] = Counter()
    for title in titles:
        words = [word for word in _WORD.findall(title) if word not in ENGLISH_STOP_WORDS]
        counts.update({f"{a} {b}" for a, b in pairwise(words) if not _EMPTY.intersection((a, b))})
    return sorted(counts, key=lambda pair: (-counts[pair], pair))[:most]


def title_categories(titles: Iterable[str], most: int, rare: int = RARE) -> IngredientClasses:
    """At most `most` categories: frequent pairs, each of the titles that no more frequent one has taken.

    DataError where no pair of words is left that more than `rare` titles hold.
    """
    free, taken = Counter(title.lower() for title in titles), {}
    for pair in frequent_pairs(free.elements()):
        own = [title for title in free if pair in title]
        if len(taken) < most and (count := sum(free[title] for title in own)) > rare:
            taken[pair] = count
            for title in own:
                del free[title]
    if not taken:
        raise DataError(f"categories: no two words stand in more than {rare} training titles; give a categories_file")
    return IngredientClasses(list(taken), list(taken.values()))


def category_of(title: str, dish: str, phrases: Mapping[str, int]) -> int:
    """The category of a recipe, -1 for none: of its dish where that is known, not "", else of what its title holds.

    Args:
        phrases: lower-case names and aliases of the table, and its row of each.
    """
    if dish:
        return phrases.get(dish.lower(), -1)
    title = title.lower()
    return min((row for phrase, row in phrases.items() if phrase in title), default=-1)


def add_categories(folder: Path, most: int, table: IngredientClasses | None = None) -> dict:
    """Label every recipe of a store that has a photo; the data card says how many have one of how many categories.

    Args:
        most: categories at most.
        table: an edited one in place of what the training recipes give.

    Raises:
        DataError: as `title_categories`; no training recipe has a category of the given table.
    """
    shards = [(split, number) for number in numbers(folder) for split in splits(folder, number)]
    texts = {shard: _texts(folder, *shard) for shard in shards}
    train = [text for (split, _), rows in texts.items() if split == "train" for text in rows]
    if table is None and all(dish for _, dish in train):
        dishes = Counter(dish for _, dish in train).most_common(most)
        table = IngredientClasses([dish for dish, _ in dishes], [count for _, count in dishes])
    elif table is None:
        table = title_categories((title for title, _ in train), most)
    phrases = {name.lower(): row for row, name in enumerate(table.names)}
    phrases |= {alias.lower(): row for alias, row in table.aliases.items()}
    known = {text: category_of(*text, phrases) for text in {text for rows in texts.values() for text in rows}}
    counts = Counter(known[text] for text in train)
    if not counts.keys() - {-1}:
        raise DataError("categories_file: no training recipe has one of its categories; its names must be in titles")
    table = IngredientClasses(table.names, [counts[i] for i in range(len(table.names))], table.aliases)
    table.save(folder / "categories.csv")
    files: dict[str, str] = {}
    labelled: Counter[str] = Counter()
    for (split, number), rows in texts.items():
        categories = [known[text] for text in rows]
        labelled[split] += sum(category >= 0 for category in categories)
        name = f"{split}/{number:05d}.categories.parquet"
        files[name] = save(folder / name, parquet(pa.table({"category": pa.array(categories, pa.int64())})))
    return note(folder, "categories", [{"files": files}], {"n": len(table.names), "labelled": dict(labelled)})


def _texts(folder: Path, split: str, number: int) -> list[tuple[str, str]]:
    """Title of each recipe, and its dish where that is known."""
    table = pq.read_table(folder / split / f"{number:05d}.recipes.parquet", columns=["title", "truth"])
    titles, truths = (table[name].to_pylist() for name in ("title", "truth"))
    return [(title, json.loads(truth).get("dish", "")) for title, truth in zip(titles, truths, strict=True)]
