"""Figures of the study. Functions take the axes they draw on and return nothing; notebooks own the figure."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from PIL import Image

from recipe_lib.evaluation.comparisons import standing

COLOURS = {
    "baseline": "#8c8c8c",
    "equal_compute": "#4c72b0",
    "classifier_only": "#55a868",
    "debiased": "#c44e52",
    "oracle": "#ccb974",
    "context_swap": "#64b5cd",
    "swap_hard": "#dd8452",
    "swap_hard_visible": "#937860",
}


def _colour(variant: str) -> str:
    return COLOURS.get(re.split("[@+,]", variant)[0], "#8172b3")


def photo(ax: Axes, image: bytes | np.ndarray, title: str = "", *, frame: str | None = None, width: int = 24) -> None:
    """One photo, JPEG or pixels; `frame` colours its border."""
    ax.imshow(Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image)
    ax.set_title("\n".join(textwrap.wrap(title, width)[:3]), fontsize=8)
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set(visible=frame is not None, color=frame, linewidth=3)


def recipe_card(ax: Axes, recipe: dict, *, lines: int = 9, width: int = 44) -> None:
    """A recipe's text: title, ingredient lines, the first steps."""
    text = [textwrap.shorten(line, width, placeholder="…") for line in recipe["ingredients"][:lines]]
    steps = textwrap.wrap(" ".join(recipe["instructions"]), width)[:3]
    ax.text(0, 1, "\n".join(textwrap.wrap(recipe["title"], width)[:2]), va="top", fontsize=9, weight="bold")
    ax.text(0, 0.82, "\n".join([*("· " + line for line in text), "", *steps]), va="top", fontsize=7, linespacing=1.3)
    ax.axis("off")


def learning_curves(ax: Axes, histories: dict[str, pd.DataFrame], metric: str, *, start: int = 0) -> None:
    """Validation metric by epoch, a line per system; `start` shifts the epochs of runs that go on from a baseline."""
    for name, history in histories.items():
        first = 0 if name == "baseline" else start
        ax.plot(history["epoch"] + first, history[metric], "o-", ms=3, label=name, color=_colour(name))
    ax.set(xlabel="epoch", ylabel=metric.replace("val_", "validation ").replace("_", " "))
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, frameon=False)


def recall_bars(ax: Axes, table: pd.DataFrame) -> None:
    """Horizontal bars with 95 % intervals: columns variant, value, low, high."""
    y = np.arange(len(table))[::-1]
    error = np.abs(table[["low", "high"]].to_numpy().T - table["value"].to_numpy())
    ax.barh(y, table["value"], xerr=error, color=[_colour(v) for v in table["variant"]], height=0.7, error_kw={"lw": 1})
    ax.set_yticks(y, table["variant"], fontsize=8)
    for position, value, high in zip(y, table["value"], table["high"], strict=True):
        ax.text(high + 0.01, position, f"{value:.3f}", va="center", fontsize=8)
    ax.set_xlim(0, min(1.12, 1.15 * table["high"].max() + 0.05))


STANDINGS = {"above": "#0072b2", "below": "#d55e00", "not apart from": "#8c8c8c"}


def forest(ax: Axes, comparisons: Sequence[dict], label: str = "{a} - {b}, {split}") -> None:
    """Paired differences of two variants with 95 % intervals, a row each, the zero line, coloured by what they show.

    Args:
        comparisons: as `compare` gives them, of one direction; a variant against itself is left out.
        label: of a row, with its values by name.
    """
    rows = [row for row in comparisons if row["a"] != row["b"]]
    heights = np.arange(len(rows))[::-1]
    for word, colour in STANDINGS.items():
        chosen = [(y, row) for y, row in zip(heights, rows, strict=True) if standing(row) == word]
        if chosen:
            y, value, low, high = np.array([(y, row["difference"], row["low"], row["high"]) for y, row in chosen]).T
            error = np.abs([value - low, high - value])
            ax.errorbar(value, y, xerr=error, fmt="o", ms=4, lw=1.5, color=colour, label=word.removesuffix(" from"))
    ax.axvline(0, color="#1a1a1a", lw=0.8)
    ax.set_yticks(heights, [label.format_map(row) for row in rows], fontsize=7)
    ax.set_ylim(-0.6, len(rows) + 0.4)  # the legend has a row of its own, above all intervals
    ax.grid(axis="x", alpha=0.3)
    ax.set(title=rows[0]["direction"], xlabel="difference of R@1")
    ax.legend(fontsize=7, loc="upper center", ncols=len(STANDINGS), framealpha=1, edgecolor="none", borderaxespad=0.1)


