"""Draw plated dishes: table, plate, base, pieces, sauce, light and camera, a batch at a time.

Everything that can be drawn is drawn once for an image size, supersampled, into banks of sprites; an image is then some
fifty pastes, each done for the whole batch by one fancy index. Lengths are shares of the image side, dish coordinates
are shares of the plate's radius (x right, y down), light comes from the top left.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from recipe_lib.kitchen.looks import (
    DISHES,
    FORMS,
    PIECES,
    RADIUS,
    SAUCE,
    SHAPES,
    STYLES,
    VESSELS,
    base,
    rgb,
    tables,
    vessel,
)  # fmt: skip

PLATE = 0.43  # its radius
ANGLES = np.arange(4) * 1.57 + 0.35  # rotations of a dish's base: pieces turn with it
SCALES = np.float32([0.72, 0.86, 1.0, 1.16])  # sizes at which every form is drawn
POSES = 6  # random shapes and rotations of every form
SLOTS = 12  # lines of a recipe: staple, salient x 4, subtle x 3, invisible x 4
SALIENT, SUBTLE = slice(1, 5), slice(5, 8)  # those that lie on the plate as pieces
POURED, NOTHING = -1, -2  # in place of a piece's line: it is sauce, there is none
AMOUNTS = np.array([0.65, 1.0, 1.4])  # share of a form's PIECES that little, middling and much make
SMALL = 0.52  # subtle pieces are drawn this much smaller
MANY = 14  # most pieces of one ingredient
SAUCES = (17, 9)  # spoons of sauce at occlusion 1: among the salient pieces, and on top of everything


@dataclass(slots=True)
class Scene:
    """What lies on n tables, as arrays with n first; drawing adds no randomness of its own.

    Args:
        style, dish, turn: (n,) indices into STYLES, DISHES, ANGLES.
        centre: (n, 2) where the plate stands, x and y.
        form: (n, M) index into FORMS of every piece, bottom first, -1 where there is none.
        sprite: (n, M) scale * POSES + pose.
        small: (M,) True where a column holds subtle pieces.
        place: (n, M, 2) dish coordinates.
        colour: (n, M, 2, 3) flesh and accent, 0..255.
        slot: (n, M) line that a piece belongs to, POURED for sauce and where there is none.
        crop: (n, 4) offsets into the table cloth, mirrorings, in [0, 1).
        camera: (n, 7) gains of r, g, b, slopes of the light in x and y, blur in [0, 1], grain in 0..255.
        grain: (n,) offset in [0, 1) into the tape of camera noise.
    """

    style: np.ndarray
    dish: np.ndarray
    turn: np.ndarray
    centre: np.ndarray
    form: np.ndarray
    sprite: np.ndarray
    small: np.ndarray
    place: np.ndarray
    colour: np.ndarray
    slot: np.ndarray
    crop: np.ndarray
    camera: np.ndarray
    grain: np.ndarray

    def rows(self, rows: slice) -> Scene:
        """Some of the scenes."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Scene(**{name: part if name == "small" else part[rows] for name, part in parts.items()})


