"""The search page: ipywidgets over a RecipeSearch, for Voilà and for JupyterLab."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from html import escape
from pathlib import Path

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets

from recipe_lib.data.recipe import DataError
from recipe_lib.search import cards
from recipe_lib.search.engine import Answer, RecipeSearch, moves
from recipe_lib.search.photo import other_surroundings
from recipe_lib.search.studies import NO_TERM

TEST_PHOTOS = 8  # of the first test split, offered beside the user's own
OWN = 12  # photos of the user that are kept, the newest ones
NOTHING, WHOLE, HIDDEN, SWAPPED = "nothing", "as they are", "hidden", "swapped for another photo's"
FULL = "the whole photo"
EMPTY = '<p class="ck-empty">Choose a photo above: your own, or one of the test split.</p>'
HOW = "Title, ingredients and steps, with a blank line between them."
EXAMPLE = "Tomato soup\n\n4 tomatoes\n1 onion\n\nChop the onion and fry it.\nAdd the tomatoes."


class PhotoBar(anywidget.AnyWidget):
    """Photos in, a strip of those that are there, and a line that says what is going on.

    Its messages: {kind: "photo", name, index: of those that come together} with the bytes, or without them where they
    are too many; {kind: "choose", place}.
    """

    _esm = Path(__file__).with_name("photos.js")
    _css = Path(__file__).with_name("page.css")
    thumbs = traitlets.List().tag(sync=True)  # {label, src, own}
    chosen = traitlets.Int(-1).tag(sync=True)
    status = traitlets.Unicode().tag(sync=True)
    error = traitlets.Bool(False).tag(sync=True)
    share = traitlets.Float(-1.0).tag(sync=True)  # done of what is going on; below 0: nothing that takes long


class Disc(anywidget.AnyWidget):
    """How much of the photo stays. The browser's own slider: that of ipywidgets has no name for screen readers."""

    _esm = """
    export default { render({ model, el }) {
      const share = () => `Disc that stays: ${Math.round(200 * model.get("value"))} % of the photo's width`;
      const slider = Object.assign(document.createElement("input"), { type: "range", min: 0.2, max: 0.7, step: 0.05 });
      const label = document.createElement("label");
      const text = document.createElement("span");
      const show = () => { text.textContent = share(); slider.value = model.get("value"); };
      slider.addEventListener("change", () => { model.set("value", Number(slider.value)); model.save_changes(); });
      model.on("change:value", show);
      label.append(text, slider);
      el.classList.add("ck-disc");
      el.append(label);
      show();
    } };
    """
    value = traitlets.Float(0.4).tag(sync=True)


@dataclass(frozen=True)
class Photo:
    """One of the strip. pixels (S, S, 3) uint8; id: of the recipe that belongs to a test photo."""

    name: str
    pixels: np.ndarray
    id: str = ""


@dataclass(frozen=True)
class Side:
    """One of two answers that stand side by side."""

    title: str
    search: RecipeSearch
    answer: Answer


def guarded(action: Callable) -> Callable:
    """Whatever goes wrong becomes one line on the page, which goes on working."""

    @wraps(action)
    def call(self: SearchPage, *arguments) -> None:
        try:
            action(self, *arguments)
        except Exception as error:
            if not isinstance(error, DataError | ValueError | OSError):
                logging.exception("search page")
            self.tell(" ".join(str(error).split()) or type(error).__name__, error=True)

    return call


