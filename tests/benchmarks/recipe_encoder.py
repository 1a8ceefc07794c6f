"""The recipe encoder without padding against the same weights over a grid padded to the batch's longest.

    python -m tests.benchmarks.recipe_encoder [--batches 5] [--one-core]

Forward and backward in training mode, another batch each time, the padded module in float32. Times are medians, in
turns in one process after one batch that is not counted. Then a whole split: batch by batch, and each distinct sentence
once. On a busy machine `--one-core` gives steadier ratios: one thread, and the time of that core alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from recipe_lib.data.loading import RecipeBatch, recipe_batch
from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.store import Split, Store
from recipe_lib.encoders.packed import MaskedTransformer
from recipe_lib.encoders.recipe import COMPONENTS
from recipe_lib.evaluation.scores import distinct_sentences, encode_recipes
from recipe_lib.kitchen.model import KitchenConfig, cook
from recipe_lib.sources.recipe1m import read_recipe1m
from recipe_lib.systems.base import System, SystemConfig
from recipe_lib.systems.registry import build
from tests.benchmarks import side_by_side, table

SIZES = {
    "H-T": {"dropout": 0.1},
    "kitchen": {"recipe_dim": 128, "recipe_layers": 1, "recipe_feedforward": 256, "dropout": 0.0},
}


def grids(recipes: RecipeBatch) -> list[Tensor]:
    """Token ids (B, L), (B, S, L), (B, T, L) of the components, padded to the longest of the batch."""
    padded_ids = []
    for name in COMPONENTS:
        rows = getattr(recipes, name)
        tokens = recipes.tokens[rows.clamp(min=0)] * (rows >= 0).unsqueeze(-1)
        padded_ids.append(tokens[..., : int((tokens != 0).sum(-1).max())])
    return padded_ids


def padded(encoder: nn.Module, recipes: RecipeBatch) -> Tensor:
    """(B, D) as the released code does it; see `padded_components`."""
    return torch.tanh(encoder.fc(torch.cat(padded_components(encoder, recipes), 1)))


def padded_components(encoder: nn.Module, recipes: RecipeBatch) -> tuple[Tensor, ...]:
    """(B, E) each: every place of the grid through torch's own layers, under a key padding mask."""

    def encode(block: MaskedTransformer, x: Tensor, ignored: Tensor) -> Tensor:
        x = block.encoder(x + block.position[: x.shape[1]], src_key_padding_mask=ignored)
        kept = (~ignored).unsqueeze(2)
        return (x * kept).sum(1) / kept.sum(1)

    components = []
    for name, tokens in zip(COMPONENTS, grids(recipes), strict=True):
        flat = tokens.flatten(0, -2)  # (B S, L)
        ignored = flat == 0
        ignored[:, 0] = False  # a sentence of nothing would be NaN
        x = encode(encoder.words[name], encoder.word(flat), ignored)
        if tokens.ndim == 3:
            x = encode(encoder.sentences[name], x.view(*tokens.shape[:2], -1), tokens[:, :, 0] == 0)
        components.append(x)
    return tuple(components)


def training(store: Store, size: str, batches: int, clock) -> list[dict]:
    split, rng = store.split("train"), np.random.default_rng(0)
    drawn = [recipe_batch(split, rng.permutation(len(split))[:64]) for _ in range(batches + 1)]
    torch.manual_seed(0)
    encoder = system(store, size).recipe_encoder

    def steps(bfloat16: bool, run):
        feed = iter(drawn)

        def step() -> None:
            encoder.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                embedding = run(next(feed))
            embedding.float().square().sum().backward()

        return step

    with torch.no_grad():
        encoder.eval()
        torch.testing.assert_close(encoder(drawn[0]).embedding, padded(encoder, drawn[0]), rtol=1e-5, atol=1e-5)
        encoder.train()
    ours = {"packed, float32": False, "packed, bfloat16": True}
    works = {"padded, float32": steps(False, lambda recipes: padded(encoder, recipes))}
    works |= {name: steps(low, lambda recipes: encoder(recipes).embedding) for name, low in ours.items()}
    seconds = side_by_side(works, batches, clock)
    base = seconds["padded, float32"]
    return [
        {"size": size, "step of 64 recipes": name, "seconds": median, "speed": f"{base / median:.1f} x"}
        for name, median in seconds.items()
    ]


