"""Benchmarks that no test can run at their size: every row of `bench gpu`, small; the ridge of `bench pretrained`."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from recipe_lib import devices
from recipe_lib.evaluation.scores import encode
from recipe_lib.retrieval.metrics import evaluate
from recipe_lib.systems.registry import build
from recipe_lib.systems.saving import load_system
from recipe_lib.training.fit import TrainingConfig, train
from tests.benchmarks import gpu, pretrained, scale
from tests.benchmarks.gpu import GROUPS, Case

ROOT = Path(__file__).parents[1]
GAME = ["picture: 16", "channels: 4", "code: 8", "noise: 4"]
ARGS = {
    "je": ["instruction_dim: 12"], "adamine": ["instruction_dim: 12"], "r2gan": [*GAME, "instruction_dim: 12"],
    "acme": [*GAME, "hidden: [8]", "instruction_dim: 12"], "tnlbt": [*GAME, "hidden: [8]"],
    "tnlbt_margins_decoder": [*GAME, "hidden: [8]", "decoder_layers: 1", "decoder_heads: 2"],
}  # fmt: skip
NUMBERS = {
    "batch_size": 4, "crop_size": 32, "embed_dim": 16, "recipe_dim": 16, "recipe_layers": 1, "recipe_heads": 2,
    "recipe_feedforward": 32, "image_model": "test_resnet", "num_workers": 0, "dropout": 0.0, "precision": "32-true",
    "image_size": 64, "min_word_count": 1,
}  # fmt: skip
no_gpu = pytest.mark.skipif(devices.device() == "cuda", reason="what a machine without a GPU does")


def small(case: Case) -> Case:
    options = NUMBERS | {"system_args": ARGS.get(case.method, [])}
    if case.method == "dar":
        options |= {"clip_model": "kitchen-clip-small", "clip_pretrained": "", "crop_size": 56}
    if "chunk" in gpu.parameters(case):
        options["chunk"] = min(2, gpu.parameters(case)["chunk"])
    return replace(case, options=options, backend="eager")  # dynamo alone: a test waits for no compiler


def test_products_of_a_step_are_resnet_50s_and_two_recipes_more():
    """ResNet-50 is known for 4.1e9 multiplications per photo of 224 pixels: 8.2e9 operations, thrice with backward."""
    paired, texts = (scale.teraflops(Case("H-T", text_only=text)) for text in (False, True))
    assert paired - texts / 2 == pytest.approx(3 * 8.2e-3, rel=0.05)


@pytest.mark.parametrize("group", GROUPS)
def test_each_row_takes_the_studys_own_step(group):
    """And the released way, other memory layouts, optimizers and a compiled encoder compute the same losses."""
    losses = {}
    for case in GROUPS[group]:
        found = gpu.measure(small(case), steps=1, rounds=1)
        assert found["batch"] == (8 if case.text_only else 4) and found["pairs/s"] > 0 < found["ms per step"]
        assert all(map(math.isfinite, found["losses"].values()))
        losses[case.name] = found["losses"]
    if group == "systems":
        assert {"category", "retrieval"} <= losses["JE"].keys() and "semantic" in losses["AdaMine"]
        assert {"critic", "discriminator", "translation"} <= losses["ACME"].keys()
    elif "TNLBT" in group:  # BatchNorm sees its chunk, and each step draws noise
        assert len({frozenset(own) for own in losses.values()}) == 1 and all(
            own["retrieval"] for own in losses.values()
        )
    else:
        assert losses.pop("the step of text-only recipes", {}) == {}
        first = losses["as released, AMP"]
        assert first["retrieval"] > 0 < first["self_supervised"]
        for name, own in losses.items():
            assert own == pytest.approx(first, rel=2e-3), name


def test_batches_are_as_long_as_recipes():
    case = small(Case("JE", "je"))
    values = gpu.parameters(case) | {"batch_size": 400}
    batch = gpu.random_batch(case, gpu.make_system(case, values), values, 0)
    tokens = (batch.recipes.tokens != 0).sum(1)
    assert ((batch.recipes.ingredients >= 0).sum(1).float().mean() - 9).abs() < 1
    lines = batch.recipes.ingredients[batch.recipes.ingredients >= 0]
    steps = batch.recipes.instructions[batch.recipes.instructions >= 0]
    assert (tokens[lines] == 3).all(), "names: a line is one token between its marks"
    assert tokens[steps].max() == values["max_tokens"] == 15 and tokens[steps].float().mean() > 11
    assert (batch.category >= 0).sum() == 200 and batch.category[0] == batch.category[1] != batch.category[2]


def test_the_loaders_share_and_an_epoch_of_the_study(tmp_path):
    case = small(Case("H-T"))
    case.options["num_workers"] = 1
    found = gpu.measure_loader(case, photos=12, steps=2, rounds=2, folder=tmp_path)
    assert found["workers"] == 1 and found["batch"] == 4 and 0.5 < found["KB per photo"] < 50
    assert found["GPU busy"] == found["ms per step, on the GPU"] / found["ms per step, loaded"] > 0
    epoch = gpu.measure_devices(case, photos=12, number=1, folder=tmp_path)
    assert epoch["pairs/s"] == 12 / epoch["s per epoch"]


def test_ranks():
    found = gpu.measure_ranks("trained", 300, 16, 1)
    assert found["ratio"] == found["ranks s"] / found["product s"] > 0


def test_an_error_is_a_row_and_the_benchmark_fails_where_it_should_not_be(tmp_path, monkeypatch, capsys):
    found = gpu.row_of("steps", case=Case("H-T", options={"image_model": "no_such_net"}), steps=1, rounds=1)
    assert found["error"].startswith("ValueError: image_model 'no_such_net': timm has no such model")
    killed = subprocess.CompletedProcess([], -9, "", "first\nlast words\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    assert gpu.row_of("ranks") == {"error": "exit status -9: last words"}
    report = gpu.Report(tmp_path / "bench" / "gpu.md")
    cases = [Case("good"), Case("too large", may_fail=True), Case("bad")]
    rows = iter([{"pairs/s": 10.0, "losses": {}}, {"error": "OutOfMemoryError: all"}, {"error": "KeyError: x"}])
    monkeypatch.setattr(gpu, "row_of", lambda *_, **__: next(rows))
    gpu.steps_section(report, "steps: three", cases, 1, 1)
    assert report.failed == ["steps: three, bad"]
    text = (tmp_path / "bench" / "gpu.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert re.search(r"\| too large +\| - +\|.*OutOfMemoryError: all \|", text) and "losses" not in text


@no_gpu
def test_without_a_gpu_it_says_so_and_all_benchmarks_leave_it_out():
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr == "bench gpu needs an NVIDIA GPU; there is none\n"
    listed = "from tests.benchmarks import __main__ as m; import json; print(json.dumps(m.without_gpu(m.NAMES)))"
    done = subprocess.run([sys.executable, "-c", listed], cwd=ROOT, capture_output=True, text=True, check=True)
    line, names = done.stdout.splitlines()
    assert line == "gpu is left out: it needs an NVIDIA GPU, and there is none"
    assert "ranks" in json.loads(names) and "gpu" not in json.loads(names)


# ---- pretrained ----


def test_a_ridge_finds_what_is_linear_and_nothing_where_nothing_is():
    generator = torch.Generator().manual_seed(0)
    photos = torch.randn(300, 30, generator=generator) * torch.logspace(-3, 3, 30)  # of unlike scales
    photos = photos + 5
    recipes = (photos / torch.logspace(-3, 3, 30)) @ torch.randn(30, 12, generator=generator) + 2
    sides = {
        name: (photos[rows], recipes[rows]) for name, rows in (("val", slice(200, 250)), ("test", slice(250, 300)))
    }
    train_sides = photos[:200], recipes[:200]
    _, ranked = pretrained.ridge(train_sides, sides["val"], sides)
    found = {name: evaluate(*own, candidates=50)[0] for name, own in ranked.items()}
    assert found["test"]["recall_1"] > 0.95 and found["val"]["direction"] == "i2r"
    unpaired = train_sides[0], train_sides[1][torch.randperm(200, generator=generator)]
    alpha, ranked = pretrained.ridge(unpaired, sides["val"], sides)
    assert evaluate(*ranked["test"], candidates=50)[0]["recall_1"] < 0.2 and alpha in pretrained.ALPHAS


def test_alpha_is_the_best_of_validation():
    """With noise in all features and few rows a small alpha overfits."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(160, 4, generator=generator)
    photos = torch.cat(
        [shared + torch.randn(160, 4, generator=generator), torch.randn(160, 70, generator=generator)], 1
    )
    recipes = shared @ torch.randn(4, 8, generator=generator)
    part = {name: (photos[rows], recipes[rows]) for name, rows in (("train", slice(80)), ("val", slice(80, 160)))}
    alpha, ranked = pretrained.ridge(part["train"], part["val"], {"val": part["val"]})
    best = evaluate(*ranked["val"], candidates=80)[0]["recall_10"]
    for other in pretrained.ALPHAS:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(pretrained, "ALPHAS", (other,))
            _, own = pretrained.ridge(part["train"], part["val"], {"val": part["val"]})
        assert evaluate(*own["val"], candidates=80)[0]["recall_10"] <= best
    assert alpha > 1


