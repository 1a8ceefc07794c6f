"""What frozen encoders know already: a ridge regression from photo to recipe features, against trained studies.

    python -m tests.benchmarks.pretrained [--data real_recipes epicurious] [--limit 300] [--study NAME ...]

Between the features that a study with frozen encoders trains on (`params/cookbook_pretrained.yaml`, and the real photos
of `params/evidence_epicurious.yaml`): of each training photo its views, pooled as the backbone pools; of a recipe the
mean sentence vectors of title, ingredients and steps, each of length 1, side by side. Candidates are ranked by the
cosine, from the training mean. `alpha` is chosen on validation, by photo to recipe R@10, and so is a study's
checkpoint: compare on the test split. With `--study` the ridge stands on that finished study's own data, encoders and
candidates, beside its baseline and variants. Data and features stay in outputs/bench and outputs/frozen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import Tensor

from recipe_lib.data.loading import StudyDataset
from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.recipe import DataError
from recipe_lib.data.store import Split, Store, study_store
from recipe_lib.encoders.captions import ZeroShotEncoder
from recipe_lib.encoders.recipe import RecipeFeatures
from recipe_lib.encoders.sentence import SentenceRecipeEncoder, sentence_tokenizer
from recipe_lib.evaluation.scores import encode, encode_recipes, score
from recipe_lib.kitchen.model import KitchenConfig
from recipe_lib.paths import repo_root, resolve, study_dir
from recipe_lib.retrieval.metrics import evaluate
from recipe_lib.runner.params import ParamsError, declared, load
from recipe_lib.sources.read import read_source
from recipe_lib.systems.base import System, SystemConfig
from recipe_lib.systems.registry import build
from recipe_lib.systems.saving import load_system
from recipe_lib.training.fit import TrainingConfig, load_training
from recipe_lib.training.frozen_features import with_features
from tests.benchmarks import table

FILES = {"real_recipes": "params/cookbook_pretrained.yaml", "epicurious": "params/evidence_epicurious.yaml"}
ALPHAS = tuple(10.0**k for k in range(0, 7))


class MeanSentences(SentenceRecipeEncoder):
    """What the frozen reader says of a recipe, and nothing that is learnt: (B, 3 E)."""

    join_sentences = ZeroShotEncoder.join_sentences

    def embed(self, components: Sequence[Tensor]) -> RecipeFeatures:
        return RecipeFeatures(torch.cat([F.normalize(part, dim=1) for part in components], 1), tuple(components))


@torch.inference_mode()
def photo_features(system: System, split: Split, training: TrainingConfig, augment: bool) -> Tensor:
    """(N, views, C): the study's own frozen features of a split, pooled; one centre crop where not `augment`."""
    options = {"policy": training.augment, "first_photo_only": training.first_photo_only} if augment else {}
    dataset = StudyDataset(split, training.crop_size, augment=augment, **options)
    maps = with_features(system, dataset, training.precision if augment else "32-true").features[0]
    backbone = system.image_encoder.backbone.cpu().eval()
    pooled = [
        backbone.forward_head(torch.tensor(maps[start : start + 64]).float().flatten(0, 1), pre_logits=True)
        for start in range(0, len(maps), 64)
    ]
    return torch.cat(pooled).unflatten(0, maps.shape[:2])


def recipe_features(system: System, split: Split) -> Tensor:
    """(N, 3 E)."""
    system.recipe_encoder.__class__ = MeanSentences
    return encode_recipes(system, split, told=True)


Sides = tuple[Tensor, Tensor]  # photos (N, D) and recipes (N, E), row for row


def ridge(train: Sides, val: Sides, others: dict[str, Sides]) -> tuple[float, dict[str, Sides]]:
    """Photo to recipe features by ridge regression.

    Args:
        train: (N, C) features of photos, of unlike scales, and of their recipes (N, E).
        val: chooses alpha.
        others: splits by name.

    Returns:
        alpha, and by split what is ranked: (N, E) predicted and true recipe features, from the training mean.
    """
    mean, scale, centre = train[0].mean(0), train[0].std(0).clamp(min=1e-6), train[1].mean(0)

    def ranked(model: Ridge, photos: Tensor, recipes: Tensor) -> Sides:
        told = torch.from_numpy(model.predict(((photos - mean) / scale).numpy()))
        return told.float() - centre, recipes - centre

    def merit(sides: Sides) -> tuple[float, float]:
        found = evaluate(*sides, candidates=len(sides[0]))[0]
        return found["recall_10"], -found["medr"]

    models = {a: Ridge(alpha=a).fit(((train[0] - mean) / scale).numpy(), train[1].numpy()) for a in ALPHAS}
    alpha = max(ALPHAS, key=lambda a: merit(ranked(models[a], *val)))
    return alpha, {name: ranked(models[alpha], *sides) for name, sides in others.items()}