def tokens(split: Split, batches: int) -> dict:
    """Medians over batches of 64 recipes."""
    rng, counts = np.random.default_rng(0), []
    for _ in range(batches):
        recipes = recipe_batch(split, rng.permutation(len(split))[:64])
        length = (recipes.tokens != 0).sum(1)
        rows = [getattr(recipes, name) for name in COMPONENTS]
        real = [row[row >= 0] for row in rows]
        distinct = sum(int(length[row.unique()].sum()) for row in real)
        counts.append([sum(g.numel() for g in grids(recipes)), sum(int(length[row].sum()) for row in real), distinct])
    grid, every, own = np.median(counts, 0)
    return {
        "places of the grid": int(grid),
        "tokens": int(every),
        "of distinct sentences": int(own),
        "grid / tokens": grid / every,
    }


def system(store: Store, size: str) -> System:
    return build(
        SystemConfig(store.card["vocabulary"], len(store.classes.names), image_model="test_resnet", **SIZES[size])
    )


def extraction(store: Store, size: str, runs: int, clock) -> dict:
    split, model = store.split("train"), system(store, size).eval()
    batches = [np.arange(len(split))[i : i + 256] for i in range(0, len(split), 256)]

    @torch.inference_mode()
    def batch_by_batch() -> Tensor:
        return torch.cat([model.encode_recipes(recipe_batch(split, rows)).embedding for rows in batches])

    torch.testing.assert_close(encode_recipes(model, split), batch_by_batch(), rtol=1e-5, atol=1e-5)
    lines = np.concatenate(
        [r + 1 + np.arange(n) for r, n in zip(split.recipe_start, split.ingredient_lines, strict=False)]
    )
    seconds = side_by_side({"batches": batch_by_batch, "whole": lambda: encode_recipes(model, split)}, runs, clock)
    return {
        "size": size,
        "recipes": len(split),
        "ingredient lines": len(lines),
        "distinct": sum(map(len, distinct_sentences(split, lines, 1 << 14)[0])),
        "batches of 256, s": seconds["batches"],
        "each sentence once, s": seconds["whole"],
        "speed": f"{seconds['batches'] / seconds['whole']:.2f} x",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/recipe1m_layout"))
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--one-core", action="store_true")
    args = parser.parse_args()
    clock = time.perf_counter
    if args.one_core:
        torch.set_num_threads(1)
        clock = time.process_time
    with tempfile.TemporaryDirectory() as temporary:
        config = StoreConfig(64, ingredient_classes=60)
        prepare(cook(KitchenConfig(train=1000, val=50, test=50, image_size=64)), Path(temporary, "kitchen"), config)
        stores = dict.fromkeys(SIZES, Store(Path(temporary, "kitchen")))
        if args.data.is_dir():
            prepare(read_recipe1m(args.data)[0], Path(temporary, "real"), config)
            stores["H-T"] = Store(Path(temporary, "real"))
        else:
            print(f"{args.data} is not here: recipes of the kitchen in place of real ones")
        counted = [{"size": size} | tokens(store.split("train"), args.batches) for size, store in stores.items()]
        print(table(counted), flush=True)
        steps = [row for size, store in stores.items() for row in training(store, size, args.batches, clock)]
        print("\n" + table(steps), flush=True)
        print(
            "\n" + table([extraction(store, size, max(1, args.batches // 2), clock) for size, store in stores.items()])
        )


if __name__ == "__main__":
    main()
