"""The papers' training steps on an NVIDIA GPU: speed and memory against the released way, the loader's share, ranks.

    ./run_all.sh bench gpu      or      python -m tests.benchmarks.gpu [--only steps systems loader devices ranks]

What is measured is `training_step` of the study's own TrainingTask, under its own Trainer, at the sizes of
params/recipe1m.yaml and params/methods/<name>_recipe1m.yaml, on random photos and recipes as long as Recipe1M's. Each
row is a process of its own; its error, if it has one, stands in the row. Seconds are between synchronised ends of
rounds of steps, the first round left out; the median of rounds is given. The table goes to outputs/bench/gpu.md.

"As released": weights and photos NCHW, torch's default optimizer, every recipe padded, cuDNN free to choose; of DAR a
tower for each encoder, and segments encoded at every step (`recipe_encoder`, `dar_step`). All parts of a system train
from the first step on: what JE, AdaMine and R2GAN freeze for some epochs costs less then.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from recipe_lib import devices
from recipe_lib.data.loading import Batch, PairedBatches, RecipeBatch, Sentences, StudyDataset, loader, recipe_batch
from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.store import Store
from recipe_lib.data.text import END, START
from recipe_lib.encoders.image import ImageEncoder
from recipe_lib.encoders.recipe import RecipeEncoder
from recipe_lib.kitchen.model import KitchenConfig, cook
from recipe_lib.paths import atomic_write_text, repo_root, study_dir
from recipe_lib.retrieval.metrics import cross_modal_ranks
from recipe_lib.runner.params import declared, load
from recipe_lib.systems.base import System, SystemConfig
from recipe_lib.systems.registry import build
from recipe_lib.training.fit import TrainingConfig, TrainingTask, make_trainer, train
from tests.benchmarks import side_by_side, table
from tests.benchmarks.dar_step import PaddedRecipeEncoder, plain_text
from tests.benchmarks.ranks import bare, world
from tests.benchmarks.recipe_encoder import padded_components

VOCABULARY, CLASSES, CATEGORIES = 16_000, 500, 1047  # of Recipe1M, as the tests of the papers' sizes have them
CLIP_START = 49_406  # CLIP's end is the next one, the highest of its ids
RESIDENT = 4  # batches that lie on the GPU and take turns


@dataclass(frozen=True)
class Case:
    """One row of the steps.

    Args:
        method: a file of params/methods; "" for H-T with ResNet-50.
        options: parameters in place of those of the files.
        released: the step as the released code takes it.
        contiguous: photos and weights of the backbone NCHW.
        unfused: torch's default optimizer.
        free: kernels need not give the same digits twice, and cuDNN may try which is fastest.
        compiled: photos go through torch.compile with `backend`. The recipe encoder does not: one code serves all its
            transformers with tables of several kinds, and dynamo gives up after 8 versions of it.
        text_only: the step of twice as many recipes without a photo that follows each paired one.
        may_fail: an error is a finding, such as too little memory; of any other row the benchmark fails.
    """

    name: str
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    released: bool = False
    contiguous: bool = False
    unfused: bool = False
    free: bool = False
    compiled: bool = False
    backend: str = "inductor"
    text_only: bool = False
    may_fail: bool = False


FP32 = {"precision": "32-true"}
# Within a group rows are held against the first.
GROUPS: dict[str, list[Case]] = {
    "steps: H-T": [
        Case("as released, AMP", released=True),
        Case("as released, float32", released=True, options=FP32),
        Case("the study"),
        Case("the study, float32", options=FP32),
        Case("without channels_last", contiguous=True),
        Case("optimizer not fused", unfused=True),
        Case("not deterministic", free=True),
        Case("backbone compiled", compiled=True, may_fail=True),
        Case("the step of text-only recipes", text_only=True),
    ],
    "steps: DAR": [
        Case("as released, AMP", "dar", released=True),
        Case("as released, float32", "dar", released=True, options=FP32, may_fail=True),
        Case("the study", "dar"),
        Case("optimizer not fused", "dar", unfused=True),
        Case("not deterministic", "dar", free=True),
        Case("photo encoder compiled", "dar", compiled=True, may_fail=True),
    ],
    "steps: TNLBT, 1,024 pairs": [
        Case("64 encoded at a time", "tnlbt"),
        Case("256 encoded at a time", "tnlbt", options={"chunk": 256}),
        Case("all at once", "tnlbt", options={"chunk": 0}, may_fail=True),
    ],
    "systems": [
        Case("JE", "je"),
        Case("AdaMine", "adamine"),
        Case("R2GAN", "r2gan"),
        Case("ACME", "acme"),
        Case("TNLBT, margins and decoder", "tnlbt_margins_decoder"),
        Case("H-T, ViT-B/16", "ht_vit"),
    ],
}


# ---- a system and its batches ----


def parameters(case: Case) -> dict[str, Any]:
    """What a run of the case's parameter files would be given, all parts training from the first step on."""
    names = ["recipe1m", f"methods/{case.method}", f"methods/{case.method}_recipe1m"]
    files = [path for name in names if (path := repo_root() / f"params/{name}.yaml").is_file()]
    values = load(files, [], declared(sorted((repo_root() / "notebooks").glob("0[1-5]_*.ipynb"))))
    return values | {"frozen_epochs": 0, "alternate": []} | case.options


