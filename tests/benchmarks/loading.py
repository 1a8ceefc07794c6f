"""Batches from the store against a straightforward loader of single items: same recipes, same crops, one process each.

    python -m tests.benchmarks.loading [--data ../shared/data/recipe1m_layout] [--rounds 5]

The straightforward loader does what the released code of the field does: it opens, resizes and crops each photo and
tokenises every sentence at every epoch, and pads recipes to a grid. Rounds alternate; the table shows medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from recipe_lib.data.loading import PairedBatches, StudyDataset, loader
from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.recipe import Recipe
from recipe_lib.data.store import Store
from recipe_lib.kitchen.model import KitchenConfig, cook
from recipe_lib.sources.recipe1m import read_recipe1m
from tests.layouts import write_recipe1m

BATCH = 64


class Items(Dataset):
    """One recipe per item, everything made anew."""

    def __init__(self, recipes: list[Recipe], tokenizer):
        self.recipes, self.tokenizer = recipes, tokenizer
        steps = [v2.Resize(256), v2.RandomCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.recipes)

    def __getitem__(self, index: int):
        recipe = self.recipes[index]
        with Image.open(recipe.images[0]) as image:
            photo = self.transform(image.convert("RGB"))
        sentences = [self._ids([recipe.title]), self._ids(recipe.ingredients), self._ids(recipe.instructions)]
        return photo, sentences

    def _ids(self, sentences: list[str]) -> list[list[int]]:
        return [
            self.tokenizer.encode(text, add_special_tokens=False).ids[:15] or [1] for text in sentences[:20] or [""]
        ]


def collate(items):
    photos = torch.stack([photo for photo, _ in items])
    grids = []
    for field in range(3):
        recipes = [sentences[field] for _, sentences in items]
        grid = torch.zeros(
            len(recipes), max(map(len, recipes)), max(len(s) for r in recipes for s in r), dtype=torch.long
        )
        for i, recipe in enumerate(recipes):
            for j, sentence in enumerate(recipe):
                grid[i, j, : len(sentence)] = torch.tensor(sentence)
        grids.append(grid)
    return photos, grids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/recipe1m_layout"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        data = args.data
        if not data.is_dir():
            print(f"{data} is not here: dishes of the kitchen, 224 pixels, instead of photos")
            data = Path(temporary, "kitchen")
            kitchen = KitchenConfig(train=600, val=50, test=50, image_size=224)
            splits = {"train": "train", "val": "val", "iid": "test"}
            write_recipe1m((replace(r, split=splits[r.split]) for r in cook(kitchen) if r.split in splits), data)
        folder = Path(temporary, "store")
        began = time.perf_counter()
        recipes = list(read_recipe1m(data)[0])
        prepare(recipes, folder, StoreConfig(256, 3, 20))
        seconds = time.perf_counter() - began
        photos = sum(len(r.images) for r in recipes)
        print(f"prepared once: {len(recipes)} recipes with {photos} photos, {photos / seconds:.0f} photos/s")
        store = Store(folder)
        split = store.split("train")
        wanted = {id_: i for i, id_ in enumerate(split.ids)}
        ours = loader(StudyDataset(split, 224, augment=True), PairedBatches(len(split), BATCH))
        items = Items([r for r in recipes if r.id in wanted], store.tokenizer)
        plain = DataLoader(items, BATCH, shuffle=True, collate_fn=collate, drop_last=True)
        rates: dict[str, list[float]] = {"straightforward": [], "store": []}
        for round_ in range(args.rounds + 1):
            for name, batches in (("straightforward", plain), ("store", ours)):
                began, count = time.perf_counter(), 0
                for batch in batches:
                    count += len(batch[0]) if isinstance(batch, list | tuple) else len(batch.rows)
                if round_:  # the first round warms the caches
                    rates[name].append(count / (time.perf_counter() - began))
    print("| loader | pairs/s, one process | |\n|---|---|---|")
    base = statistics.median(rates["straightforward"])
    for name, own in rates.items():
        print(f"| {name} | {statistics.median(own):.0f} | {statistics.median(own) / base:.1f} x |")


if __name__ == "__main__":
    main()
