"""The benchmarks that this machine cannot run at their size: every row of `bench gpu`, small, on what there is."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from recipe_lib import devices
from tests.benchmarks import gpu
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
