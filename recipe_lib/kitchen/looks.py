"""What everything on the table looks like, as pure functions of coordinates: food, dishes, plates and table cloths.

Pieces live in unit coordinates (u, v; radius 1), dishes and vessels in shares of the plate's radius, tables in shares
of the photo's side; x points right, y down, and light comes from the top left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

TABLES = {  # style: (ground colours, plate, rim)
    "red gingham": ("f4efe6 cf2a2a", "fbfaf5", "5b8a3c"),
    "striped serape": ("e8327c f7b32b 1fa59a 3b3f8f", "c9683a", "7c3518"),
    "bamboo mat": ("cdbb82 8f9a55", "24262b", "4a4e57"),
    "marigold cloth": ("f08c1e c2185b", "d9b04a", "8f6a1c"),
    "banana leaf": ("2f8f3e 8fce63", "8a5a34", "5c3a1f"),
    "navy linen": ("1e2f5c e9e4d6", "fdfdfb", "2b4fa0"),
    "blue mosaic": ("f2f6fa 2f7fd0", "f7f9fc", "1f5fb5"),
    "oak boards": ("b98350 7c5230", "f3ead6", "c23a30"),
    "red lacquer": ("7d0f16 e0b040", "eef3f5", "2a5a9a"),
    "turquoise zellige": ("12a39a f3ead2", "c98a2e", "17636b"),
}
STYLES = tuple(TABLES)
VESSELS = ("plate", "bowl", "dish")
SAUCE = "sauce"  # the form that hides others


def rgb(code: str) -> np.ndarray:
    """'ff8000 00ff00' -> (2, 3) float32 in 0..255; one colour alone -> (3,)."""
    colours = np.float32([[int(one[i : i + 2], 16) for i in (0, 2, 4)] for one in code.split()])
    return colours[0] if len(colours) == 1 else colours


def _blob(u, v, w, wobble=0.0, a=1.0, b=1.0, power=2.0):
    t = np.arctan2(v / b, u / a)
    dents = 1 + w[0] * np.cos(2 * t + 6 * w[1]) + w[2] * np.cos(3 * t + 6 * w[3]) + 0.6 * np.cos(5 * t + w[4])
    return 1 - wobble * dents - (np.abs(u / a) ** power + np.abs(v / b) ** power) ** (1 / power)


def _bar(u, v, long, wide, bend=0.0):
    return wide - np.hypot(np.maximum(np.abs(u) - long, 0), v + bend * (u * u - 0.4))


def _many(u, v, w, count, long, wide):
    """A scatter of bars: the nearest one, and whether its number is odd (the accent colour)."""
    k = np.arange(count, dtype=np.float32)
    angle, far, spin = 2.4 * k + 6 * w[0], 0.72 * np.sqrt((k + 0.3) / count), 9 * w[:count] + k
    x, y = u[..., None] - far * np.cos(angle), v[..., None] - far * np.sin(angle)
    c, s = np.cos(spin), np.sin(spin)
    each = _bar(c * x + s * y, c * y - s * x, long, wide, 0.5)
    return each.max(-1), (each.argmax(-1) % 2) * 0.8


def _curl(u, v, w):
    r, t = np.hypot(u, v), np.abs(np.arctan2(v, u))
    return np.minimum(0.38 * (1.15 - t / 3.2) - np.abs(r - 0.6), 2.35 - t), 0.75 * (np.sin(9 * t + 1) > 0.35)


def _leaf(u, v, w):
    veins = np.abs(v) < 0.08
    return 0.56 * (1 - u * u) - np.abs(v), np.where(veins, 1, 0.5 * (np.sin(13 * u + 9 * np.abs(v)) > 0.7))


def _frill(u, v, w):
    r = np.hypot(u, v)
    edge = 0.86 + 0.12 * np.sin(9 * np.arctan2(v, u) + 6 * w[0])
    return edge - r, np.where(np.abs(v) < 0.1, 1, 0.6 * (r > 0.68))


def _floret(u, v, w):
    k = np.arange(6, dtype=np.float32) * 1.05 + w[0]
    crown = (0.4 - np.hypot(u[..., None] - 0.48 * np.cos(k) - 0.1, v[..., None] - 0.48 * np.sin(k))).max(-1)
    stem = _bar(u + 0.6, v, 0.35, 0.2)
    buds = 0.45 * (np.sin(13 * u) * np.sin(13 * v) > 0.2)
    return np.maximum(crown, stem), np.where(stem > np.maximum(crown, 0), 1, buds)


def _mushroom(u, v, w):
    cap = np.minimum(0.95 - np.hypot(u, 1.1 * v), 0.2 - v)
    stem = np.minimum(np.minimum(0.24 - np.abs(u), 0.8 - v), v + 0.1)
    return np.maximum(cap, stem), ((cap < 0.14) & (stem < 0.04)) * 0.9


def _wavy(u, v, w):
    v = v + 0.17 * np.sin(6 * u + 6 * w[0])
    return _bar(u, v, 0.85, 0.28), np.sin(13 * v + w[1]) > 0.35


def _half(u, v, w):
    y = v + 0.45
    r = np.hypot(u, y)
    return np.minimum(1 - r, y), np.where(r > 0.83, 1, 0.5 * (np.abs(np.sin(3 * np.arctan2(y, u))) < 0.14))


def _ring(u, v, w):
    r = np.hypot(u, v * (1 + 0.2 * w[0]))
    return 0.22 - np.abs(r - 0.74), (r < 0.7) * 0.9


# form: radius in thousandths of the photo's side; pieces that a middling amount makes; and, from unit coordinates and
# twelve random numbers in [0, 1), the depth inside the edge (> 0: inside) and the share of the accent colour (0..1)
SHAPES = {
    "disc": (88, 7, lambda u, v, w: (_blob(u, v, w, 0.02), (np.hypot(u, v) > 0.8) + 0.4 * (np.hypot(u, v) < 0.3))),
    "wedge": (100, 6, _half),
    "cube": (74, 8, lambda u, v, w: (_blob(u, v, w, 0.03, 0.8, 0.8, 7), 0.65 * ((u > 0.42) | (v > 0.5)))),
    "chunk": (96, 6,
        lambda u, v, w: (_blob(u, v, w, 0.13, 1, 0.85), 0.7 * (np.sin(4 * u + 6 * w[5]) * np.sin(4 * v) > 0.3))),
    "fillet": (120, 4,
        lambda u, v, w: (_blob(u, v, w, 0.03, 1, 0.62, 3.5), 0.8 * (np.sin(11 * u + 5 * np.abs(v)) > 0.6))),
    "slab": (92, 5,
        lambda u, v, w: (_blob(u, v, w, 0.02, 0.9, 0.66, 8), 0.7 * ((np.abs(u) > 0.7) | (np.abs(v) > 0.5)))),
    "ball": (60, 9, lambda u, v, w: (_blob(u, v, w, 0.02), 0.55 * (np.hypot(u - 0.25, v - 0.2) < 0.4))),
    "strip": (105, 8, lambda u, v, w: (_bar(u, v, 0.75, 0.24, 0.3 * w[0]), 0.75 * (v > 0.06))),
    "capsule": (92, 6, lambda u, v, w: (_bar(u, v, 0.55, 0.42), 0.7 * (np.abs(np.sin(5 * u + 3 * v)) > 0.85))),
    "curl": (92, 6, _curl),
    "ring": (92, 7, _ring),
    "leaf": (108, 7, _leaf),
    "frill": (118, 6, _frill),
    "floret": (98, 5, _floret),
    "egg": (105, 3, lambda u, v, w: (_blob(u, v, w, 0.02, 1, 0.82), np.hypot(u - 0.08, v) < 0.46)),
    "mushroom": (98, 6, _mushroom),
    "pod": (120, 9, lambda u, v, w: (_bar(u, v, 0.86, 0.13, 0.4 * w[0]), 0.7 * (np.sin(14 * u) > 0.6))),
    "sprout": (110, 10,
        lambda u, v, w: (np.maximum(_bar(u, v, 0.8, 0.1, 0.7), 0.2 - np.hypot(u - 0.8, v + 0.2)), u > 0.7)),
    "wavy": (120, 5, _wavy),
    "shreds": (95, 6, lambda u, v, w: _many(u, v, w, 8, 0.5, 0.09)),
    "kernels": (92, 6, lambda u, v, w: _many(u, v, w, 9, 0.06, 0.2)),
    "flecks": (100, 6, lambda u, v, w: _many(u, v, w, 6, 0.08, 0.16)),
    "flake": (66, 6, lambda u, v, w: (_blob(u, v, w, 0.08, 0.95, 0.6), 0.8 * (v > 0.1))),
    "shell": (105, 5, lambda u, v, w: (_blob(u, v, w, 0.02, 1, 0.66, 2.2), np.hypot(u / 0.62, v / 0.36) < 1)),
    "dollop": (105, 4,
        lambda u, v, w: (_blob(u, v, w, 0.08), 0.6 * (np.sin(9 * np.hypot(u, v) + np.arctan2(v, u)) > 0.5))),
    "bulb": (118, 4,
        lambda u, v, w: (0.52 * (1 - u * u) + 0.1 - np.abs(v), np.where(u < 0, 1, 0.4 * (np.abs(v) < 0.08)))),
    SAUCE: (105, 0, lambda u, v, w: (_blob(u, v, w[5:], 0.09, 1.05, 0.8), 0 * u)),
}  # fmt: skip
FORMS = tuple(SHAPES)
RADIUS = np.float32([radius for radius, *_ in SHAPES.values()]) / 1000
PIECES = np.array([pieces for _, pieces, _ in SHAPES.values()])


def _mottle(x, y, w, frequency):
    """Smooth pattern of mean 0, about -1.5..1.5: six cosines in random directions."""
    total = 0
    for k in range(6):
        turn, pace = 6.3 * w[k % 12] + k, frequency * (0.6 + 0.8 * w[(5 * k + 3) % 12])
        total = total + np.cos(pace * (np.cos(turn) * x + np.sin(turn) * y) + 40 * w[(k + 7) % 12])
    return total / 2.4


def _layers(*layers):
    """(where, colour, light) triples, each painted over those before -> opacity (h, w), colour (h, w, 3)."""
    opacity, colour = np.zeros(layers[0][0].shape, np.float32), 0.0
    for where, code, light in layers:
        tint = (rgb(code) if isinstance(code, str) else code) * np.asarray(light)[..., None]
        colour = np.where(where[..., None], tint, colour)
        opacity[where] = 1
    return opacity, colour


class Dish(NamedTuple):
    """What makes a dish, and where its pieces lie."""

    vessel: str
    sauce: str  # its colour
    cooking: str  # how it may be cooked, keys of model.COOKED
    base: Callable  # what its pieces lie on
    anchors: list[tuple[float, float]]
    spread_x: float
    spread_y: float


class _Ground(NamedTuple):
    """The middle of a vessel, (h, w) all, and what the bases of dishes are made of."""

    dish: Dish
    x: np.ndarray  # dish coordinates
    y: np.ndarray
    w: np.ndarray  # (12,) random numbers in [0, 1)
    r: np.ndarray  # distance from the middle
    slow: np.ndarray  # broad mottle
    fast: np.ndarray  # fine mottle

    @property
    def ragged(self) -> np.ndarray:
        """Distance from the middle, for edges that no cutter made."""
        return self.r + 0.05 * self.fast

    @property
    def sauce(self) -> np.ndarray:
        """The dish's colour of sauce, (3,)."""
        return rgb(self.dish.sauce)

    def mottle(self, frequency: float) -> np.ndarray:
        return _mottle(self.x, self.y, self.w, frequency)

    def strands(self, count: int) -> np.ndarray:
        """Tangled noodles: light, 0.7 in the gaps to 1 on a strand."""
        x, y, w = self.x, self.y, self.w
        r = self.r + 0.12 * _mottle(x, y, w, 3.5)
        other = x * np.cos(w[0] * 6) + y * np.sin(w[0] * 6) + 0.15 * _mottle(x, y, w[::-1], 4)
        wave = np.where(_mottle(x, y, w[::-1], 2.2) > 0.2, np.sin(count * other), np.sin(count * r))
        return 0.86 + 0.14 * np.clip(1.6 * wave, -1, 1)

    def near(self, long: float, wide: float, power: float = 2.0) -> np.ndarray:
        """Distance to the dish's nearest anchor, 1 on the edge of a long x wide shape around it."""
        each = [
            np.abs((self.x - a) / long) ** power + np.abs((self.y - b) / wide) ** power for a, b in self.dish.anchors
        ]
        return np.min(each, 0) ** (1 / power)


