import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from recipe_lib.evaluation import plots


def jpeg():
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "JPEG")
    return out.getvalue()


def test_each_figure_shows_what_it_is_given():
    _, axes = plt.subplots(3, 3)
    axes = axes.flat
    plots.photo(axes[0], jpeg(), "a title", frame="green")
    plots.recipe_card(axes[1], {"title": "Soup", "ingredients": ["salt"] * 30, "instructions": ["boil " * 99]})
    history = pd.DataFrame({"epoch": [1, 2], "val_i2r_recall_1": [0.1, 0.2]})
    plots.learning_curves(axes[2], {"baseline": history, "debiased": history}, "val_i2r_recall_1", start=2)
    table = pd.DataFrame(
        {"variant": ["baseline", "oracle@no_z"], "split": "iid", "value": 0.5, "low": 0.4, "high": 0.6}
    )
    plots.recall_bars(axes[3], table)
    plots.fall(axes[4], pd.concat([table, table.assign(split="do_context")]), ["iid", "do_context"])
    plots.probability_bars(axes[5], list("abc"), np.array([0.1, 0.9, 0.5]), np.array([True, True, False]), top=2)
    names = [f"n{i}" for i in range(12)]
    plots.dictionary_map(axes[6], np.random.default_rng(0).normal(size=(12, 4)), names, range(1, 13))
    plots.corruption_curve(axes[7], [0, 0.5], {"iid": [0.9, 0.3]}, {"baseline": 0.2})
    row = {"b": "control", "split": "iid", "against_split": "iid", "direction": "i2r"}
    shown = [(0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), (0.1, -0.1, 0.3), (0, 0, 0)]
    rows = [row | {"a": a, "difference": v, "low": l, "high": h} for a, (v, l, h) in zip("abc", shown, strict=False)]
    plots.forest(axes[8], [*rows, rows[0] | {"a": "control"}])
    assert [label.get_text() for label in axes[8].get_yticklabels()] == [f"{a} - control, iid" for a in "abc"]
    drawn = {c.get_label(): (*c[0].get_xydata()[0], *c[2][0].get_segments()[0][:, 0]) for c in axes[8].containers}
    assert drawn == {
        "above": pytest.approx((0.2, 2, 0.1, 0.3)), "below": pytest.approx((-0.2, 1, -0.3, -0.1)),
        "not apart": pytest.approx((0.1, 0, -0.1, 0.3)),
    }  # fmt: skip
    assert len({c[0].get_color() for c in axes[8].containers}) == 3
    assert axes[0].get_title() == "a title" and axes[0].spines["left"].get_visible()
    assert list(axes[2].lines[1].get_xdata()) == [3, 4], "what goes on from the baseline is drawn after it"
    assert [bar.get_width() for bar in axes[3].patches] == [0.5, 0.5]
    assert len(axes[4].containers) == 2 and axes[5].get_xlabel() == "missed: a"
    assert [t.get_text() for t in axes[6].texts] == names
    assert len(axes[7].lines) == 2
    plt.close("all")


def test_worlds_stand_in_their_order_with_every_variant_in_its_row():
    _, ax = plt.subplots()
    rows = [("plain", "debiased", 0.1), ("calm", "debiased", 0.2), ("plain", "swap_hard", 0.3)]
    table = pd.DataFrame(rows, columns=["world", "variant", "value"])
    plots.by_world(ax, table.assign(low=table["value"] - 0.05, high=table["value"] + 0.1))
    ticks = dict(zip((label.get_text() for label in ax.get_yticklabels()), ax.get_yticks(), strict=True))
    assert list(ticks) == ["plain", "calm"] and ticks["plain"] > ticks["calm"]
    points = {c.get_label(): c[0].get_xydata() for c in ax.containers}
    assert {name: list(xy[:, 0]) for name, xy in points.items()} == {"debiased": [0.1, 0.2], "swap_hard": [0.3]}
    assert list(abs(points["debiased"][:, 1] - [ticks["plain"], ticks["calm"]]) < 0.5) == [True, True]
    low, high = ax.containers[0][2][0].get_segments()[1][:, 0]
    assert (low, high) == (pytest.approx(0.15), pytest.approx(0.3))
    plt.close("all")


def test_a_path_joins_its_variants_in_order_and_the_control_has_a_line():
    _, (left, right) = plt.subplots(1, 2)
    rows = [(v, s, x) for v, x in (("b", 0.1), ("a", 0.2), ("c", 0.3)) for s in ("iid", "do_context")]
    table = pd.DataFrame(rows, columns=["variant", "split", "value"]).assign(low=0.0, high=0.5)
    plots.frontier(left, table, "iid", "do_context", path=("a", "b"))
    assert left.lines[0].get_xydata().tolist() == [[0.2, 0.2], [0.1, 0.1]]
    plots.dots(right, table[table["split"] == "iid"], 0.5, 0.2)
    assert [line.get_xdata()[0] for line in right.lines if len(set(line.get_xdata())) == 1] == [0.5, 0.2]
    plt.close("all")
