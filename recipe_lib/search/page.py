"""The search page: ipywidgets over a RecipeSearch, for Voilà and for JupyterLab."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
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
EMPTY = '<p class="ck-empty">Choose a photo above: your own, or one of the test split.</p>'
HOW = "Title, ingredients and steps, with a blank line between them."
EXAMPLE = "Tomato soup\n\n4 tomatoes\n1 onion\n\nChop the onion and fry it.\nAdd the tomatoes."


class PhotoBar(anywidget.AnyWidget):
    """Photos in, a strip of those that are there, and a line that says what is going on.

    Its messages: {kind: "photo", name, index} with the bytes, {kind: "too large", name}, {kind: "choose", place}.
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
    """One of the strip. pixels (S, S, 3) uint8."""

    name: str
    pixels: np.ndarray
    own: bool


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
        self.photos = _test_photos(search)
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

    def add(self, data: bytes, name: str) -> None:
        """A photo of the user: it is in memory alone, and goes with the page."""
        self.photos.insert(0, Photo(name, self.search.read(data, name[:120] or "photo"), own=True))
        del self.photos[OWN + TEST_PHOTOS :]

    @guarded
    def _message(self, _: object, message: dict, buffers: list) -> None:
        if message["kind"] == "choose":
            self.bar.chosen = message["place"]
        elif message["kind"] == "too large":
            raise DataError(f"{message['name']}: over 64 MB; make it smaller")
        else:
            self.tell(f"Reading {message['name']} …")
            self.add(bytes(buffers[0]), message["name"])
            self._strip(0)
        self._show()

    def _strip(self, chosen: int = -1) -> None:
        thumbs = [{"label": p.name, "src": cards.source(p.pixels), "own": p.own} for p in self.photos]
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
        photo = self.photos[self.bar.chosen]
        self.tell("Looking …")
        seen = photo.pixels
        if self.surroundings.value != WHOLE:
            others = [other.pixels for other in self.photos if not other.own and other is not photo]
            other = others[-1] if self.surroundings.value == SWAPPED else None
            seen = other_surroundings(seen, self.radius.value, other)
        main = self._using(self.system.value)
        sides = [(self.system.value, main, main.search(seen, progress=self._progress))]
        if self.against.value != NOTHING:
            other = self._using(self.against.value)
            sides.append((self.against.value, other, other.search(seen, progress=self._progress)))
        elif seen is not photo.pixels:
            sides.append(("the whole photo", main, main.search(photo.pixels, progress=self._progress)))
        self.answer.value = self._answer(photo, seen, sides)
        self.tell("")

    def _answer(self, photo: Photo, seen: np.ndarray, sides: list[tuple[str, RecipeSearch, Answer]]) -> str:
        (name, search, answer), *others = sides
        named = next((a for _, _, a in sides if a.ingredients), answer)
        query = (
            f'<div class="ck-query"><figure><img src="{cards.source(seen)}" alt="The photo as the system sees it">'
            f"<figcaption>{escape(photo.name)}</figcaption></figure>{cards.bars(named.ingredients)}</div>"
        )
        if not others:
            return f"{query}<h2>The nearest recipes</h2>{_cards(search, answer)}"
        ((_, _, before),) = others
        moved = [cards.movement(places) for places in moves(answer.hits, before.hits)]
        heading = name if self.against.value != NOTHING else f"surroundings {self.surroundings.value}"
        columns = [(heading, search, answer, moved), (*others[0], None)]
        shown = "".join(f"<section><h2>{escape(_label(t))}</h2>{_cards(s, a, m)}</section>" for t, s, a, m in columns)
        return f'{query}<div class="ck-two">{shown}</div>'

    @guarded
    def _find(self, _: object) -> None:
        self.tell("Looking …")
        search = self._using(self.system.value)
        hits = search.photos(self.text.value, progress=self._progress)
        self.found.value = f"<h2>The nearest photos, each with its own recipe</h2>{_cards(search, Answer(hits, {}))}"
        self.tell("")

    def _progress(self, what: str, done: int, total: int) -> None:
        self.tell(f"{what.capitalize()} for the first time: {done:,} of {total:,} …", done / max(1, total))


def _label(variant: str) -> str:
    return variant.replace(NO_TERM, ", without its causal term")


def _cards(search: RecipeSearch, answer: Answer, moved: list[str] | None = None) -> str:
    return cards.cards(answer.hits, [search.lines(hit, answer) for hit in answer.hits], moved)


def _test_photos(search: RecipeSearch) -> list[Photo]:
    """Some of the first test split, evenly over it."""
    split = search.store.split(search.store.test_splits[0])
    rows = range(0, len(split), max(1, len(split) // TEST_PHOTOS))[:TEST_PHOTOS]
    return [Photo(split.titles[row], search.stored(split, row), own=False) for row in rows]