def _liquid(g: _Ground):
    drops = (g.r < 0.84) & (g.fast > 1.2)
    return _layers((g.r < 0.86, g.sauce, 1 + 0.1 * g.slow), (drops, g.sauce * 0.5 + 127, 1))


def _noodles_in_broth(g: _Ground):
    noodles = g.r + 0.12 * g.slow < 0.7
    return _layers((g.r < 0.86, g.sauce, 1 + 0.06 * g.slow), (noodles, "f6dc92", g.strands(62)))


def _rice(g: _Ground):
    return _layers((g.r < 0.86, "f7f3ea", 0.93 + 0.13 * np.clip(g.mottle(38), -1, 0.7)))


def _spaghetti(g: _Ground):
    return _layers((g.ragged < 0.74, "f2d184", g.strands(55) * np.clip(1.2 - 0.3 * g.r, 0, 1)))


def _crust_tomato_and_cheese(g: _Ground):
    cheese = (g.ragged < 0.76) & (g.slow + 0.4 * g.fast > -0.5)
    return _layers(
        (g.r < 0.93, "d79f56", 1.02 - 0.16 * (g.r > 0.88) + 0.05 * g.fast),
        (g.ragged < 0.79, "c93c1e", 1),
        (cheese, "f9df92", 1 + 0.05 * g.fast),
    )