def rows(what: str, split: str, sides: Sides, candidates: Sequence[int]) -> Iterator[dict]:
    """Photo to recipe, in the whole split and in ten bags of each size."""
    for row in score({"system": what, "split": split}, *sides, candidates=candidates, bags=10, seed=0)[0]:
        if row["direction"] == "i2r":
            keys = ("system", "split", "candidates", "recall_1", "recall_10", "medr")
            yield {key: row[key] for key in keys}


def compare(
    system: System, training: TrainingConfig, store: Store, trained: dict[str, Path], sizes: Sequence[int]
) -> None:
    """Print the ridge on all but the training split, and the trained systems on the same candidates.

    Args:
        system: with the frozen encoders; its recipe encoder is changed.
        trained: folders of finished trainings, by name.
    """
    splits = {name: store.split(name) for name in ("val", *store.test_splits)}
    lines = {}
    for name, folder in trained.items():
        model = load_system(folder)
        for split in splits.values():
            encoded = encode(model, split, crop=training.crop_size)
            sides = encoded.embedding + encoded.z, encoded.recipes
            lines.setdefault(split.name, []).extend(rows(name, split.name, sides, sizes))
    pairs = store.split("train")
    views = photo_features(system, pairs, training, augment=True)
    train = views.flatten(0, 1), recipe_features(system, pairs).repeat_interleave(views.shape[1], 0)
    sides = {
        name: (photo_features(system, split, training, augment=False)[:, 0], recipe_features(system, split))
        for name, split in splits.items()
    }
    alpha, ranked = ridge(train, sides["val"], sides)
    print(f"{len(pairs)} training pairs, {views.shape[1]} views of each photo; ridge: alpha {alpha:g}\n")
    every = [line for name in splits for line in (*rows("ridge", name, ranked[name], sizes), *lines.get(name, []))]
    print(f"{table(every)}\n", flush=True)


def of_data(name: str, values: dict[str, Any], limit: int | None) -> tuple[System, TrainingConfig, Store]:
    """The pairs of a folder, or the first `limit` of them, read and prepared as its parameter file says."""
    own = {"val": values["val_share"], "test": values["test_share"], "ingredients": values["ingredients_field"]}
    recipes, _ = read_source(values["source"], values["source_dir"], KitchenConfig(), **own)
    pairs = islice((recipe for recipe in recipes if recipe.images), limit)
    folder = study_dir("bench") / f"pretrained-{name}{limit or ''}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    kept = {f.name: values[f.name] for f in fields(StoreConfig)} | {"ingredient_classes": 1}  # labels are not read
    prepare(pairs, folder, StoreConfig(**kept), tokenizer=sentence_tokenizer(values["sentence_model"]))
    store = Store(folder)
    system = build(SystemConfig.gather(values, vocabulary=store.card["vocabulary"], num_classes=1))
    # No study shares these features, and without units for bfloat16 a CPU takes 15 times as long in it.
    return system, TrainingConfig.gather(values, precision="32-true"), store


def of_study(study: str) -> tuple[System, TrainingConfig, Store, dict[str, Path]]:
    """A finished study with frozen encoders, and the folders of what it trained.

    Raises:
        ValueError: it has none.
    """
    folder = study_dir(study)
    trained = {"baseline": folder / "02_baseline_training"}
    system, training = load_system(trained["baseline"]), load_training(trained["baseline"])
    if not system.config.frozen_views or not isinstance(system.recipe_encoder, SentenceRecipeEncoder):
        raise ValueError(f"study {study}: its encoders are not frozen (frozen_views, sentence_model): no ridge")
    later = sorted((folder / "04_debiasing_training").glob("*/history.csv"))
    return system, training, study_store(study), trained | {path.parent.name: path.parent for path in later}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is here; a line for what is not. SystemExit 1 for a study that has no frozen encoders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", choices=[*FILES, []], default=list(FILES))
    parser.add_argument("--limit", type=int, help="pairs of each, the first ones; default: all")
    parser.add_argument("--study", nargs="*", default=[], help="finished studies with frozen encoders, by name")
    parser.add_argument("--candidates", type=int, nargs="*", default=[100, 180, 500], help="of bags, besides the split")
    given = parser.parse_args(arguments)
    schema = declared(sorted((repo_root() / "notebooks").glob("0*.ipynb")))
    for name in given.data:
        try:
            values = load([resolve(FILES[name])], [], schema)
            if not resolve(values["source_dir"]).is_dir():
                raise ParamsError(f"{values['source_dir']} is not here")
        except ParamsError as error:  # a package with weights, or the folder, is not on this machine
            print(f"{name} is left out: {error}", flush=True)
            continue
        print(f"### {name}\n", flush=True)
        compare(*of_data(name, values, given.limit), {}, given.candidates)
    for study in given.study:
        try:
            found = of_study(study)
        except (ValueError, DataError, OSError) as error:
            sys.exit(f"pretrained: {error}")
        print(f"### the study {study}\n", flush=True)
        compare(*found, given.candidates)


if __name__ == "__main__":
    main()
