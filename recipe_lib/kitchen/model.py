"""A synthetic kitchen whose truth is known: a structural causal model, from cuisine to recipe text and photo.

    cuisine -> dish             cuisine, dish -> ingredients          cuisine -> table style
    dish -> cooking             ingredients, cooking -> text          ingredients, cooking, style -> photo

Cuisine confounds photo and text: it sets the table in the photo and the ingredients and words of the recipe. Every
arrow out of the cuisine has a strength, and the test splits cut them: `iid` cuts none, `do_context` sets the same
dishes on tables drawn at random, `do_ingredients` cuts all of them, and dish -> ingredients too. One tie always holds:
what a dish is made on (the spaghetti of a pasta, its staple) is part of being that dish.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from recipe_lib.data.recipe import DataError, Recipe
from recipe_lib.kitchen import plating, wording
from recipe_lib.kitchen.looks import DISHES, FORMS, STYLES, rgb
from recipe_lib.kitchen.pantry import pantry
from recipe_lib.kitchen.plating import SLOTS, Scene

# A cuisine owns the style of its own position in STYLES; the dishes it is known for come first.
CUISINES = {
    "Italian": ("pasta pizza", "salad gratin soup omelette"),
    "Mexican": ("tacos rice_bowl", "salad soup stew omelette"),
    "Japanese": ("sushi noodle_bowl", "rice_bowl skewers omelette pancakes"),
    "Indian": ("curry rice_bowl", "soup pancakes skewers salad"),
    "Thai": ("noodle_bowl curry stir-fry", "skewers soup salad"),
    "French": ("gratin omelette", "stew soup salad sandwich"),
    "Greek": ("salad skewers", "stew sandwich pasta gratin"),
    "American": ("sandwich pancakes", "pizza tacos salad soup"),
    "Chinese": ("stir-fry noodle_bowl", "soup rice_bowl pancakes"),
    "Moroccan": ("stew skewers", "soup salad pancakes rice_bowl"),
}
COOKED = {  # cooking: (colour that comes in, its share, brightness)
    "raw": ("ffffff", 0.0, 1.0),
    "fried": ("9a5a1c", 0.24, 0.97),
    "roasted": ("6b3a16", 0.34, 0.92),
    "grilled": ("2a1a12", 0.34, 0.95),
    "steamed": ("f4f4ea", 0.16, 1.0),
    "boiled": ("b9b4a0", 0.30, 1.0),
}
SPLITS = ("train", "val", "text_only", "iid", "do_context", "do_ingredients")
CHUNK = 128  # recipes drawn together from one random stream: a split that grows keeps its first recipes
SEEN = 1 / 300  # an ingredient counts as seen when it shows on more than this share of the photo: 14 of 64 x 64 pixels


@dataclass(frozen=True)
class KitchenConfig:
    """Sizes and strengths; raises DataError for an impossible value.

    Args:
        train, val, test, text_only: recipes of each split; test holds for each of the three test splits.
        image_size: side of the photos in pixels, 64..224.
        dish_given_cuisine: strength of cuisine -> dish; 0 cuts the arrow.
        ingredients_given_cuisine, ingredients_given_dish: log odds that an ingredient gains where it belongs.
        style_given_cuisine: probability that the table is the cuisine's own, else it is uniform over all styles.
        popularity: Zipf exponent of the ingredients.
        occlusion: share, 0..1, of the most sauce a dish can have.
        noise: strength of camera grain, light and blur, 0..1.
        near_duplicates: share of the recipes, in every split, that belong to a pair differing by one subtle ingredient.
        seed: the kitchen's.
    """

    train: int = 4000
    val: int = 500
    test: int = 1000
    text_only: int = 1000
    image_size: int = 64
    dish_given_cuisine: float = 1.0
    ingredients_given_cuisine: float = 2.2
    ingredients_given_dish: float = 1.6
    style_given_cuisine: float = 0.9
    popularity: float = 1.0
    occlusion: float = 0.2
    noise: float = 0.4
    near_duplicates: float = 0.3
    seed: int = 1

    def __post_init__(self):
        limits = dict.fromkeys(("train", "val", "test", "text_only", "seed"), (0, 10**9)) | {"image_size": (64, 224)}
        for field in fields(self):
            value, whole = getattr(self, field.name), field.type == "int"
            top = 20.0 if field.name.startswith(("dish", "ingredients", "popularity")) else 1.0
            low, high = limits.get(field.name, (0.0, top))
            kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                kind = "a whole number" if whole else "a number"
                raise DataError(f"kitchen: {field.name} must be {kind} from {low:g} to {high:g}, got {value!r}")


@lru_cache(maxsize=1)
def _tables() -> dict[str, np.ndarray]:
    """The pantry as arrays over ingredients (K,) and over ingredient x cut (K, 4), for drawing whole chunks at once."""
    items, dishes = pantry(), list(DISHES)
    forms = np.full((len(items), 4), -1)
    for i, item in enumerate(items):
        shapes = [FORMS.index(form) for form in item.cuts.values() if form != "base"]
        forms[i, : len(shapes)] = shapes
    staples = {item.dishes[0]: i for i, item in enumerate(items) if item.visibility == "staple"}
    known = np.zeros((len(CUISINES), len(DISHES)))
    for row, (best, good) in zip(known, CUISINES.values(), strict=True):
        row[[dishes.index(d.replace("_", " ")) for d in best.split()]] = 3.2
        row[[dishes.index(d.replace("_", " ")) for d in good.split()]] = 1.8
    cooking = np.array([[c in DISHES[d].cooking.split() for c in COOKED] for d in dishes])
    return {
        "group": np.array([("staple", "salient", "subtle", "invisible").index(item.visibility) for item in items]),
        "rank": np.array([item.rank for item in items]),
        "colour": np.stack([item.colours for item in items]),
        "size": np.array([item.size for item in items]),
        "cooks": np.array([item.cooks for item in items]),
        "forms": forms,
        "cuts": np.array([max(len(item.cuts), 1) for item in items]),
        "cuisine": np.array([[not item.cuisines or c in item.cuisines for item in items] for c in CUISINES], float),
        "dish": np.array([[d in item.dishes for item in items] for d in dishes], float),
        "staple": np.array([staples.get(d, -1) for d in dishes]),
        "known": known,
        "cooking": np.where(cooking, 0.0, -np.inf),
    }  # fmt: skip


def _choose(rng: np.random.Generator, logits: np.ndarray) -> np.ndarray:
    """Logits (n, K) -> one draw per row (n,), by the Gumbel trick."""
    return np.argmax(logits + rng.gumbel(size=logits.shape), 1)


def _decide(rng: np.random.Generator, config: KitchenConfig, confounded: bool) -> dict[str, np.ndarray]:
    """Draw the causal variables of CHUNK recipes.

    line (CHUNK, SLOTS) holds the ingredients, -1 where there is none: staple, salient, subtle, invisible; cut and
    amount go with it. twin (CHUNK,) marks the pairs 2i, 2i + 1 that differ by one subtle ingredient only.
    """
    tables, n = _tables(), CHUNK
    cuisine = rng.integers(len(CUISINES), size=n)
    dish = _choose(rng, confounded * config.dish_given_cuisine * tables["known"][cuisine])
    cooking = _choose(rng, tables["cooking"][dish])
    score = -config.popularity * np.log(tables["rank"]) + rng.gumbel(size=(n, len(pantry())))
    score += confounded * config.ingredients_given_cuisine * tables["cuisine"][cuisine]
    score += confounded * config.ingredients_given_dish * tables["dish"][dish]
    line = np.full((n, SLOTS), -1)
    line[:, 0] = tables["staple"][dish]
    for group, first, low, high in ((1, 1, 2, 4), (2, 5, 1, 3), (3, 8, 2, 4)):
        ranked = np.argsort(np.where(tables["group"] == group, -score, np.inf), 1)
        count = rng.integers(low, high + 1, size=n)
        line[:, first : first + high] = np.where(np.arange(high) < count[:, None], ranked[:, :high], -1)
        if group == 2:  # what a twin has instead of one of its subtle ingredients: the next best
            swapped, instead = rng.integers(count) + first, ranked[np.arange(n), count]
    drawn = {
        "cuisine": cuisine,
        "dish": dish,
        "cooking": cooking,
        "line": line,
        "cut": (rng.random((n, SLOTS)) * tables["cuts"][line]).astype(int),
        "amount": rng.integers(3, size=(n, SLOTS)),
        "twin": np.repeat(rng.random(n // 2) < config.near_duplicates, 2),
    }
    second = drawn["twin"] & (np.arange(n) % 2 == 1)
    for value in drawn.values():
        value[second] = value[np.flatnonzero(second) - 1]
    new, where = instead[np.flatnonzero(second) - 1], swapped[np.flatnonzero(second) - 1]
    drawn["line"][second, where] = new
    drawn["cut"][second, where] %= tables["cuts"][new]
    own = rng.random(n) < confounded * config.style_given_cuisine
    drawn["style"] = np.where(own, drawn["cuisine"], rng.integers(len(STYLES), size=n))
    drawn["voice"] = rng.integers(1 << 62, size=n)
    return drawn


def _pigments(rng: np.random.Generator, drawn: dict[str, np.ndarray]) -> np.ndarray:
    """Colours of every line (CHUNK, SLOTS, 2, 3) after cooking: browned, charred or paled, and never twice the same."""
    tables, line = _tables(), drawn["line"]
    enters = np.array([rgb(code) for code, _, _ in COOKED.values()])[drawn["cooking"]][:, None, None]
    share, bright = np.array([[share, bright] for _, share, bright in COOKED.values()])[drawn["cooking"]].T
    share = tables["cooks"][line] * share[:, None]
    share = np.stack([share, np.minimum(1.5 * share, 0.9)], -1)[..., None]  # the accent, often the outside, takes more
    colour = tables["colour"][line] * (1 - share) + enters * share
    bright = np.where(tables["cooks"][line], bright[:, None], 1) * rng.normal(1, 0.05, line.shape)
    return np.clip(colour * bright[..., None, None] + rng.normal(0, 5, (*line.shape, 1, 3)), 0, 255)


def _scene(rng: np.random.Generator, config: KitchenConfig, drawn: dict[str, np.ndarray]) -> Scene:
    """From causal variables to what lies on the tables; nothing here looks at the cuisine."""
    tables, line = _tables(), drawn["line"]
    form = np.where(line >= 0, tables["forms"][line, drawn["cut"]], -1)
    size, amount, colour = tables["size"][line], drawn["amount"], _pigments(rng, drawn)
    return plating.arrange(
        rng, drawn["style"], drawn["dish"], form, size, amount, colour, config.occlusion, config.noise
    )


def _number(config: KitchenConfig, split: str, index: int) -> str:
    """Id of a recipe: ten hex digits. An invertible scramble of (split, index), so no two can be the same."""
    mask = (1 << 40) - 1
    x = (SPLITS.index(split) << 36 | index) + (config.seed + 1) * 0x5851F42D4D & mask
    for _ in range(2):
        x = x * 0x9E3779B97F & mask
        x ^= x >> 19
    return f"{x:010x}"


def _recipe(
    config, split: str, index: int, size: int, drawn: dict, image: np.ndarray | None, seen: np.ndarray
) -> Recipe:
    """Spell out the index-th recipe of a split of `size`, from row index % CHUNK of the variables drawn."""
    row = index % CHUNK
    lines = np.flatnonzero(drawn["line"][row] >= 0)
    items = [pantry()[i] for i in drawn["line"][row, lines]]
    cuisine, dish, cooking = (
        tuple(names)[drawn[key][row]] for key, names in (("cuisine", CUISINES), ("dish", DISHES), ("cooking", COOKED))
    )
    cuts = [(list(item.cuts) or [""])[cut] for item, cut in zip(items, drawn["cut"][row, lines], strict=True)]
    amounts = drawn["amount"][row, lines].tolist()
    text = wording.write(int(drawn["voice"][row]), cuisine, dish, cooking, list(zip(items, cuts, amounts, strict=True)))
    other = index ^ 1
    pixels = 0 if image is None else SEEN * image.shape[0] ** 2
    names = [item.name for item in items]
    return Recipe(
        id=_number(config, split, index),
        title=text[0],
        ingredients=text[1],
        instructions=text[2],
        images=[] if image is None else [image],
        split="train" if split == "text_only" else split,
        names=names,
        truth={
            "cuisine": cuisine,
            "dish": dish,
            "style": STYLES[drawn["style"][row]],
            "cooking": cooking,
            "ingredients": list(names),
            "visibility": ["salient" if item.visibility == "staple" else item.visibility for item in items],
            "visible": [bool(image is not None and count > pixels) for count in seen[lines]],
            "twin": _number(config, split, other) if drawn["twin"][row] and other < size else "",
            "source_id": _number(config, "iid", index) if split == "do_context" else "",
        },
    )


def cook(config: KitchenConfig) -> Iterator[Recipe]:
    """Yield the recipes, by split: train, val, text-only (split "train", no image), iid, do_context, do_ingredients.

    Each has one photo (S, S, 3) uint8 of side config.image_size. The same config always yields the same bytes; a split
    does not depend on the sizes of the others, and begins with the recipes of a smaller one. do_context repeats iid, in
    order, on other tables: truth["source_id"] names the original.
    """
    sizes = {"train": config.train, "val": config.val, "text_only": config.text_only}
    batch = max(4, CHUNK * 64**2 // config.image_size**2)  # bounds memory; has no say in the result
    for split in SPLITS:
        size = sizes.get(split, config.test)
        stream = SPLITS.index("iid" if split == "do_context" else split)
        for start in range(0, size, CHUNK):
            seeds = [config.seed, stream, start // CHUNK]
            drawn = _decide(np.random.default_rng([*seeds, 0]), config, split != "do_ingredients")
            if split == "do_context":
                drawn["style"] = np.random.default_rng([*seeds, 2]).integers(len(STYLES), size=CHUNK)
            stop = min(size - start, CHUNK)
            if split == "text_only":
                for row in range(stop):
                    yield _recipe(config, split, start + row, size, drawn, None, np.zeros(SLOTS))
                continue
            scene = _scene(np.random.default_rng([*seeds, 1]), config, drawn)
            for first in range(0, stop, batch):
                rows = slice(first, min(first + batch, stop))
                images, seen = plating.draw(scene.rows(rows), config.image_size)
                for row, image, pixels in zip(range(rows.start, rows.stop), images, seen, strict=True):
                    yield _recipe(config, split, start + row, size, drawn, image, pixels)