def _leaves(g: _Ground):
    shade = 1 + 0.1 * g.slow
    bright = (g.ragged < 0.78) & (_mottle(g.x, g.y, g.w[::-1], 10) > 0.6)
    return _layers(
        (g.ragged < 0.8, "4d8f2f", shade),
        ((g.ragged < 0.8) & (g.fast > 0.1), "7fbb48", shade),
        (bright, "b5dc74", 1),
    )


def _taco_shells(g: _Ground):
    shell = g.near(0.25, 0.8)
    return _layers(
        (shell < 1, "ecc063", 1.04 - 0.22 * (shell > 0.86) + 0.04 * g.fast),
        (g.near(0.15, 0.68) < 1, "b47a32", 0.8),
    )


def _bread(g: _Ground):
    edge = g.near(0.38, 0.52, 5)
    return _layers((edge < 1, "a3662b", 1 - 0.1 * (g.x + g.y)), (edge < 0.88, "f3dcae", 1 + 0.05 * g.fast))


def _folded_egg(g: _Ground):
    edge = np.hypot(g.x / 0.82, (g.y - 0.05) / 0.56)
    fold = (g.y < -0.12 + 0.05 * g.slow) & (edge < 1)
    return _layers(
        (edge < 1, "f9d24e", 1.05 - 0.25 * edge**4 + 0.04 * g.slow), (fold, "f2b836", 1 + 0.12 * (g.fast > 0.9))
    )


