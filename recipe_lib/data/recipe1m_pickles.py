"""Recipe1M as pickles of the authors' preprocessing, read without running anything that they hold.

    train.pkl val.pkl test.pkl         {id: {title, ingredients: [text], instructions: [text], images: [name]}}
    *_noimages.pkl                     the same for text-only recipes; optional
    ing2label_topk500.pkl              {ingredient name: class number}; any other number will do
    id2labels_{train,val,test}.pkl     {id: [class number, ...]}; optional
    id2pos_train.pkl                   {id: [{position of the ingredient line: class number}, ...]}; optional

vocab.pkl is not read: the study trains a tokenizer of its own. Texts stay as they are: lost slashes were put back, true
twelves too, when the files were made. One file is in memory at a time.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, ClassVar

from recipe_lib.data.ingredients import ingredient_name
from recipe_lib.data.recipe import DataError, Recipe, clean
from recipe_lib.data.recipe1m_assembly import PARTITIONS, Assembly, Skip, check_file, entry_id, shown

_REFUSED = "refused: a pickle of this data holds only dict, list, str and numbers"
# GLOBAL and the like stay: they end in find_class, which says what was asked for.
_PLAIN = """PROTO FRAME STOP POP DUP MARK POP_MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE
 NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
 SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST APPEND APPENDS LIST EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1
 TUPLE2 TUPLE3 GLOBAL STACK_GLOBAL INST PERSID BINPERSID""".split()
_CODES = {getattr(pickle, name)[0] for name in _PLAIN}
_WORD = re.compile(r"[^\W_]+(?:['’.-][^\W_]+)*")


class _Refused(Exception):
    """What a pickle asked for."""


def _refuse(unpickler: pickle._Unpickler) -> None:
    raise _Refused("it holds another type")


class _PlainUnpickler(pickle._Unpickler):
    """Builds dict, list, tuple, str and numbers, and refuses all else.

    The unpickler in Python, at 30 MB a second: it looks each operation up in a table, which here lacks those that call
    something, and a few bytes cannot make it reserve gigabytes, as they can the one in C.
    """

    dispatch: ClassVar = {
        code: load if code in _CODES else _refuse for code, load in pickle._Unpickler.dispatch.items()
    }

    def find_class(self, module: str, name: str) -> Any:
        raise _Refused(f"it asks for {shown(f'{module}.{name}')}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("it refers to an object outside of it")


def read_plain_pickle(path: Path) -> dict:
    """The dict in a pickle file. DataError, in one line, for a file that is cut off, none, or holds anything else."""
    try:
        with path.open("rb") as file:
            value = _PlainUnpickler(file, encoding="utf-8").load()
    except _Refused as reason:
        raise DataError(f"{path}: {reason}; {_REFUSED}") from None
    except Exception:  # whatever a broken file makes an unpickler stumble over
        raise DataError(f"{path}: not a complete pickle; download it or make it again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds {shown(value)}, must hold a dict; make it again")
    return value


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
        for name, label in read_plain_pickle(path).items():
            if not isinstance(name, str) or type(label) is not int:
                raise DataError(f"{path}: {shown(name)} -> {shown(label)}, must be a name and a number; make it again")
            name = clean(name.replace("_", " ")).lower()
            if name and self._label.setdefault(_words(name), label) == label:
                rank = (-counts[name], len(name), name)
                best[label] = min(best.get(label, rank), rank)
        self.names = {label: rank[-1] for label, rank in best.items()}
        self._longest = max((words.count(" ") + 1 for words in self._label), default=0)

    def of_line(self, line: str, allowed: Container[int]) -> int | None:
        """Class of an ingredient line: by its `ingredient_name`, else by the longest name of a class that it holds."""
        label = self._label.get(_words(ingredient_name(line) or ""))
        if label in allowed:
            return label
        words = _words(line[:400].lower()).split(" ")
        for length in range(min(self._longest, len(words)), 0, -1):
            for i in range(len(words) - length + 1):
                label = self._label.get(" ".join(words[i : i + length]))
                if label in allowed:
                    return label
        return None


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.replace("’", "'")))


def read_pickles(folder: Path, assembly: Assembly) -> Iterator[Recipe]:
    """Recipes of the pickles in `folder`: train, val, test, then the text-only ones.

    `Recipe.names` are class names. The line of a class is that of id2pos_train.pkl; where this is missing, and for all
    other recipes, it is found in the text, among the classes that id2labels gives the recipe. Classes it gives that no
    line is left for come after those of the lines: together they are exactly those of id2labels.

    Raises:
        DataError: at the call, a required file missing; while reading, a file that is refused, broken or of wrong form.
    """
    for name in PARTITIONS:
        check_file(folder / f"{name}.pkl", "the authors' preprocessing.py writes it from Recipe1M")
    tables = sorted(folder.glob("ing2label_topk*.pkl"))
    if len(tables) != 1:
        raise DataError(
            f"{folder}: {len(tables)} files ing2label_topk*.pkl; the authors' labelling writes it, keep one"
        )
    check_file(tables[0], "make it again")
    files = [folder / f"{name}{end}.pkl" for end in ("", "_noimages") for name in PARTITIONS]
    return _read(tables[0], [path for path in files if path.exists()], assembly)


def _read(table: Path, files: list[Path], assembly: Assembly) -> Iterator[Recipe]:
    labels = _Labels(table, Counter(_training_names(files[0])))
    for path in files:
        yield from _read_file(path, labels, assembly)  # what it has loaded goes with it


def _training_names(path: Path) -> Iterator[str | None]:
    for recipe in read_plain_pickle(path).values():
        lines = recipe.get("ingredients") if isinstance(recipe, dict) else None
        yield from (ingredient_name(line) for line in lines if isinstance(line, str)) if isinstance(lines, list) else ()


def _read_file(path: Path, labels: _Labels, assembly: Assembly) -> Iterator[Recipe]:
    recipes = read_plain_pickle(path)
    given = _read_labels(path.with_name(f"id2labels_{path.name}"), labels)
    positions = _read_positions(path.with_name(f"id2pos_{path.name}"), labels)
    for id, fields in recipes.items():
        where = f"{path.name} recipe {shown(id)}"
        try:
            entry_id({"id": id})
            title, lines, steps, photos = _fields(fields)
            found, more = _line_labels(
                lines, labels, None if given is None else given.get(id, []), positions and positions.get(id)
            )
            names = [None if label is None else labels.names[label] for label in found + more]
            good = assembly.good_photos(where, photos)
            recipe = assembly.recipe(id, path.stem.removesuffix("_noimages"), title, lines, steps, good, names)
        except Skip as reason:
            assembly.report.skipped.append(f"{where}: {reason}")
            continue
        assembly.report.labels_without_line += len(more)
        yield recipe


def _fields(fields: Any) -> tuple[str, list[str], list[str], list[Any]]:
    """Title, ingredients, instructions, cleaned, and photo names as they are; Skip for other types."""
    if not isinstance(fields, dict):
        raise Skip(f"is {shown(fields)}, must be a dict")
    title, *lists = (fields.get(key) for key in ("title", "ingredients", "instructions", "images"))
    if not isinstance(title, str):
        raise Skip(f"title is {shown(title)}, must be text")
    for key, value in zip(("ingredients", "instructions", "images"), lists, strict=True):
        if not isinstance(value, list):
            raise Skip(f"{key} is {shown(value)}, must be a list")
        if key != "images" and (wrong := [text for text in value if not isinstance(text, str)]):
            raise Skip(f"{key} holds {shown(wrong[0])}, must hold texts")
    return clean(title), [clean(line) for line in lists[0]], [clean(step) for step in lists[1]], lists[2]


def _line_labels(
    lines: list[str], labels: _Labels, given: list[int] | None, positions: list[tuple[int, int]] | None
) -> tuple[list[int | None], list[int]]:
    """Class of each line, and the classes left over. A line has one: of two at one position the first.

    Args:
        given: classes of the recipe; None: not known, any may be.
        positions: (line, class); None: not known, found in the text.
    """
    allowed = labels.names if given is None else set(given)
    if positions is None:
        found = [labels.of_line(line, allowed) for line in lines]
    else:
        found = [None] * len(lines)
        for position, label in positions:
            if position < len(lines) and lines[position] and found[position] is None and label in allowed:
                found[position] = label
        given = [label for _, label in positions] if given is None else given
    return found, [label for label in dict.fromkeys(given or ()) if label not in found]


def _read_labels(path: Path, labels: _Labels) -> dict[str, list[int]] | None:
    """id -> class numbers; None where there is no such file."""
    if not path.exists():
        return None
    table = read_plain_pickle(path)
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