def frontier(ax: Axes, table: pd.DataFrame, x: str, y: str, *, path: Sequence[str] = ()) -> None:
    """Recall on one split against another's, a named point per variant: columns variant, split, value, low, high.

    Args:
        path: variants that a line joins, in this order.
    """
    sides = [table[table["split"] == split].set_index("variant") for split in (x, y)]
    ax.plot(*(side.loc[list(path), "value"] for side in sides), color="#8c8c8c", lw=1)
    for i, variant in enumerate(sides[0].index):
        (a, b) = (side.loc[variant] for side in sides)
        error = [np.abs([[side["value"] - side["low"]], [side["high"] - side["value"]]]) for side in (a, b)]
        ax.errorbar(
            a["value"], b["value"], xerr=error[0], yerr=error[1], fmt="o", ms=5, lw=1, alpha=0.8, color=_colour(variant)
        )
        # At three heights: systems that score alike would hide each other's names.
        below = (5, 4 - 9 * (i % 3))
        ax.annotate(
            variant, (a["value"], b["value"]), below, textcoords="offset points", fontsize=7, color=_colour(variant)
        )
    ax.set(xlabel=f"R@1, {x}", ylabel=f"R@1, {y}")
    ax.grid(alpha=0.3)


def dots(ax: Axes, table: pd.DataFrame, chance: float | None = None, control: float | None = None) -> None:
    """One measure, a dot with its interval per variant, where chance and the control lie: variant, value, low, high."""
    y = np.arange(len(table))[::-1]
    error = np.abs(table[["low", "high"]].to_numpy().T - table["value"].to_numpy())
    ax.errorbar(table["value"], y, xerr=error, fmt="o", ms=4, lw=1.2, color="#4c72b0")
    ax.set_yticks(y, table["variant"], fontsize=7)
    ax.set_ylim(-0.6, len(table) - 0.4)
    if chance is not None:
        ax.axvline(chance, color="#8c8c8c", ls="--", lw=0.8)
    if control is not None:
        ax.axvline(control, color=COLOURS["equal_compute"], lw=0.8)
    ax.grid(axis="x", alpha=0.3)


def by_world(ax: Axes, table: pd.DataFrame) -> None:
    """One number by world, a dot with its interval per variant: columns world, variant, value, low, high."""
    worlds, variants = (list(dict.fromkeys(table[name])) for name in ("world", "variant"))
    for i, variant in enumerate(variants):
        rows = table[table["variant"] == variant]
        y = -rows["world"].map(worlds.index) - 0.6 * (i + 0.5) / len(variants) + 0.3
        error = np.abs(rows[["low", "high"]].to_numpy().T - rows["value"].to_numpy())
        ax.errorbar(rows["value"], y, xerr=error, fmt="o", ms=4, lw=1.2, color=_colour(variant), label=variant)
    ax.set_yticks(-np.arange(len(worlds)), worlds, fontsize=8)
    ax.set_ylim(-len(worlds) + 0.4, 0.6)
    for height in range(1, len(worlds)):
        ax.axhline(0.5 - height, color="#d9d9d9", lw=0.6)
    ax.grid(axis="x", alpha=0.3)