def _browned_cheese(g: _Ground):
    inside = (g.x**4 + g.y**4) ** 0.25 < 0.87
    return _layers((inside, "eebc52", 1 + 0.06 * g.slow), (inside & (g.slow + g.fast > 1.0), "b06a24", 1))


def _two_pancakes(g: _Ground):
    low, high = np.hypot(g.x - 0.08, g.y - 0.12), np.hypot(g.x + 0.04, g.y + 0.06)
    return _layers(
        (low < 0.7, "f6d795", 0.9),
        (low < 0.66, "c9822f", 0.85),
        (high < 0.7, "f6d795", 1),
        (high < 0.65, "d8953f", 1 + 0.07 * g.slow),
    )


def _rolls(g: _Ground):
    edge = g.near(0.23, 0.23)
    return _layers((edge < 1, "16261d", 1), (edge < 0.83, "fbf8f1", 0.95 + 0.08 * np.clip(g.mottle(40), -1, 1)))


def _sticks(g: _Ground):
    return _layers((g.near(0.98, 0.035, 6) < 1, "c9a066", 1))


def _puddle(g: _Ground):
    return _layers((g.ragged + 0.1 * g.slow < 0.68, g.sauce, 0.9 + 0.1 * g.slow))


NINE = [(i * 0.5, j * 0.5) for i in (-1, 0, 1) for j in (-1, 0, 1)]
DISHES = {
    "soup": Dish("bowl", "c8842c", "boiled roasted", _liquid, [(0, 0)], 0.62, 0.62),
    "curry": Dish("bowl", "dd961c", "fried boiled roasted", _liquid, [(0, 0)], 0.62, 0.62),
    "salad": Dish("plate", "f3ead0", "raw grilled roasted", _leaves, [(0, 0)], 0.66, 0.66),
    "pasta": Dish("plate", "c63a1f", "fried roasted boiled", _spaghetti, [(0, 0)], 0.52, 0.52),
    "pizza": Dish("plate", "f8e09c", "roasted grilled", _crust_tomato_and_cheese, [(0, 0)], 0.66, 0.66),
    "tacos": Dish("plate", "fdf6ea", "grilled fried", _taco_shells, [(-0.54, 0), (0, 0), (0.54, 0)], 0.09, 0.5),
    "stir-fry": Dish("plate", "5c2e12", "fried steamed", _puddle, [(0, 0)], 0.58, 0.58),
    "rice bowl": Dish("bowl", "6d3616", "steamed fried grilled raw", _rice, [(0.3, 0)], 0.4, 0.66),
    "stew": Dish("bowl", "7d3417", "boiled roasted", _liquid, [(0, 0)], 0.62, 0.62),
    "sandwich": Dish("plate", "f3dc8c", "raw grilled fried", _bread, [(-0.41, 0), (0.41, 0)], 0.24, 0.36),
    "omelette": Dish("plate", "fbdc74", "fried steamed", _folded_egg, [(0, 0.12)], 0.55, 0.24),
    "noodle bowl": Dish("bowl", "b98344", "boiled fried steamed", _noodles_in_broth, [(-0.1, -0.2)], 0.56, 0.42),
    "skewers": Dish("plate", "85451a", "grilled roasted", _sticks, [(0, -0.44), (0, 0), (0, 0.44)], 0.74, 0.0),
    "gratin": Dish("dish", "dba03c", "roasted boiled", _browned_cheese, [(0, 0)], 0.62, 0.62),
    "pancakes": Dish("plate", "9a5717", "fried raw", _two_pancakes, [(0, 0)], 0.44, 0.44),
    "sushi": Dish("plate", "f6b26c", "raw grilled steamed", _rolls, NINE, 0.05, 0.05),
}