class SearchPage:
    """The page of one study; `widget` is what to show."""

    def __init__(self, search: RecipeSearch):
        self.search, self._searches = search, {search.variant: search}
        self.photos, self._faults = _test_photos(search), []
        variants = [(_label(name), name) for name in search.variants]
        wide = {"style": {"description_width": "initial"}}
        self.bar = PhotoBar()
        self.system = widgets.Dropdown(options=variants, value=search.variant, description="System", **wide)
        self.against = widgets.Dropdown(options=[(NOTHING, NOTHING), *variants], description="Compared with", **wide)
        self.surroundings = widgets.Dropdown(options=[WHOLE, HIDDEN, SWAPPED], description="Surroundings", **wide)
        self.radius = Disc()
        self.answer, self.found = widgets.HTML(EMPTY), widgets.HTML()
        self.text = widgets.Textarea(placeholder=EXAMPLE, rows=9, description="Recipe", **wide)
        self.find = widgets.Button(description="Find its photos", button_style="primary")
        self.bar.on_msg(self._message)
        for control in (self.system, self.against, self.surroundings, self.radius):
            control.observe(self._show, "value")
        self.find.on_click(self._find)
        self._strip()
        self._show()

    @property
    def widget(self) -> widgets.Widget:
        """All of it, from top to bottom."""
        parts = ", ".join(dict.fromkeys(part.name for part in self.search.parts))
        head = f"Study {self.search.study}: {len(self.search):,} recipes ({parts})."
        controls = widgets.HBox([self.system, self.against, self.surroundings, self.radius])
        page = widgets.VBox(
            [
                widgets.HTML(f'<h1>A photo in, recipes out</h1><p class="ck-soft">{escape(head)}</p>'),
                *(self.bar, controls, self.answer),
                widgets.HTML(f'<h2>A recipe in, photos out</h2><p class="ck-soft">{HOW}</p>'),
                *(self.text, self.find, self.found),
            ]
        )
        controls.add_class("ck-controls")
        page.add_class("ck").add_class("ck-page")
        return page

    def tell(self, status: str, share: float = -1.0, error: bool = False) -> None:
        """What is going on; share: done of it, below 0 where that takes no time."""
        self.bar.status, self.bar.share, self.bar.error = status, share, error

    @guarded
    def _message(self, _: object, message: dict, buffers: list) -> None:
        if message["kind"] == "choose":
            self.bar.chosen = message["place"]
            self._show()
            return
        self._faults = self._faults if message["index"] else []
        try:
            self._add(message["name"][:120], buffers)
        except DataError as error:
            self._faults.append(str(error))
        self._show()
        if self._faults:  # of one photo among several: said after the others have their answers
            self.tell("\n".join(self._faults), error=True)

    def _add(self, name: str, buffers: list) -> None:
        """A photo of the user: it is in memory alone, and goes with the page."""
        if not buffers:
            raise DataError(f"{name}: over 64 MB; make it smaller")
        self.tell(f"Reading {name} …")
        own, given = [Photo(name, self.search.read(bytes(buffers[0]), name))], self.photos
        own += [photo for photo in given if not photo.id][: OWN - 1]
        self.photos = own + [photo for photo in given if photo.id]
        self._strip(0)

    def _strip(self, chosen: int = -1) -> None:
        thumbs = [{"label": p.name, "src": cards.source(p.pixels), "own": not p.id} for p in self.photos]
        self.bar.thumbs, self.bar.chosen = thumbs, chosen

    def _using(self, variant: str) -> RecipeSearch:
        if variant not in self._searches:
            self.tell(f"Loading {variant} …")
            self._searches[variant] = self.search.using(variant)
        return self._searches[variant]

    @guarded
    def _show(self, *_: object) -> None:
        """The answer for the photo that is chosen, by one system or by two."""
        self.radius.layout.display = "none" if self.surroundings.value == WHOLE else None
        if self.bar.chosen < 0:
            return
        photo, against = self.photos[self.bar.chosen], self.against.value
        self.tell("Looking …")
        seen = self._seen(photo)
        sides = [self._side(self.system.value, seen)]
        if against != NOTHING:
            sides.append(self._side(against, seen))
        elif seen is not photo.pixels:
            title = f"surroundings {self.surroundings.value}"
            sides = [replace(sides[0], title=title), replace(self._side(self.system.value, photo.pixels), title=FULL)]
        self.answer.value = _answer(photo, seen, *sides)
        self.tell("")

    def _seen(self, photo: Photo) -> np.ndarray:
        """The photo with the surroundings that are wanted."""
        if self.surroundings.value == WHOLE:
            return photo.pixels
        others = [other.pixels for other in self.photos if other.id and other is not photo]
        if self.surroundings.value == HIDDEN:
            return other_surroundings(photo.pixels, self.radius.value)
        if not others:
            raise DataError("the test split holds no other photo, whose surroundings could be taken")
        return other_surroundings(photo.pixels, self.radius.value, others[-1])

    def _side(self, variant: str, pixels: np.ndarray) -> Side:
        search = self._using(variant)
        return Side(_label(variant), search, search.search(pixels, progress=self._progress))

    @guarded
    def _find(self, _: object) -> None:
        self.tell("Looking …")
        search = self._using(self.system.value)
        hits = search.photos(self.text.value, progress=self._progress)
        shown = _cards(Side("", search, Answer(hits, {})), "")
        self.found.value = f"<h2>The nearest photos, each with its own recipe</h2>{shown}"
        self.tell("")

    def _progress(self, what: str, done: int, total: int) -> None:
        self.tell(f"{what.capitalize()} for the first time: {done:,} of {total:,} …", done / max(1, total))


def _label(variant: str) -> str:
    return variant.replace(NO_TERM, ", without its causal term")


def _answer(photo: Photo, seen: np.ndarray, side: Side, other: Side | None = None) -> str:
    """The photo as it was seen, its ingredients, and the recipes of one side or of two."""
    named = side.answer.ingredients or (other.answer.ingredients if other else {})
    query = (
        f'<div class="ck-query"><figure><img src="{cards.source(seen)}" alt="The photo as the system sees it">'
        f"<figcaption>{escape(photo.name)}</figcaption></figure>{cards.bars(named)}</div>"
    )
    if other is None:
        return f"{query}<h2>The nearest recipes</h2>{_cards(side, photo.id)}"
    both = _cards(side, photo.id, other), _cards(other, photo.id)
    columns = zip((side.title, other.title), both, strict=True)
    shown = "".join(f"<section><h2>{escape(title)}</h2>{part}</section>" for title, part in columns)
    return f'{query}<div class="ck-two">{shown}</div>'


def _cards(side: Side, own: str, before: Side | None = None) -> str:
    """Its recipes, with what moved since another side; own: id of the recipe that belongs to the photo."""
    hits = side.answer.hits
    notes = [cards.movement(places) for places in moves(hits, before.answer.hits)] if before else [""] * len(hits)
    notes = [note + cards.OWN * (hit.id == own) for note, hit in zip(notes, hits, strict=True)]
    return cards.cards(hits, [side.search.lines(hit, side.answer) for hit in hits], notes)


def _test_photos(search: RecipeSearch) -> list[Photo]:
    """Some of the first test split, evenly over it."""
    split = search.store.split(search.store.test_splits[0])
    rows = range(0, len(split), max(1, len(split) // TEST_PHOTOS))[:TEST_PHOTOS]
    return [Photo(split.titles[row], search.stored(split, row), split.ids[row]) for row in rows]