def make_system(case: Case, values: dict[str, Any], **facts: Any) -> System:
    """With random weights, which cost what trained ones do."""
    facts = {"vocabulary": VOCABULARY, "num_classes": CLASSES, "num_categories": CATEGORIES} | facts
    facts["num_categories"] *= bool(values["categories"])
    described = values["description_encoder"] if values["descriptions"] else ""
    torch.manual_seed(0)
    system = build(SystemConfig.gather(values, pretrained=False, descriptions=described, **facts)).train()
    if case.released:
        dar_as_released(system) if case.method == "dar" else pad_recipes(system.recipe_encoder)
    if (case.contiguous or case.released) and isinstance(system.image_encoder, ImageEncoder):
        without_channels_last(system.image_encoder)
    if case.compiled:
        photos = system.image_encoder
        photos.features = torch.compile(photos.features, backend=case.backend)
    return system


def pad_recipes(encoder: RecipeEncoder) -> None:
    """H-T's recipe encoder reads every place of a padded grid from now on."""
    encoder.forward = lambda recipes: encoder.embed(padded_components(encoder, recipes))


def without_channels_last(encoder: ImageEncoder) -> None:
    """Weights and photos of the backbone are NCHW from now on."""
    encoder.backbone.to(memory_format=torch.contiguous_format)
    encoder.features = lambda images: encoder.backbone.forward_features((images - encoder.mean) / encoder.std)


def dar_as_released(system: System) -> None:
    """A tower for each encoder, padded recipes and descriptions; segments are given as pixels."""
    for encoder in (system.description_encoder, system.segment_encoder):
        encoder.add_module("own", copy.deepcopy(encoder.tower))
        object.__setattr__(encoder, "tower", encoder.own)
    described = system.description_encoder
    described.forward = lambda tokens: plain_text(described.tower, tokens, described.adapters)
    system.recipe_encoder.__class__ = PaddedRecipeEncoder
    system.recipe_encoder.separate()