def base(dish: str, x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dish coordinates (h, w) -> opacity (h, w) and colour (h, w, 3) of what the pieces lie on."""
    slow, fast = _mottle(x, y, w, 4), _mottle(x, y, w, 13)
    return DISHES[dish].base(_Ground(DISHES[dish], x, y, w, np.hypot(x, y), slow, fast))


def tables(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> list[np.ndarray]:
    """Image shares (h, w) -> colour (h, w, 3) of the table of each style, seen from above."""
    slow, fast = _mottle(x, y, w, 9), _mottle(x, y, w, 60)

    def wave(t, pace):
        return np.sin(2 * np.pi * pace * t)

    ring = np.hypot((5 * x) % 1 - 0.5, (5 * y) % 1 - 0.5)
    vein = wave(y + 0.5 * np.abs(x % 0.8 - 0.4), 12)
    tile = 7 * np.floor(9 * x) + 3 * np.floor(9 * y) + np.floor(9 * x) * np.floor(9 * y)
    grain = 0.35 + 0.3 * np.sin(60 * y + 3 * slow + 9 * np.floor(4 * y)) + 0.15 * fast
    dot = np.hypot((7 * x + 0.5 * np.floor(7 * y)) % 1 - 0.5, (7 * y) % 1 - 0.5)
    star = np.maximum(np.abs((4 * x) % 1 - 0.5) + np.abs((4 * y) % 1 - 0.5), 0.1)
    patterns = {  # style: (share of the second ground colour, light)
        "red gingham": (0.5 * (wave(x, 5) > 0) + 0.5 * (wave(y, 5) > 0), 0.03 * fast),
        "striped serape": (0.0, 0.1 * wave(x, 30)),
        "bamboo mat": (0.5 * (np.abs(wave(x, 2)) > 0.985), 0.16 * wave(y, 16) + 0.05 * slow),
        "marigold cloth": ((ring < 0.14) | (np.abs(ring - 0.32) < 0.06), 0.03 * fast),
        "banana leaf": (0.9 * (np.abs((x + 0.2) % 0.8 - 0.4) < 0.02) + 0.25 * (vein > 0.4), 0.06 * slow),
        "navy linen": (1.0 * (wave(x, 4) > 0.72), 0.09 * wave(x, 40) * wave(y, 40)),
        "blue mosaic": ((tile % 5) / 4, 0.0),
        "oak boards": (np.clip(grain, 0, 1), -0.5 * ((4 * y) % 1 < 0.05)),
        "red lacquer": (dot < 0.17, 0.12 * slow),
        "turquoise zellige": ((np.abs(star - 0.33) < 0.07) | (star > 0.82), 0.05 * fast),
    }
    drawn = []
    for style, (ground, *_) in TABLES.items():
        first, second, *more = rgb(ground)
        share, light = (np.float32(part)[..., None] for part in patterns[style])
        if more:  # stripes of all its colours
            first = rgb(ground)[(np.floor(y * 14 + 0.08 * fast) % 4).astype(int)]
        drawn.append((first * (1 - share) + second * share) * (1 + light))
    joint = ((9 * x) % 1 < 0.1) | ((9 * y) % 1 < 0.1)
    drawn[STYLES.index("blue mosaic")][joint] = 190
    return drawn


def vessel(style: str, kind: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dish coordinates (h, w) -> opacity (h, w), shadow included, and colour (h, w, 3) of a plate, bowl or dish."""
    power = 5 if kind == "dish" or style == "bamboo mat" else 2  # the bamboo mat carries square plates
    r = (np.abs(x) ** power + np.abs(y) ** power) ** (1 / power)
    fall = (np.abs(x - 0.07) ** power + np.abs(y - 0.1) ** power) ** (1 / power)
    plate, rim = rgb(TABLES[style][1]), rgb(TABLES[style][2])
    slope = -(x + y) / 1.4
    light = np.where(r > 0.8, 0.93 + 0.07 * slope, 0.98 - 0.05 * slope)  # the rim rises, the well sinks
    if kind == "bowl":
        light = np.where(r > 0.9, 1 + 0.06 * slope, 0.75 - 0.15 * slope)
    line = (np.abs(r - 0.95) < 0.035) if kind == "bowl" else (np.abs(r - 0.93) < 0.03) | (np.abs(r - 0.79) < 0.012)
    colour = np.where(line[..., None], rim, plate) * light[..., None] * (r < 1)[..., None]
    return np.where(r < 1, 1, 0.5 * np.clip((1.1 - fall) * 7, 0, 1)), colour
