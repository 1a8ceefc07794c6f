"""What a game leaves to look at: each player's curves, and the generator's pictures beside the photos."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from recipe_lib.data.loading import Draw, StudyDataset
from recipe_lib.data.store import Split
from recipe_lib.evaluation.plots import photo
from recipe_lib.systems.base import System

# Columns of a history by the axes they are drawn on; those of a system without a game are not there.
CURVES = {
    "critic: distance of photos and recipes": ("critic", "game_gap", "game_slope"),
    "discriminators": ("discriminator", "origin", "game_photo_real", "game_painted_real"),
    "generator, and photo to ingredients": ("generator", "game_picture", "game_ingredients", "game_spread"),
}
PLAYERS = "^(?:critic|discriminator|origin|generator|game_.*)$"  # columns of a history that are no loss of the encoders


def curves(history: pd.DataFrame) -> Figure:
    """Each player's figures by epoch; of `CURVES` the axes for which this game has any."""
    drawn = {title: [name for name in names if name in history] for title, names in CURVES.items()}
    drawn = {title: names for title, names in drawn.items() if names}
    fig, axes = plt.subplots(1, len(drawn), figsize=(4.3 * len(drawn), 3.2), layout="constrained", squeeze=False)
    for ax, (title, names) in zip(axes[0], drawn.items(), strict=True):
        for name in names:
            ax.plot(history["epoch"], history[name], "o-", ms=3, label=name.removeprefix("game_").replace("_", " "))
        ax.axhline(0, color="#8c8c8c", lw=0.5)
        ax.set(xlabel="epoch", title=title)
        ax.legend(frameon=False, fontsize=8)
    return fig


def pictures(system: System, split: Split, rows: np.ndarray, crop: int) -> dict[str, Tensor]:
    """Photos of some pairs, and what a system paints of their recipes: (n, 3, side, side) in [0, 1], by name.

    A system that paints from photos too is shown a photo that is another's, and none, to see what it takes from where.
    """
    batch = StudyDataset(split, crop)[Draw(rows, True, 0)]
    image, recipes = system.encode_images(batch), system.encode_recipes(batch.recipes)
    found = {"photo": batch.images / 255, "painted": system.paint(image, recipes)}
    if "decoder" in system.objectives:
        shuffled = image._replace(features=image.features.roll(1, 0))
        found["another's photo"] = system.paint(shuffled, recipes)
        found["no photo"] = system.paint(image._replace(features=None), recipes)
    return found


def photo_share(found: dict[str, Tensor]) -> float:
    """Mean change of pixels under another's photo over that between two pictures: 0 where no photo is followed."""
    own, other = found["painted"], found["another's photo"]
    return float((own - other).abs().mean() / (own - own.roll(1, 0)).abs().mean().clamp(1e-6))


def gallery(found: dict[str, Tensor], titles: Sequence[str]) -> Figure:
    """A column per dish, a row per kind of picture."""
    columns = len(found["photo"])
    fig, axes = plt.subplots(len(found), columns, figsize=(1.25 * columns, 1.35 * len(found)), layout="constrained")
    for line, (name, kind) in zip(axes, found.items(), strict=True):
        for ax, picture, title in zip(line, kind, titles, strict=True):
            photo(ax, picture.permute(1, 2, 0).numpy(), title if name == "photo" else "", width=15)
        line[0].set_ylabel(name, fontsize=8)
    return fig
