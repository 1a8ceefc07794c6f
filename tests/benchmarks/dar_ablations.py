"""DAR on the kitchen with one part taken out or changed at a time: R@1 over seeds, paired with the whole of it.

    python -m tests.benchmarks.dar_ablations [--rows whole,triplet] [--seeds 1 2 3] [--epochs 4] [--csv FILE]

Each change is one or two parameters of params/methods/dar.yaml, which `./run_all.sh` takes too. Here the versions of a
seed share prepared data and towers, and are trained for few epochs, equally many. Photo to recipe among all pairs of
the iid test split; from three seeds on the interval is over seeds and queries (recipe_lib/retrieval/intervals.py). "+"
is the photo-recipe distance times photo-description, "++" times segments-recipe too, "+s" segments-recipe alone (held
against "++" of the whole).

What is finished of each row and seed is kept in --folder, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd

import recipe_lib
from recipe_lib import devices
from recipe_lib.data.derived import add_descriptions, add_segments
from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.shards import digest
from recipe_lib.data.store import Store
from recipe_lib.evaluation.scores import distances, encode
from recipe_lib.kitchen.model import KitchenConfig, cook
from recipe_lib.paths import atomic_write_text, study_dir
from recipe_lib.retrieval.intervals import mean_interval
from recipe_lib.retrieval.metrics import cross_modal_ranks
from recipe_lib.systems.base import System, SystemConfig
from recipe_lib.systems.captions import bare_towers, set_towers
from recipe_lib.systems.registry import build
from recipe_lib.systems.saving import load_system
from recipe_lib.training.fit import TrainingConfig, train
from tests.benchmarks import table

ROWS: dict[str, tuple[str, dict, dict]] = {
    "whole": ("DAR (n = 4)", {}, {}),
    "zero_shot": ("zero shot: the towers alone", {"method": "zero_shot"}, {}),
    "no_segments": ("without segments", {"segments": 0}, {}),
    "n1": ("n = 1", {"segments": 1}, {}),
    "n2": ("n = 2", {"segments": 2}, {}),
    "n6": ("n = 6", {"segments": 6}, {}),
    "no_descriptions": ("without descriptions", {"descriptions": ""}, {}),
    "frozen_descriptions": ("description encoder frozen", {"descriptions": "frozen"}, {}),
    "adapted_segments": ("segment encoder adapted", {"segment_encoder": "adapted"}, {}),
    "image_adapters": ("adapters on the image side alone", {"adapters": "image"}, {}),
    "text_adapters": ("adapters on the text side alone", {"adapters": "text"}, {}),
    "no_adapters": ("without adapters", {"adapters": "none"}, {}),
    "triplet": ("triplet in place of circle", {}, {"loss": "triplet", "margin": 0.3}),
    "circle_per_query": ("circle: a logarithm per query", {}, {"loss": "circle_per_query"}),
    "circle_released": ("circle as the released code", {}, {"loss": "circle_released"}),
}
Ranks = dict[str, np.ndarray]  # (N,) i2r ranks by the suffix of the distances


class Seed:
    """Data, towers and finished rows of one seed.

    Args:
        folder: where they are kept.
        pairs, epochs, tower_epochs: sizes.
    """

    def __init__(self, seed: int, folder: Path, pairs: int, epochs: int, tower_epochs: int):
        self.seed, self.folder, self.tower_epochs = seed, folder, tower_epochs
        self.store = self._store(pairs)
        self.whole = SystemConfig(
            self.store.card["vocabulary"], len(self.store.classes.names), method="dar",
            clip_model="kitchen-clip-small", recipe_layers=1, recipe_feedforward=256, dropout=0.0,
            descriptions="adapted", segments=4,
        )  # fmt: skip
        self.training = TrainingConfig(
            epochs=epochs, batch_size=64, crop_size=56, optimizer="adamw", learning_rate=0.002, weight_decay=0.01,
            lr_schedule="cosine", warmup_epochs=0.5, loss="circle", margin=0.25, seed=seed,
            precision=devices.precision("auto"),
        )  # fmt: skip
        self.towers = self._towers()

    def _store(self, pairs: int) -> Store:
        data = self.folder / "data"
        if not (data / "card.json").is_file() or "segments" not in Store(data).card:  # the last thing that is added
            test = min(1000, pairs)
            world = KitchenConfig(train=pairs, val=200, test=test, text_only=0, image_size=64, seed=self.seed)
            wanted = (r for r in cook(world) if r.split in ("train", "val", "iid"))
            prepare(wanted, data, StoreConfig(64, 3, 40, max_sentences=15, max_tokens=20, text_tokens="clip"))
            add_descriptions(data, None, self.folder / "cache")
            add_segments(data, 6, 56)
        return Store(data)

    def _towers(self) -> System:
        folder = self.folder / "towers"
        if not (folder / "model.safetensors").is_file():
            L.seed_everything(self.seed, verbose=False)
            towers = bare_towers(build(self.whole))
            print(f"seed {self.seed}: towers", flush=True)
            training = replace(self.training, epochs=self.tower_epochs, loss="circle_per_query")
            train(towers, self.store, training, folder)
        return load_system(folder)

    def ranks(self, row: str) -> Ranks:
        """Of a row, trained now if it is not kept."""
        _, system_changes, training_changes = ROWS[row]
        training = replace(self.training, **training_changes)
        path = self.folder / f"{row}-{digest(json.dumps([system_changes, training_changes]))[:8]}.npz"
        if not path.is_file():
            if row == "zero_shot":
                system = bare_towers(self.towers, "zero_shot")
            else:
                L.seed_everything(self.seed, verbose=False)
                system = build(replace(self.whole, **system_changes))
                set_towers(system, self.towers)
                train(system, self.store, training, self.folder / row, kept=self.folder)
            encoded = encode(system, self.store.split("iid"), crop=56, kept=self.folder)
            sides = distances(encoded.embedding, encoded.recipes, encoded)
            partial = path.with_suffix(".partial")
            with open(partial, "wb") as file:
                np.savez(file, **{f"DAR{k}": cross_modal_ranks(*pair)[0].numpy() for k, pair in sides.items()})
            partial.rename(path)
            shutil.rmtree(self.folder / row, ignore_errors=True)
        with np.load(path, allow_pickle=False) as kept:
            return {name.removeprefix("DAR"): kept[name] for name in kept.files}


def claim(folder: Path, settings: dict) -> None:
    """Refuse a folder whose rows were made with other sizes or another library; comments do not count.

    Raises:
        SystemExit: in one line.
    """
    library = sorted(Path(recipe_lib.__file__).parent.rglob("*.py"))
    settings = settings | {"library": digest(*(ast.dump(ast.parse(path.read_bytes())) for path in library))}
    path = folder / "settings.json"
    if path.is_file() and (before := json.loads(path.read_text())) != settings:
        other = ", ".join(name for name in settings if before.get(name) != settings[name])
        raise SystemExit(f"{folder}: its rows were made with other {other}; delete the folder or name another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(settings))


def summary(seeds: list[dict[str, Ranks]]) -> pd.DataFrame:
    """A line for each row and distance over all seeds, each held against the whole."""
    lines = []
    for row in seeds[0]:
        for suffix in seeds[0][row]:
            hits = np.stack([ranks[row][suffix] <= 1 for ranks in seeds])
            base = np.stack([ranks["whole"][suffix.replace("+s", "++")] <= 1 for ranks in seeds])
            difference, low, high = mean_interval(hits.astype(float) - base, own_queries=True)  # a kitchen per seed
            line = {"version": ROWS[row][0], "distances": f"DAR{suffix}", "R@1": hits.mean(), "seeds": len(seeds)}
            lines.append(line | {"minus whole": f"{difference:+.3f}", "95 %": f"[{low:+.3f}, {high:+.3f}]"})
    return pd.DataFrame(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="of these, separated by commas; whole is always one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--tower-epochs", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=study_dir("dar_ablations"))
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    wanted = {"whole", *args.rows.split(",")}
    if unknown := wanted - set(ROWS):
        parser.error(f"--rows: no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    sizes = {"pairs": args.pairs, "epochs": args.epochs, "tower_epochs": args.tower_epochs}
    claim(args.folder, sizes)
    seeds: list[dict[str, Ranks]] = []
    for number in args.seeds:
        seed = Seed(number, args.folder / f"seed{number}", **sizes)
        ranks: dict[str, Ranks] = {}
        for row in (row for row in ROWS if row in wanted):
            place = f"{len(seeds) + 1}/{len(args.seeds)}), row {len(ranks) + 1}/{len(wanted)}"
            print(f"seed {number} ({place}: {row}", flush=True)
            ranks[row] = seed.ranks(row)
        seeds.append(ranks)
        rows = summary(seeds)  # after each seed: the rest may be long
        print("\n" + table(rows.to_dict("records")) + "\n", flush=True)
        if args.csv:
            atomic_write_text(args.csv.resolve(), rows.to_csv(index=False))


if __name__ == "__main__":
    main()