def _places(order: np.ndarray, total: np.ndarray, dish: np.ndarray, turn: np.ndarray, rng) -> np.ndarray:
    """Where the order-th (n, M) of total (n, 1) pieces lies, in dish coordinates (n, M, 2).

    Sunflower spirals around the dish's anchors: pieces spread evenly whatever their number, so that what hides them is
    the sauce and their neighbours, not bad luck.
    """
    most = max(len(d.anchors) for d in DISHES.values())
    anchors = np.array([(d.anchors * most)[:most] for d in DISHES.values()], float)  # (dishes, most, 2), repeated
    spread = np.array([(d.spread_x, d.spread_y) for d in DISHES.values()])[dish][:, None]
    many = np.array([len(d.anchors) for d in DISHES.values()])[dish][:, None]
    which, step = order % many, order // many
    share = np.clip((step + 0.5) / np.ceil(total / many), 0, 1)
    angle = 2.4 * step + 6.28 * rng.random((len(dish), 1)) + which
    offset = np.sqrt(share)[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    flat = spread[..., 1:] < 0.1 * spread[..., :1]  # skewers: along a line
    offset = np.where(flat, np.stack([2 * share - 1, 0 * share], -1), offset) * spread
    place = anchors[dish[:, None], which] + offset + rng.normal(scale=0.045, size=offset.shape)
    angle = ANGLES[turn][:, None]
    x, y = place[..., 0], place[..., 1]
    return np.stack([np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y], -1)


def arrange(rng, style, dish, form, scale, amount, colour, occlusion: float, noise: float) -> Scene:
    """Lay n dishes on their plates and set the camera. Draws the same numbers whatever the style, occlusion and noise.

    Args:
        style, dish: (n,) indices into STYLES and DISHES.
        form, scale, amount: (n, SLOTS) index into FORMS (-1: nothing to see), size 0..2 and amount 0..2 of every line.
        colour: (n, SLOTS, 2, 3) flesh and accent, 0..255.
        occlusion: share of SAUCES that is poured.
        noise: strength of grain, light and blur, 0..1.
    """
    n, turn = len(dish), rng.integers(len(ANGLES), size=len(dish))
    count = np.rint(PIECES[form] * AMOUNTS[amount]) * (form >= 0)
    layers = [
        _pile(rng, SALIENT, count, dish, turn),
        _pour(rng, SAUCES[0], occlusion, dish, turn),
        _pile(rng, SUBTLE, count, dish, turn),
        _pour(rng, SAUCES[1], occlusion, dish, turn),
    ]
    slot, place = (np.concatenate(parts, 1) for parts in zip(*layers, strict=True))
    widths = [layer[0].shape[1] for layer in layers]
    order = _bottom_first(rng, slot, widths[0] + widths[1])
    sprite = np.take_along_axis(_sprites(rng, slot, scale), order, 1)
    slot, place = np.take_along_axis(slot, order, 1), np.take_along_axis(place, order[..., None], 1)
    return Scene(
        style=style,
        dish=dish,
        turn=turn,
        centre=0.5 + rng.uniform(-0.035, 0.035, (n, 2)),
        form=_forms(slot, form),
        sprite=sprite,
        small=np.repeat([False, False, True, False], widths),
        place=place,
        colour=_colours(slot, colour, dish),
        slot=np.maximum(slot, POURED),
        crop=rng.random((n, 4)),
        camera=_camera(rng, n, noise),
        grain=rng.random(n),
    )


def _pile(rng, lines: slice, count: np.ndarray, dish: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slot (n, M) and place (n, M, 2) of the pieces of some lines, count (n, SLOTS) of each, shuffled."""
    numbers, n = np.arange(SLOTS)[lines], len(dish)
    slot = np.broadcast_to(numbers[:, None], (n, len(numbers), MANY)).reshape(n, -1)
    exists = (np.arange(MANY) < count[:, lines, None]).reshape(n, -1)
    shuffled = np.argsort(np.where(exists, rng.random(exists.shape), 2), 1)  # those that exist first
    total = np.maximum(exists.sum(1, keepdims=True), 1)
    place = _places(np.broadcast_to(np.arange(shuffled.shape[1]), shuffled.shape), total, dish, turn, rng)
    return np.take_along_axis(np.where(exists, slot, NOTHING), shuffled, 1), place


def _pour(rng, spoons: int, occlusion: float, dish: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slot (n, spoons) and place (n, spoons, 2) of spoons of sauce: more occlusion adds some, and moves none."""
    n = len(dish)
    order = rng.permuted(np.tile(np.arange(spoons), (n, 1)), axis=1)
    place = _places(order, np.full((n, 1), spoons), dish, turn, rng)
    return np.where(rng.random((n, spoons)) < occlusion, POURED, NOTHING), place


def _bottom_first(rng, slot: np.ndarray, mixed: int) -> np.ndarray:
    """Columns (n, M) from the bottom up: the first `mixed` lie in any order, the rest on top as they come."""
    depth = rng.random(slot.shape)
    depth[:, mixed:] = 1 + np.arange(slot.shape[1] - mixed)
    depth[:, :mixed][slot[:, :mixed] == NOTHING] = 1
    return np.argsort(depth, 1, kind="stable")


def _sprites(rng, slot: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Scene.sprite (n, M): a random pose, and a size that is the line's own or one up; sauce has any."""
    larger, pose, any_size = (rng.integers(high, size=slot.shape) for high in (2, POSES, 3))
    return (np.where(slot >= 0, _of_line(scale, slot), any_size) + larger) * POSES + pose


def _forms(slot: np.ndarray, form: np.ndarray) -> np.ndarray:
    """Scene.form (n, M): that of the line, SAUCE where it was poured, -1 where there is nothing."""
    return np.where(slot >= 0, _of_line(form, slot), np.where(slot == POURED, FORMS.index(SAUCE), -1))


def _colours(slot: np.ndarray, colour: np.ndarray, dish: np.ndarray) -> np.ndarray:
    """Scene.colour (n, M, 2, 3): that of the line, or of the dish's sauce."""
    sauce = np.array([rgb(d.sauce) for d in DISHES.values()])[dish, None, None]
    return np.where((slot >= 0)[..., None, None], _of_line(colour, slot), sauce).astype(np.float32)


def _of_line(values: np.ndarray, slot: np.ndarray) -> np.ndarray:
    """What each piece takes from its line: values (n, SLOTS, ...) -> (n, M, ...); of no use where there is no line."""
    line = np.maximum(slot, 0)
    return np.take_along_axis(values, line.reshape(*line.shape, *[1] * (values.ndim - 2)), 1)


def _camera(rng: np.random.Generator, n: int, noise: float) -> np.ndarray:
    """Scene.camera (n, 7) at a strength of 0..1."""
    exposure, balance = rng.normal(0, 0.16, (n, 1)), rng.normal(0, 0.05, (n, 3))
    slopes, rest = rng.normal(0, 0.16, (n, 2)), rng.random((n, 2)) * [1.0, 22.0]
    return np.concatenate([np.clip(1 + noise * (exposure + balance), 0.4, 1.6), noise * slopes, noise * rest], 1)


def _pixels(patch: int, over: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y, in pixels from the middle of a patch, of over x over samples per pixel."""
    line = (np.arange(patch * over, dtype=np.float32) + 0.5) / over - patch / 2
    return np.meshgrid(line, line)


def _shrink(a: np.ndarray, over: int) -> np.ndarray:
    """(C, P * over, P * over) -> (C, P, P) by averaging: this is where edges become smooth."""
    p = a.shape[-1] // over
    return a.reshape(-1, p, over, p, over).mean((2, 4))


@lru_cache(maxsize=4)
def piece_bank(size: int, small: bool) -> np.ndarray:
    """Sprites of every form: (len(FORMS), len(SCALES) * POSES, 4, P, P) float32; P depends on the size.

    The four planes: what shines through (less under the soft shadow), light on the flesh, light on the accent, gloss. A
    piece turns a background into background * plane 0 + flesh * plane 1 + accent * plane 2 + plane 3.
    """
    unit = size * (SMALL if small else 1)
    patch = 2 * int(np.ceil(RADIUS.max() * SCALES[-1] * unit * 1.06)) + 2
    over = 4 if size < 128 else 2
    bank = np.zeros((len(FORMS), len(SCALES) * POSES, 4, patch, patch), np.float32)
    bank[:, :, 0] = 1
    for f, form in enumerate(FORMS):
        for k in range(len(SCALES) * POSES):
            pose = np.random.default_rng([7, f, k % POSES])
            w, turn = pose.random(12, dtype=np.float32), pose.random() * 2 * np.pi
            r = float(RADIUS[f] * SCALES[k // POSES] * unit)
            edge = max(patch // 2 - int(np.ceil(1.25 * r)) - 1, 0)  # nothing to draw outside
            x, y = _pixels(patch - 2 * edge, over)

            c, s = float(np.cos(turn)), float(np.sin(turn))
            (depth, accent), (behind, _) = (
                SHAPES[form][2](c * p + s * q, c * q - s * p, w)
                for p, q in ((x / r, y / r), (x / r - 0.09, y / r - 0.12))
            )
            inside, accent = depth > 0, np.clip(accent, 0, 1)
            shadow = 0.38 * np.clip(behind * 4 + 0.5, 0, 1) * ~inside
            light = (0.9 - 0.16 * (x + y) / r) * np.clip(0.66 + 1.5 * depth, 0, 1) * inside
            spot = 0.07
            if form == SAUCE:  # a splash lies flat
                shadow, spot = 0.3 * shadow, 0.02
                light = (0.97 - 0.05 * (x + y) / r) * np.clip(0.86 + depth, 0, 1) * inside
            gloss = 0.2 * np.exp(-((x / r + 0.32) ** 2 + (y / r + 0.36) ** 2) / spot) * inside
            planes = np.stack([1 - inside - shadow, light * (1 - accent), light * accent, 255 * gloss])
            bank[f, k, :, edge : patch - edge, edge : patch - edge] = _shrink(planes, over)
    return bank


@lru_cache(maxsize=2)
def ground_bank(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables (styles, 3, T, T); vessels (kinds, styles, 4, S, S); bases (dishes, angles, 4, S, S); all uint8.

    Of four planes, three are colour * opacity and the last is what shines through.
    """

    def keep(opacity, colour):
        planes = np.clip(colour, 0, 255) * opacity[..., None], 255 * (1 - opacity[..., None])
        return np.rint(_shrink(np.moveaxis(np.concatenate(planes, -1), -1, 0), 2))

    w = np.random.default_rng(3).random((1 + len(ANGLES), 12), dtype=np.float32)
    x, y = _pixels(int(1.6 * size), 2)
    cloths = [np.moveaxis(np.clip(t, 0, 255), -1, 0) for t in tables(x / size + 2, y / size + 2, w[0])]
    x, y = _pixels(size, 2)
    x, y = x / (PLATE * size), y / (PLATE * size)
    vessels = [[keep(*vessel(style, kind, x, y)) for style in STYLES] for kind in VESSELS]
    bases = np.zeros((len(DISHES), len(ANGLES), 4, size, size), np.uint8)
    for d, dish in enumerate(DISHES):
        for a, angle in enumerate(ANGLES):
            c, s = (1.0, 0.0) if dish == "gratin" else (float(np.cos(angle)), float(np.sin(angle)))  # fits its vessel
            bases[d, a] = keep(*base(dish, c * x + s * y, c * y - s * x, w[1 + a]))
    return np.rint([_shrink(cloth, 2) for cloth in cloths]).astype(np.uint8), np.uint8(vessels), bases


@lru_cache(maxsize=1)
def _tape() -> np.ndarray:
    """Standard normal noise to cut every photo's grain from: drawing it afresh would take longer than the dish."""
    return np.random.default_rng(11).standard_normal(1 << 21, dtype=np.float32)


class _Canvas:
    """n images with a margin, and which line of the recipe each pixel shows (+ 1; 0: none).

    Colours lie in three planes, and a patch is read and written by whole rows, through a sliding window: numpy then
    copies runs of floats, several times faster than it copies pixels.
    """

    def __init__(self, n: int, size: int):
        self.margin = int(np.ceil(0.12 * size))
        self.side = size + 2 * self.margin
        self.pixels = np.zeros((3, n * self.side**2), np.float32)
        self.lines = np.zeros(n * self.side**2, np.uint8)

    def paste(self, rows, middle, through, colours, line):
        """Lay patches (k, P, P), what shines through and three colours, over images rows (k,) around middle (k, 2)."""
        patch = through.shape[-1]
        corner = np.clip(np.rint(middle - patch / 2).astype(np.int64) + self.margin, 0, self.side - patch)
        start = (rows * self.side + corner[:, 1]) * self.side + corner[:, 0]
        at = start[:, None] + np.arange(patch) * self.side  # (k, P)
        for plane, colour in zip(self.pixels, colours, strict=True):
            window = sliding_window_view(plane, patch, writeable=True)
            below = window[at]
            below *= through
            below += colour
            window[at] = below
        if line is not None:
            window = sliding_window_view(self.lines, patch, writeable=True)
            window[at] = np.where(through < 0.6, line[:, None, None], window[at])

    def inner(self, flat: np.ndarray) -> np.ndarray:
        """(..., n * side * side) -> (..., n, size, size)."""
        cut = slice(self.margin, self.side - self.margin)
        return flat.reshape(*flat.shape[:-1], -1, self.side, self.side)[..., cut, cut]


def draw(scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scenes -> photos (n, size, size, 3) uint8 and how many pixels show each line of the recipe (n, SLOTS)."""
    n = len(scene.style)
    tables, vessels, bases = ground_bank(size)
    canvas = _Canvas(n, size)
    rows, side = np.arange(n), canvas.side
    for i in rows:  # a window of the cloth, mirrored at random
        left, top = (scene.crop[i, :2] * (tables.shape[-1] - side)).astype(int)
        cloth = tables[scene.style[i], :, top : top + side, left : left + side]
        flip = [1 if c < 0.5 else -1 for c in scene.crop[i, 2:]]
        canvas.pixels.reshape(3, n, side, side)[:, i] = cloth[:, :: flip[0], :: flip[1]]
    middle = scene.centre * size
    kind = np.array([VESSELS.index(d.vessel) for d in DISHES.values()])[scene.dish]
    for patch, line in ((vessels[kind, scene.style], None), (bases[scene.dish, scene.turn], np.ones(n, np.uint8))):
        patch = patch.astype(np.float32)
        canvas.paste(rows, middle, patch[:, 3] / 255, [patch[:, c] for c in range(3)], line)
    banks = [piece_bank(size, False), piece_bank(size, True)]
    for j in range(scene.form.shape[1]):  # pieces, bottom first: the j-th of every image at once
        k = np.flatnonzero(scene.form[:, j] >= 0)
        if len(k) == 0:
            continue
        sprite = banks[int(scene.small[j])][scene.form[k, j], scene.sprite[k, j]]
        flesh, accent = scene.colour[k, j, 0, :, None, None], scene.colour[k, j, 1, :, None, None]
        colours = [sprite[:, 1] * flesh[:, c] + sprite[:, 2] * accent[:, c] + sprite[:, 3] for c in range(3)]
        where = middle[k] + scene.place[k, j] * PLATE * size
        canvas.paste(k, where, sprite[:, 0], colours, (scene.slot[k, j] + 1).astype(np.uint8))
    lines = canvas.inner(canvas.lines) + (SLOTS + 1) * rows[:, None, None]
    seen = np.bincount(lines.ravel(), minlength=n * (SLOTS + 1)).reshape(n, SLOTS + 1)[:, 1:]
    return _photograph(scene, canvas.inner(canvas.pixels)), seen


def _photograph(scene: Scene, light: np.ndarray) -> np.ndarray:
    """Scene light (3, n, S, S), 0..255 -> what the camera keeps: exposure, a lamp to one side, blur, grain."""
    n, size = light.shape[1:3]
    line = np.linspace(-1, 1, size, dtype=np.float32)
    camera = scene.camera.astype(np.float32).T[..., None, None]  # (7, n, 1, 1)
    lamp = 1 + camera[3] * line + camera[4] * line[:, None]
    light = light * lamp * camera[:3]
    soft = light.copy()
    soft[..., 1:-1, :] = 0.25 * (light[..., :-2, :] + light[..., 2:, :]) + 0.5 * light[..., 1:-1, :]
    soft[..., 1:-1] = 0.25 * (soft[..., :-2] + soft[..., 2:]) + 0.5 * soft[..., 1:-1]
    light += camera[5] * (soft - light)
    tape, need = _tape(), 3 * size * size
    starts = (scene.grain * (len(tape) - need)).astype(int)
    for i in range(n):
        light[:, i] += camera[6, i] * tape[starts[i] : starts[i] + need].reshape(3, size, size)
    return np.ascontiguousarray(np.moveaxis(np.clip(light + 0.5, 0, 255).astype(np.uint8), 0, -1))
