"""From a grid of finished studies (`runner.grid`) to evidence: every difference over seeds, with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from recipe_lib.causal.debiasing import VARIANTS
from recipe_lib.evaluation.comparisons import compare, compare_falls, labelled, recall_intervals
from recipe_lib.paths import study_dir

CONTROL = "equal_compute"


class Grid:
    """The studies of a grid that is finished.

    Args:
        name: of the grid; its folder holds grid.json.

    Raises:
        ValueError: no such grid, or a study of it that is not finished.
    """

    def __init__(self, name: str):
        self.name, path = name, study_dir(name) / "grid.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such grid; run its parameter file with seeds: [...] first")
        self.studies = pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))
        unfinished = [s for s in self.studies["study"] if not (study_dir(s) / "ranks.parquet").is_file()]
        if unfinished:
            raise ValueError(f"grid {name}: {', '.join(unfinished)} not finished; run the grid again")

    @property
    def worlds(self) -> list[str]:
        """Their names; "" where the grid changes nothing but the seed."""
        return list(dict.fromkeys(self.studies["world"]))

    def variants(self, world: str = "") -> list[str]:
        """The trained systems of a world in the order of VARIANTS, without test-time controls and products."""
        study, order = self._of(world)[0], ["baseline", *VARIANTS]
        names = pd.read_parquet(study_dir(study) / "ranks.parquet", columns=["variant"])["variant"].unique()
        names = [name for name in names if "@" not in name]
        return sorted(names, key=lambda name: order.index(name) if name in order else len(order))

    def ranks(self, world: str = "") -> pd.DataFrame:
        """The rank of every query of all seeds of a world; products of distances are variants (`labelled`)."""
        frames = []
        for study in self._of(world):
            ranks = pd.read_parquet(study_dir(study) / "ranks.parquet")
            frames.append(labelled(ranks, min(ranks["system"].unique(), key=len)))
        return pd.concat(frames, ignore_index=True)

    def measures(self, world: str = "") -> pd.DataFrame:
        """What each study measured of its variants: variant, measure, value, seed.

        Near-duplicates are near_duplicates_<split> from photo to recipe, near_duplicates_<split>_r2i the other way.
        """
        frames = []
        for study, seed in zip(self._of(world), self._seeds(world), strict=True):
            metrics = json.loads((study_dir(study) / "metrics.json").read_text(encoding="utf-8"))
            near = pd.DataFrame(metrics["near_duplicates"], columns=["variant", "split", "direction", "accuracy"])
            suffix = near["direction"].map({"i2r": "", "r2i": "_r2i"})
            near = near.assign(measure="near_duplicates_" + near["split"] + suffix, value=near["accuracy"])
            bias = pd.DataFrame(metrics["bias"], columns=["variant", "measure", "value"])
            frames.append(pd.concat([bias, near[["variant", "measure", "value"]]]).assign(seed=seed))
        return pd.concat(frames, ignore_index=True)

    def history(self, variant: str, world: str = "") -> pd.DataFrame:
        """The training history of a variant, of all seeds."""
        folders = [study_dir(study) / "04_debiasing_training" / variant for study in self._of(world)]
        frames = [pd.read_csv(folder / "history.csv") for folder in folders]
        return pd.concat([f.assign(seed=s) for f, s in zip(frames, self._seeds(world), strict=True)])

    def told(self, world: str = "", *, split: str) -> pd.DataFrame:
        """How good the labels are that the classifier tells: micro precision, recall and F1 of each seed."""
        frames = []
        for study in self._of(world):
            rows = json.loads((study_dir(study) / "metrics.json").read_text(encoding="utf-8"))["classifier"]
            frames.append(pd.DataFrame(rows.get(split, [])))
        return pd.concat(frames, ignore_index=True)

    def _of(self, world: str) -> list[str]:
        return list(self.studies.loc[self.studies["world"] == world, "study"])

    def _seeds(self, world: str) -> list[int]:
        return list(self.studies.loc[self.studies["world"] == world, "seed"])


def over_seeds(values: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """Mean of one number per seed with Student's t interval; no interval where there are fewer than two.

    Each seed cooks its own kitchen, so what is spread between them holds test recipes and training alike.
    """
    values = np.asarray(values, float)
    half = np.nan
    if len(values) > 1:
        half = stdtrit(len(values) - 1, (1 + level) / 2) * values.std(ddof=1) / np.sqrt(len(values))
    return {"value": float(values.mean()), "low": float(values.mean() - half), "high": float(values.mean() + half)}


def against_control(
    ranks: pd.DataFrame, variants: Sequence[str], splits: Sequence[str], *, control: str = CONTROL, k: int = 1
) -> pd.DataFrame:
    """Each variant minus the control, by split and direction, paired by query: a row as `compare` gives it.

    With `control_value`, R@k of the control, and `relative`, the difference as a share of it (NaN of nothing).
    """
    rows = []
    for direction in ("i2r", "r2i"):
        recall = recall_intervals(ranks[ranks["variant"] == control], direction, k, own_queries=True)
        recall = recall.set_index("split")["value"]
        for split in splits:
            for variant in variants:
                row = compare(ranks, variant, control, split=split, direction=direction, k=k, own_queries=True)
                share = row["difference"] / recall[split] if recall[split] else np.nan
                rows.append(row | {"control_value": recall[split], "relative": share})
    return pd.DataFrame(rows)


def falls(
    ranks: pd.DataFrame, variants: Sequence[str], *, control: str = CONTROL, start: str = "iid", end: str = "do_context"
) -> pd.DataFrame:
    """How much of its recall each variant loses from one split to another, beside the control; a row per direction."""
    rows = []
    for direction in ("i2r", "r2i"):
        for variant in variants:
            own = compare(
                ranks, variant, variant, split=end, against_split=start, direction=direction, own_queries=True
            )
            less = compare_falls(ranks, variant, control, start=start, end=end, direction=direction, own_queries=True)
            rows.append(
                {"variant": variant, "direction": direction, "fall": -own["difference"]}
                | {f"less_{name}": less[name] for name in ("difference", "low", "high")}
            )
    return pd.DataFrame(rows)


def measured(measures: pd.DataFrame, variants: Sequence[str], control: str = CONTROL) -> pd.DataFrame:
    """Each measure of each variant over seeds, and its difference from the control, seed by seed."""
    table = measures.pivot(index="seed", columns=["measure", "variant"], values="value")
    rows = []
    for measure in dict.fromkeys(measures["measure"]):
        for variant in variants:
            row = {"variant": variant, "measure": measure} | over_seeds(table[measure, variant])
            less = over_seeds(table[measure, variant] - table[measure, control])
            rows.append(row | {f"difference_{name}": less[name] for name in less} | {"seeds": len(table)})
    return pd.DataFrame(rows)


def goals(
    differences: pd.DataFrame, fallen: pd.DataFrame, summary: pd.DataFrame, variants: Sequence[str]
) -> pd.DataFrame:
    """Which variants reach what was asked for before the runs, photo to recipe: a column of yes or no per part of it.

    Args:
        differences: of `against_control`, from the equal-compute control.
        fallen: of `falls`.
        summary: of `measured`; without near-duplicates in it, that column is missing.
    """
    one = differences[(differences["metric"] == "recall_1") & (differences["direction"] == "i2r")]
    one = one.set_index(["a", "split"])
    fall = fallen[fallen["direction"] == "i2r"].set_index("variant")["fall"]
    near = summary[summary["measure"] == "near_duplicates_iid"].set_index("variant")["value"] if len(summary) else {}
    rows = []
    for name in variants:
        row: dict[str, object] = {"variant": name}
        for split in ("do_context", "do_ingredients"):
            if (name, split) in one.index:
                row[f"{split}: +60 %"] = one.loc[(name, split), "low"] > 0 and one.loc[(name, split), "relative"] >= 0.6
        row["iid: -.01"] = one.loc[(name, "iid"), "difference"] >= -0.01
        row["fall halved"] = fall[name] <= fall[CONTROL] / 2
        if name in near:
            row["near-duplicates: .65"] = near[name] > 0.65
        rows.append({key: value if key == "variant" else bool(value) for key, value in row.items()})
    return pd.DataFrame(rows)


def claims(differences: pd.DataFrame, variants: Sequence[str]) -> str:
    """One line per variant, photo to recipe: its differences from the control, with what they are of its recall.

    Args:
        differences: of `against_control`.
    """
    lines = []
    for variant in variants:
        rows = differences[(differences["a"] == variant) & (differences["direction"] == "i2r")]
        parts = [
            f"{row.split} {row.difference:+z.3f} [{row.low:+z.3f}, {row.high:+z.3f}] ({row.relative:+z.0%})"
            for row in rows.itertuples()
        ]
        lines.append(f"{variant}: " + "; ".join(parts))
    return "\n".join(lines)