def fall(ax: Axes, table: pd.DataFrame, splits: Sequence[str]) -> None:
    """Recall from split to split, a line per variant: columns variant, split, value, low, high."""
    variants = list(dict.fromkeys(table["variant"]))
    for i, variant in enumerate(variants):
        rows = table[table.variant == variant].set_index("split").loc[list(splits)]
        x = np.arange(len(splits)) + 0.06 * (i - len(variants) / 2)
        error = np.abs(rows[["low", "high"]].to_numpy().T - rows["value"].to_numpy())
        ax.errorbar(
            x, rows["value"], yerr=error, fmt="o-", capsize=2, lw=1.5, ms=4, label=variant, color=_colour(variant)
        )
    ax.set_xticks(range(len(splits)), splits)
    ax.set_ylim(0, max(ax.get_ylim()[1], 1.05 * table["high"].max()))  # of axes that share it, the higher one's
    ax.legend(fontsize=8, frameon=False)


def probability_bars(
    ax: Axes, names: Sequence[str], probabilities: np.ndarray, truth: np.ndarray, *, top: int = 10
) -> None:
    """The likeliest ingredients of one photo; those of its recipe are green, true ones that are missed are listed."""
    order = np.argsort(-probabilities)[:top]
    y = np.arange(len(order))[::-1]
    ax.barh(y, probabilities[order], color=["#55a868" if truth[i] else "#c9c9c9" for i in order])
    ax.set_yticks(y, [names[i] for i in order], fontsize=7)
    ax.set_xlim(0, 1)
    missed = [names[i] for i in np.flatnonzero(truth) if i not in order]
    ax.set_xlabel("\n".join(textwrap.wrap("missed: " + (", ".join(missed) or "none"), 38)[:3]), fontsize=7)


def dictionary_map(
    ax: Axes, dictionary: np.ndarray, names: Sequence[str], counts: Sequence[int], *, seed: int = 0
) -> None:
    """t-SNE of the (K, E) dictionary by cosine distance; point size grows with the ingredient's frequency."""
    from sklearn.manifold import TSNE  # a second, for those alone who draw it

    flat = TSNE(metric="cosine", init="random", perplexity=min(12, (len(names) - 1) / 3), random_state=seed)
    x, y = flat.fit_transform(dictionary - dictionary.mean(0)).T
    ax.scatter(x, y, s=6 + 60 * np.asarray(counts) / max(counts), alpha=0.35, color="#4c72b0", lw=0)
    for i, name in enumerate(names):
        ax.annotate(name, (x[i], y[i]), fontsize=6.5, ha="center", va="center")
    ax.axis("off")


def corruption_curve(
    ax: Axes, rates: Sequence[float], recalls: dict[str, Sequence[float]], reference: dict[str, float]
) -> None:
    """Recall against the share of corrupted labels, a line per split; dashed lines are systems for comparison."""
    for (split, values), style in zip(recalls.items(), ("o-", "s--", "^:"), strict=False):
        ax.plot(rates, values, style, ms=4, label=f"oracle, {split}", color=COLOURS["oracle"])
    for name, value in reference.items():
        ax.axhline(value, ls="--", lw=1, color=_colour(name), label=name)
    ax.set(xlabel="share of true labels swapped for wrong ones", ylim=(0, 1.02))
    ax.legend(fontsize=8, frameon=False)


def causal_graph(ax: Axes, places: Mapping[str, tuple[float, float]], arrows: Sequence[tuple[str, str]], *,
                 backdoor: Sequence[tuple[str, str]] = (), title: str = "") -> None:  # fmt: skip
    """A causal graph: a box per variable at its place in the unit square; arrows of the backdoor path are red."""
    boxes = {
        name: ax.text(
            *place, name, ha="center", va="center", fontsize=9, bbox={"boxstyle": "round,pad=0.4", "fc": "#f5f5f5"}
        )
        for name, place in places.items()
    }
    for start, end in arrows:
        ax.annotate(
            "",
            xy=places[end],
            xytext=places[start],
            arrowprops={
                "arrowstyle": "-|>",
                "lw": 1.6,
                "color": COLOURS["debiased"] if (start, end) in backdoor else "#444444",
                "patchA": boxes[start].get_bbox_patch(),
                "patchB": boxes[end].get_bbox_patch(),
                "shrinkA": 2,
                "shrinkB": 2,
            },
        )
    ax.set(xlim=(-0.15, 1.15), ylim=(-0.15, 1.15), title=title)
    ax.axis("off")