def test_the_ridge_and_a_finished_study_on_the_same_candidates(tmp_path, tiny_store, tiny_config, monkeypatch, capsys):
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(tmp_path))
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=2000, **bert)).eval().save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer.json").write_text("{}")  # the store has token ids already
    config = replace(
        tiny_config, method="ht_sentence", sentence_model=str(tmp_path / "bert"), frozen=("all",), frozen_views=2
    )
    study = tmp_path / "tiny"
    (study / "01_data_preparation").mkdir(parents=True)
    (study / "01_data_preparation/data").symlink_to(tiny_store.folder)
    training = TrainingConfig(epochs=1, batch_size=32, crop_size=48, weights={"self_supervised": 0.0})
    train(build(config), tiny_store, training, study / "02_baseline_training")
    capsys.readouterr()
    pretrained.main(["--data", "--study", "tiny", "--candidates", "10"])
    said = capsys.readouterr().out
    assert "96 training pairs, 2 views of each photo; ridge: alpha 1" in said
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")][
        2:
    ]
    splits = ["val", *tiny_store.test_splits]
    sizes = {name: str(len(tiny_store.split(name))) for name in splits}
    expected = [[who, name, n] for name in splits for who in ("ridge", "baseline") for n in ("10", sizes[name])]
    assert [line[:3] for line in lines] == expected
    encoded = encode(load_system(study / "02_baseline_training"), tiny_store.split("iid"), crop=48)
    row = evaluate(encoded.embedding, encoded.recipes, candidates=len(encoded.labels))[0]
    shown = next(line for line in lines if line[:3] == ["baseline", "iid", sizes["iid"]])
    assert [float(x) for x in shown[3:]] == pytest.approx([row["recall_1"], row["recall_10"], row["medr"]], rel=0.01)


def test_what_is_missing_is_said_in_a_line(tmp_path, tiny_config, tiny_store, monkeypatch, capsys):
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(tmp_path))
    files = {"gone": "source: cookbook\nsource_dir: no/such\n", "weights": "image_weights: package:no_such_package\n"}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(pretrained, "FILES", {name: str(tmp_path / f"{name}.yaml") for name in files})
    pretrained.main([])
    gone, weights = capsys.readouterr().out.splitlines()
    assert gone == "gone is left out: no/such is not here"
    assert "weights is left out" in weights and "package:no_such_package: not installed; pip install" in weights
    train(build(tiny_config), tiny_store, TrainingConfig(epochs=0), tmp_path / "plain/02_baseline_training")
    for study, why in (("plain", "its encoders are not frozen"), ("nowhere", "no trained system here")):
        with pytest.raises(SystemExit, match=why):
            pretrained.main(["--data", "--study", study])