def random_recipes(count: int, values: dict[str, Any], vocabulary: int, rng: np.random.Generator) -> RecipeBatch:
    """About 9 ingredient lines of 5 words and 9 steps of 13 words per recipe, as in Recipe1M; no two alike."""
    clip, most = values["text_tokens"] == "clip", values["max_tokens"]
    first, start, end, words = (1, CLIP_START, CLIP_START + 1, CLIP_START) if clip else (4, START, END, vocabulary)

    def sentences(number: int, mean: int) -> list[list[int]]:
        lengths = np.minimum(rng.integers(mean // 2, 2 * mean, number), most - 2)
        return [[start, *rng.integers(first, words, length), end] for length in lengths]

    lines, steps = rng.integers(4, 15, (2, count))
    named = values["text_tokens"] == "names"  # a line is one token
    made = []
    for i, k in zip(lines, steps, strict=True):
        ingredients = sentences(i, 5) if not named else [[start, rng.integers(first, words), end] for _ in range(i)]
        made.append([*sentences(1, 4), *ingredients, *sentences(k, 13)])
    return recipe_batch(Sentences.of(made, lines), np.arange(count))


def random_batch(case: Case, system: System, values: dict[str, Any], seed: int) -> Batch:
    """What the system reads, on its device."""
    rng, config, size = np.random.default_rng(seed), system.config, values["crop_size"]
    count, device = values["batch_size"], next(system.parameters()).device

    def photos(*shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, 256, (*shape, 3, size, size), np.uint8))

    if case.text_only:
        recipes = random_recipes(2 * count, values, config.vocabulary, rng)
        return Batch(recipes, torch.arange(2 * count)).to(device)
    labels = torch.from_numpy(rng.random((count, config.num_classes)) < 9 / config.num_classes).float()
    recipes = random_recipes(count, values, config.vocabulary, rng)
    batch = Batch(recipes, torch.arange(count), photos(count), labels)
    if "category" in system.reads:  # half of a batch are two of a kind
        batch.category = torch.arange(count) // 2 % config.num_categories
        batch.category[count // 2 :] = -1
    if "descriptions" in system.reads:
        said = torch.zeros(count, 77, dtype=torch.int64)
        said[:, 1:31] = torch.from_numpy(rng.integers(1, CLIP_START, (count, 30)))  # words
        said[:, 0], said[:, 31] = CLIP_START, CLIP_START + 1
        batch.descriptions = said if case.released else said[:, :32]
    if "segments" in system.reads:
        number = values["segments"]
        batch.segment_mask = torch.ones(count, number, dtype=torch.bool)
        pixels = photos(count, number)
        if case.released:
            batch.segments = pixels
        else:  # once and for all, before training
            with torch.no_grad():
                read = [system.segment_encoder.features(part.to(device)) for part in pixels.flatten(0, 1).split(count)]
            batch.segments = torch.cat(read).unflatten(0, (count, number))
    return batch.to(device)


# ---- a step, many times ----


class Again:
    """Some batches in turn, so many times in all."""

    def __init__(self, batches: Sequence[Batch], steps: int):
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        return (self.batches[i % len(self.batches)] for i in range(self.steps))


class Stopwatch(Callback):
    """Seconds of a step: between the ends of rounds of so many steps, when the GPU has done all it was told."""

    def __init__(self, steps: int):
        self.steps, self.stamps = steps, []

    def on_train_batch_end(self, trainer: L.Trainer, task: TrainingTask, _: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.steps == 0:
            synchronise()
            self.stamps.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """The median; the first round, before the first stamp, warms up."""
        return median(b - a for a, b in pairwise(self.stamps)) / self.steps


class Unfused(TrainingTask):
    """With torch's default optimizer of the same kind."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        same = ("lr", "betas", "weight_decay")
        return [
            type(optimizer)(optimizer.param_groups[0]["params"], **{name: optimizer.defaults[name] for name in same})
            for optimizer in super().configure_optimizers()
        ]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gb() -> float | str:
    """Highest memory of tensors on the GPU since the last reset."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else ""


def as_in_training(free: bool) -> None:
    """The switches that `fit` sets, so that kernels cost what they cost in the study."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(not free, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = free


def run_steps(task: TrainingTask, feed: Any, steps: int) -> tuple[float, dict[str, float]]:
    """Seconds of a step of an epoch of `feed`, in rounds of `steps`; the epoch's mean losses."""
    watch = Stopwatch(steps)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        # The second callback keeps Lightning from writing a checkpoint of its own.
        trainer = make_trainer(task.config, Path(folder), [watch, ModelCheckpoint(save_top_k=0)])
        trainer.fit(task, feed)
    return watch.seconds, {name: float(value) for name, value in trainer.callback_metrics.items()}


def measure(case: Case, steps: int, rounds: int) -> dict[str, Any]:
    """One row of the steps."""
    as_in_training(case.free or case.released)
    if case.compiled:  # past the limit dynamo would go on without compiling and say nothing
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    values = parameters(case)
    system = make_system(case, values).to(devices.device())
    batches = [random_batch(case, system, values, seed) for seed in range(RESIDENT)]
    config = TrainingConfig.gather(values, epochs=1)
    task = (Unfused if case.unfused or case.released else TrainingTask)(system, config)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = run_steps(task, Again(batches, steps * (rounds + 1)), steps)
    rows = len(batches[0].rows)
    return {
        "batch": rows, "precision": config.precision, "ms per step": 1000 * seconds, "pairs/s": rows / seconds,
        "peak GB": peak_gb(), "losses": losses,
    }  # fmt: skip


# ---- the loader, and several devices ----


def kitchen_store(folder: Path, photos: int, values: dict[str, Any]) -> Store:
    """Dishes of the kitchen, stored as the parameter file says."""
    kitchen = KitchenConfig(train=photos, val=64, test=16, image_size=min(224, max(64, values["image_size"])), seed=1)
    names = ("image_size", "max_sentences", "max_tokens", "text_tokens", "image_filter", "jpeg_quality")
    prepare(cook(kitchen), folder, StoreConfig(ingredient_classes=20, **{name: values[name] for name in names}))
    return Store(folder)


def measure_loader(case: Case, photos: int, steps: int, rounds: int, folder: Path) -> dict[str, Any]:
    """A step on batches that lie on the GPU, and one on those that the study's loader decodes meanwhile."""
    as_in_training(False)
    values = parameters(case)
    store = kitchen_store(folder / "data", photos, values)
    split, config = store.split("train"), TrainingConfig.gather(values, epochs=1)
    dataset = StudyDataset(split, config.crop_size, augment=True, seed=config.seed)
    every = []  # epoch after epoch: to start the workers anew for each is no part of a step
    for epoch in range(-(-steps * (rounds + 1) * config.batch_size // len(split)) + 1):
        order = PairedBatches(len(split) // config.batch_size * config.batch_size, config.batch_size, seed=config.seed)
        order.set_epoch(epoch)
        every.append(list(order))
    draws = list(islice(chain(*every), steps * (rounds + 1)))
    feed = loader(dataset, draws, config.num_workers)
    facts = {"vocabulary": store.card["vocabulary"], "num_classes": len(store.classes.names)}

    def task() -> TrainingTask:
        return TrainingTask(make_system(case, values, **facts).to(devices.device()), config)

    resident = [dataset[draw].to(devices.device()) for draw in draws[:RESIDENT]]
    own, _ = run_steps(task(), Again(resident, len(draws)), steps)
    fed, _ = run_steps(task(), feed, steps)
    start = time.perf_counter()
    alone = sum(len(batch.rows) for batch in loader(dataset, draws, config.num_workers))
    alone /= time.perf_counter() - start
    return {
        "batch": config.batch_size, "workers": config.num_workers, "cores": len(os.sched_getaffinity(0)),
        "KB per photo": float(np.mean([len(split.photo(row)) for row in range(min(64, len(split)))])) / 1000,
        "ms per step, on the GPU": 1000 * own, "ms per step, loaded": 1000 * fed, "GPU busy": own / fed,
        "loader alone, photos/s": alone,
    }  # fmt: skip


def measure_devices(case: Case, photos: int, number: int, folder: Path) -> dict[str, Any]:
    """An epoch of the study's own `train` on so many devices, under torchrun where they are several."""
    values = parameters(case)
    store = kitchen_store(folder / "data", photos, values)
    config = TrainingConfig.gather(values, epochs=2, devices=number, num_nodes=1, checkpoint_minutes=0.0)
    facts = {"vocabulary": store.card["vocabulary"], "num_classes": len(store.classes.names)}
    history = train(make_system(case, values, **facts), store, config, folder / "training")
    pairs = len(store.split("train")) // config.batch_size * config.batch_size
    seconds = float(history["seconds"].iloc[-1])  # the first epoch starts the workers and warms up
    return {"devices": number, "batch": config.batch_size, "s per epoch": seconds, "pairs/s": pairs / seconds}


# ---- ranks ----


def measure_ranks(kind: str, n: int, d: int, runs: int) -> dict[str, Any]:
    """Exact ranks in both directions against the float32 product alone, both on the device."""
    images, recipes = (side.to(devices.device()) for side in world(kind, n, d))

    def product() -> None:
        bare(images, recipes)
        synchronise()

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    works = {"product": product, "ranks": partial(cross_modal_ranks, images, recipes)}  # ranks come back to the CPU
    seconds = side_by_side(works, runs)
    row = {"embeddings": kind, "N": n, "D": d} | {f"{name} s": s for name, s in seconds.items()}
    return row | {"ratio": seconds["ranks"] / seconds["product"], "peak GB": peak_gb()}


# ---- rows, each in a process of its own ----

WORKS = {"steps": measure, "loader": measure_loader, "devices": measure_devices, "ranks": measure_ranks}


def child(work: str, given: dict[str, Any]) -> None:
    """Do one row's work, and print it as JSON, or its error."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if "case" in given:
        given["case"] = Case(**given["case"])
    try:
        with tempfile.TemporaryDirectory() as folder:
            more = {"folder": Path(folder)} if work in ("loader", "devices") else {}
            row = WORKS[work](**given, **more)
    except Exception as error:  # whatever it is, it is the row
        row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    print(json.dumps(row))


def row_of(work: str, **given: Any) -> dict[str, Any]:
    """A row from a process of its own; one that was killed has an error too."""
    if "case" in given:
        given["case"] = asdict(given["case"])
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--child", work, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "nothing was said").splitlines()[-1]
        return {"error": f"exit status {done.returncode}: {said[:160]}"}
    return json.loads(done.stdout.splitlines()[-1])


class Report:
    """Tables that are printed row by row and kept in a file; rows that failed and should not have."""

    def __init__(self, path: Path):
        self.path, self.parts, self.failed = path, [], []

    def machine(self) -> None:
        cuda = torch.cuda.get_device_properties(0)
        self._say(
            f"{cuda.name}, {cuda.total_memory / 1e9:.0f} GB, {torch.cuda.device_count()} of them, "
            f"{len(os.sched_getaffinity(0))} cores; torch {torch.__version__}, CUDA {torch.version.cuda}"
        )

    def section(self, title: str, rows: list[tuple[dict, dict, bool]]) -> None:
        """A table of (what the row is, what was measured or an error, whether it may fail)."""
        known = dict.fromkeys(key for _, found, _ in rows for key in found if key not in ("losses", "error"))
        lines = []
        for what, found, may_fail in rows:
            lines.append(what | {key: found.get(key, "-") for key in known} | {"error": found.get("error", "")})
            if "error" in found and not may_fail:
                self.failed.append(f"{title}, {' '.join(map(str, what.values()))}")
        if not any(line["error"] for line in lines):
            lines = [{key: value for key, value in line.items() if key != "error"} for line in lines]
        self._say(f"### {title}\n\n{table(lines)}")

    def _say(self, text: str) -> None:
        print(f"\n{text}", flush=True)
        self.parts.append(text)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.path, "\n\n".join(self.parts) + "\n")


def steps_section(report: Report, group: str, cases: Sequence[Case], steps: int, rounds: int) -> None:
    """A group's rows; those of one system are held against the first."""
    rows: list[tuple[dict, dict, bool]] = []
    for case in cases:
        found = row_of("steps", case=case, steps=steps, rounds=rounds)
        if group != "systems" and "error" not in found and "error" not in (first := rows[0][1] if rows else found):
            found["speed"] = f"{found['pairs/s'] / first['pairs/s']:.2f} x"
        print(f"{group}: {case.name}: {found}", file=sys.stderr, flush=True)
        rows.append(({"step": case.name}, found, case.may_fail))
    report.section(group, rows)


SECTIONS = ("steps", "systems", "loader", "devices", "ranks")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the tables. SystemExit 1 where there is no GPU, or a row failed that should not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--steps", type=int, default=8, help="of a round")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is given, after one more")
    parser.add_argument("--photos", type=int, default=4096, help="of the loader's store")
    parser.add_argument("--ranks", type=int, nargs=2, default=[50_000, 1024], metavar=("N", "D"))
    parser.add_argument("--out", type=Path, default=study_dir("bench") / "gpu.md")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        child(given.child[0], json.loads(given.child[1]))
        return
    if devices.device() != "cuda":
        sys.exit("bench gpu needs an NVIDIA GPU; there is none")
    report, how = Report(given.out.resolve()), {"steps": given.steps, "rounds": given.rounds}
    report.machine()
    for group, cases in GROUPS.items():
        if group.partition(":")[0] in given.only:
            steps_section(report, group, cases, **how)
    ht = Case("H-T")
    if "loader" in given.only:
        found = row_of("loader", case=ht, photos=given.photos, **how)
        report.section("The loader's share (goal: GPU busy .95)", [({"system": "H-T"}, found, False)])
    if "devices" in given.only and torch.cuda.device_count() > 1:
        rows = [({}, row_of("devices", case=ht, photos=given.photos, number=n), False) for n in (1, 2)]
        report.section("The study's training on several GPUs", rows)
    elif "devices" in given.only:
        print("\none GPU: the step under DDP is not measured", flush=True)
    if "ranks" in given.only:
        n, d = given.ranks
        rows = [
            ({}, row_of("ranks", kind=k, n=n, d=d, runs=given.rounds), False) for k in ("trained", "middling", "weak")
        ]
        report.section("Exact ranks against the float32 product, on the GPU", rows)
    print(f"\n{report.path}")
    if report.failed:
        sys.exit(f"not measured: {'; '.join(report.failed)}")


if __name__ == "__main__":
    main()
