"""Recipe1M as pickles of the authors' preprocessing, read without running anything that they hold (`plain_pickle`).

    train.pkl val.pkl test.pkl         {id: {title, ingredients: [text], instructions: [text], images: [name]}}
    *_noimages.pkl                     the same for text-only recipes; optional

That is what H-T's preprocessing writes, into a folder `traindata`; DAR adds `llama_13b_generation`, a description, to a
recipe. The debiasing paper adds labels, without which names are made by our rules:

    ing2label_topk500.pkl              {ingredient name: class number}; any other number will do
    id2labels_{train,val,test}.pkl     {id: [class number, ...]}; optional
    id2pos_train.pkl                   {id: [{position of the ingredient line: class number}, ...]}; optional

An id is letters, digits, "_" and "-", 64 at most. Labels of "id_1", a recipe that is there once per photo, are those of
"id". Photos are named by 10 hexadecimal digits and .jpg. vocab.pkl is read where the parameter `vocab_file` names it.
Texts stay as they are: lost slashes were put back, true twelves too, when the files were made. One file is in memory at
a time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from recipe_lib.data.ingredients import ingredient_name, ingredient_names
from recipe_lib.data.plain_pickle import as_list, read_plain_pickle
from recipe_lib.data.recipe import DataError, Recipe, clean
from recipe_lib.sources.recipe1m_assembly import PARTITIONS, Assembly, Skip, check_file, given_description, shown

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_WORD = re.compile(r"[^\W_]+(?:['’.-][^\W_]+)*")


class _Labels:
    """The ingredient classes of the pickles: which one a line is, and what they are called.

    A class is called by that of its names which `ingredient_name` finds most often in the training lines; of equals, by
    the shortest, then the first in the alphabet.

    Args:
        path: ing2label_topk*.pkl.
        counts: how many training lines have this `ingredient_name`.
    """

    def __init__(self, path: Path, counts: Counter[str | None]):
        self._label: dict[str, int] = {}  # words of a name -> class number
        self.names: dict[int, str] = {}
        best: dict[int, tuple] = {}
        for name, label in read_ing2label(path).items():
            if name and self._label.setdefault(_words(name), label) == label:
                rank = (-counts[name], len(name), name)
                best[label] = min(best.get(label, rank), rank)
        self.names = {label: rank[-1] for label, rank in best.items()}
        self._longest = max((words.count(" ") + 1 for words in self._label), default=0)

    def of_line(self, line: str, allowed: Container[int]) -> list[int]:
        """Classes of an ingredient line: by its `ingredient_names`, else by the longest name of a class that it holds.

        Two where it joins two names that are both classes, none where it names no class.
        """
        names = (ingredient_names(line) or "").split(";?")
        labels = [self._label.get(_words(name)) for name in (" and ".join(names), *names)]
        whole, *parts = [label if label in allowed else None for label in labels]
        if whole is not None:
            return [whole]
        known = [label for label in dict.fromkeys(parts) if label is not None]
        if parts[0] is not None:
            return known
        words = _words(line[:400].lower()).split(" ")
        for length in range(min(self._longest, len(words)), 0, -1):
            for i in range(len(words) - length + 1):
                label = self._label.get(" ".join(words[i : i + length]))
                if label in allowed:
                    return [label]
        return known


def read_ing2label(path: Path) -> dict[str, int]:
    """Class number of each ingredient name, in lower case with spaces; of two that are then one name the first's.

    Raises:
        DataError: refused, broken or of wrong form.
    """
    numbers: dict[str, int] = {}
    for name, label in read_plain_pickle(path).items():
        if not isinstance(name, str) or type(label) is not int:
            raise DataError(f"{path}: {shown(name)} -> {shown(label)}, must be a name and a number; make it again")
        numbers.setdefault(clean(re.sub("[_;]", " ", name)).lower(), label)
    return numbers


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.replace("’", "'")))


def read_pickles(folder: Path, assembly: Assembly) -> Iterator[Recipe]:
    """Recipes of the pickles in `folder`: train, val, test, then the text-only ones.

    `Recipe.names` are class names, all those of a line, or None where there is no ing2label. The line of a class is
    that of id2pos_train.pkl; where this is missing, and for all other recipes, it is found in the text, among the
    classes that id2labels gives the recipe. Classes it gives that no line is left for come after those of the lines:
    together they are exactly those of id2labels.

    Raises:
        DataError: at the call, a required file missing; while reading, a file that is refused, broken or of wrong form.
    """
    for name in PARTITIONS:
        check_file(folder / f"{name}.pkl", "the authors' preprocessing.py writes it from Recipe1M")
    tables = sorted(folder.glob("ing2label_topk*.pkl"))
    labelled = sorted([*folder.glob("id2labels_*.pkl"), *folder.glob("id2pos_*.pkl")])
    if len(tables) > 1 or (labelled and not tables):
        needed = f", which {labelled[0].name} needs" if labelled else ""
        raise DataError(f"{folder}: {len(tables)} files ing2label_topk*.pkl{needed}; keep one")
    for path in tables:
        check_file(path, "make it again")
    files = [folder / f"{name}{end}.pkl" for end in ("", "_noimages") for name in PARTITIONS]
    return _read(tables[0] if tables else None, [path for path in files if path.exists()], assembly)


def _read(table: Path | None, files: list[Path], assembly: Assembly) -> Iterator[Recipe]:
    labels = _Labels(table, Counter(_training_names(files[0]))) if table else None
    for path in files:
        yield from _read_file(path, labels, assembly)  # what it has loaded goes with it


def _training_names(path: Path) -> Iterator[str | None]:
    for recipe in read_plain_pickle(path).values():
        lines = as_list(recipe.get("ingredients")) if isinstance(recipe, dict) else None
        yield from (ingredient_name(line) for line in lines if isinstance(line, str)) if isinstance(lines, list) else ()


def _read_file(path: Path, labels: _Labels | None, assembly: Assembly) -> Iterator[Recipe]:
    recipes = read_plain_pickle(path)
    given = positions = None
    if labels:
        given = _read_labels(path.with_name(f"id2labels_{path.name}"), labels)
        positions = _read_positions(path.with_name(f"id2pos_{path.name}"), labels)
    for id, fields in recipes.items():
        where = f"{path.name} recipe {shown(id)}"
        try:
            if not isinstance(id, str) or not _ID.fullmatch(id):
                raise Skip(f"id is {shown(id)}, must be letters, digits, '_' and '-', 64 at most")
            title, lines, steps, photos, description = _fields(fields)
            names, left_over = None, []
            if labels:
                own = None if given is None else _of(given, id, [])
                classes, left_over = _line_labels(lines, labels, own, positions and _of(positions, id, None))
                names = [";".join(labels.names[label] for label in line) or None for line in classes]
                names += [labels.names[label] for label in left_over]
            recipe = assembly.recipe(
                id, path.stem.removesuffix("_noimages"), title, lines, steps,
                assembly.good_photos(where, photos), names, description,
            )  # fmt: skip
        except Skip as reason:
            assembly.report.skipped.append(f"{where}: {reason}")
            continue
        assembly.report.labels_without_line += len(left_over)
        yield recipe


def _of(table: dict, id: str, default: Any) -> Any:
    """What a table holds of an id, or of the recipe whose photo the id counts."""
    return table.get(id, table.get(id.split("_")[0], default))


def _fields(fields: Any) -> tuple[str, list[str], list[str], list[Any], str]:
    """Title, ingredients, instructions, cleaned, photo names as they are, description; Skip for other types."""
    if not isinstance(fields, dict):
        raise Skip(f"is {shown(fields)}, must be a dict")
    title, *lists = (as_list(fields.get(key)) for key in ("title", "ingredients", "instructions", "images"))
    if not isinstance(title, str):
        raise Skip(f"title is {shown(title)}, must be text")
    for key, value in zip(("ingredients", "instructions", "images"), lists, strict=True):
        if not isinstance(value, list):
            raise Skip(f"{key} is {shown(value)}, must be a list")
        if key != "images" and (wrong := [text for text in value if not isinstance(text, str)]):
            raise Skip(f"{key} holds {shown(wrong[0])}, must hold texts")
    lines, steps = ([clean(text) for text in texts] for texts in lists[:2])
    return clean(title), lines, steps, lists[2], given_description(fields)


def _line_labels(
    lines: list[str], labels: _Labels, given: list[int] | None, positions: list[tuple[int, int]] | None
) -> tuple[list[list[int]], list[int]]:
    """Classes of each line, and the classes left over.

    Args:
        given: classes of the recipe; None: not known, any may be.
        positions: (line, class); None: not known, found in the text.
    """
    allowed = labels.names if given is None else set(given)
    if positions is None:
        classes = [labels.of_line(line, allowed) for line in lines]
    else:
        classes = [[] for _ in lines]
        for position, label in dict.fromkeys(positions):
            if position < len(lines) and lines[position] and label in allowed:
                classes[position].append(label)
        given = [label for _, label in positions] if given is None else given
    taken = {label for line in classes for label in line}
    return classes, [label for label in dict.fromkeys(given or ()) if label not in taken]


def _read_labels(path: Path, labels: _Labels) -> dict[str, list[int]] | None:
    """id -> class numbers; None where there is no such file."""
    if not path.exists():
        return None
    table = {id: as_list(given) for id, given in read_plain_pickle(path).items()}
    for id, given in table.items():
        if not isinstance(given, list) or not all(type(label) is int and label in labels.names for label in given):
            raise DataError(f"{path}: {shown(id)} has not a list of numbers of ing2label; make both files again")
    return table


def _read_positions(path: Path, labels: _Labels) -> dict[str, list[tuple[int, int]]] | None:
    """id -> (position of the line, class number) in order; None where there is no such file."""
    if not path.exists():
        return None
    table = {}
    for id, places in read_plain_pickle(path).items():
        if not isinstance(places, list) or not all(isinstance(place, dict) for place in places):
            raise DataError(f"{path}: {shown(id)} has not a list of {{position: number}}; make the file again")
        table[id] = [pair for place in places for pair in place.items()]
        if not all(type(i) is int and i >= 0 and type(k) is int and k in labels.names for i, k in table[id]):
            raise DataError(f"{path}: {shown(id)} has not {{position: number of ing2label}}; make both files again")
    return table
