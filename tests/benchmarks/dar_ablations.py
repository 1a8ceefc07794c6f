"""DAR on the kitchen with one part taken out or changed at a time: R@1 over seeds, paired with the whole of it.

    python -m tests.benchmarks.dar_ablations [--seeds 1 2 3] [--epochs 4] [--csv FILE]

Each change is one or two parameters of params/methods/dar.yaml, which `./run_all.sh` takes too. Here the versions of a
seed share prepared data and towers, and are trained for few epochs, equally many. Photo to recipe among all pairs of
the iid test split; from three seeds on the interval is over seeds and queries (recipe_lib/retrieval/intervals.py). "+"
is the photo-recipe distance times photo-description, "++" times segments-recipe too, "+s" segments-recipe alone (held
against "++" of the whole).
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd

from recipe_lib.data.augment import add_descriptions, add_segments
from recipe_lib.data.kitchen import KitchenConfig, cook
from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.store import Store
from recipe_lib.evaluation.scores import distances, encode
from recipe_lib.models import RetrievalSystem, SystemConfig, bare_towers, set_towers
from recipe_lib.retrieval.intervals import mean_interval
from recipe_lib.retrieval.metrics import cross_modal_ranks
from recipe_lib.training import TrainingConfig, train
from tests.benchmarks import table

CHANGES: dict[str, tuple[dict, dict]] = {
    "DAR (n = 4)": ({}, {}),
    "without segments": ({"segments": 0}, {}),
    "n = 1": ({"segments": 1}, {}),
    "n = 2": ({"segments": 2}, {}),
    "n = 6": ({"segments": 6}, {}),
    "without descriptions": ({"descriptions": ""}, {}),
    "description encoder frozen": ({"descriptions": "frozen"}, {}),
    "triplet in place of circle": ({}, {"loss": "triplet", "margin": 0.3}),
    "without adapters": ({"adapter_width": 0}, {}),
}


def one_seed(seed: int, folder: Path, pairs: int, epochs: int, tower_epochs: int) -> dict[tuple[str, str], np.ndarray]:
    """(N,) i2r ranks of each version, by its name and the suffix of its distances."""
    cooked = cook(KitchenConfig(train=pairs, val=200, test=min(1000, pairs), text_only=0, image_size=64, seed=seed))
    wanted = (r for r in cooked if r.split in ("train", "val", "iid"))
    prepare(wanted, folder / "data", StoreConfig(64, 3, 140, max_sentences=15, max_tokens=20, text_tokens="clip"))
    add_descriptions(folder / "data", None, folder / "cache")
    add_segments(folder / "data", 6, 56)
    store = Store(folder / "data")
    whole = SystemConfig(
        store.card["vocabulary"], len(store.classes.names), encoders="clip", clip_model="kitchen-clip-small",
        embed_dim=512, recipe_layers=1, recipe_feedforward=256, dropout=0.0, descriptions="adapted", segments=4,
    )  # fmt: skip
    training = TrainingConfig(
        epochs=epochs, batch_size=64, crop_size=56, optimizer="adamw", learning_rate=0.002, weight_decay=0.01,
        lr_schedule="cosine", warmup_epochs=0.5, loss="circle", margin=0.25, precision="bf16-mixed", seed=seed,
    )  # fmt: skip
    L.seed_everything(seed, verbose=False)
    towers = bare_towers(RetrievalSystem(whole))
    train(towers, store, replace(training, epochs=tower_epochs), folder / "towers")
    split, ranks = store.split("iid"), {}
    bare = encode(towers, split, crop=56)
    ranks["zero shot: the towers alone", ""] = cross_modal_ranks(bare.embedding, bare.recipes)[0].numpy()
    for name, (system_changes, training_changes) in CHANGES.items():
        L.seed_everything(seed, verbose=False)
        system = RetrievalSystem(replace(whole, **system_changes))
        set_towers(system, towers)
        print(f"seed {seed}: {name}", flush=True)
        train(system, store, replace(training, **training_changes), folder / name, kept=folder)
        encoded = encode(system, split, crop=56, kept=folder)
        for suffix, sides in distances(encoded.embedding, encoded.recipes, encoded).items():
            ranks[name, suffix] = cross_modal_ranks(*sides)[0].numpy()
    return ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--tower-epochs", type=int, default=6)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    seeds = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            seeds.append(one_seed(seed, Path(folder), args.pairs, args.epochs, args.tower_epochs))
        rows = []
        for name, suffix in seeds[0]:
            hits = np.stack([ranks[name, suffix] <= 1 for ranks in seeds])
            base = np.stack([ranks["DAR (n = 4)", suffix.replace("+s", "++")] <= 1 for ranks in seeds])
            difference, low, high = mean_interval(hits.astype(float) - base, own_queries=True)  # a kitchen a seed
            row = {"version": name, "distances": f"DAR{suffix}", "R@1": hits.mean(), "seeds": len(seeds)}
            rows.append(row | {"minus whole": f"{difference:+.3f}", "95 %": f"[{low:+.3f}, {high:+.3f}]"})
        print("\n" + table(rows) + "\n", flush=True)  # after each seed: the rest may be long
        if args.csv:
            pd.DataFrame(rows).to_csv(args.csv, index=False)


if __name__ == "__main__":
    main()
