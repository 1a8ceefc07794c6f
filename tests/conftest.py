"""A tiny study in a folder of its own, for the runner: three notebooks that write text. A small kitchen, prepared."""

from __future__ import annotations

import signal
from pathlib import Path

import nbformat
import pytest
import torch

from recipe_lib.data.derived import add_descriptions, add_segments
from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.store import Store
from recipe_lib.kitchen.model import KitchenConfig, cook
from recipe_lib.systems.base import System, SystemConfig
from recipe_lib.systems.registry import build

STUDY = 'study: str = "kitchen"  # folder of the results below outputs/\n'
# Where a stage may be told to misbehave: it logs that it ran, outside outputs/.
BEGIN = """\
from pathlib import Path
from recipe_lib.paths import repo_root, study_dir
out = study_dir(study) / "{stage}"
out.mkdir(parents=True, exist_ok=True)
with open(repo_root() / "ran.txt", "a") as log:
    print("{stage}", file=log)
"""

# Modules of a minute and more. Of two workers each takes a whole module at a time: a long one must not come last.
LONG = [
    "test_notebooks.py", "sources/test_chain.py", "training/test_distributed.py", "systems/test_own_system.py",
    "systems/test_recurrent.py", "systems/test_games.py", "systems/test_acme_r2gan.py",
    "training/test_fit.py",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: first.get(item.path, len(LONG)))


def write_notebook(path: Path, parameters: str, *cells: str) -> None:
    """A notebook whose first cell is tagged `parameters`."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *cells)]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture
def tiny_study(tmp_path, monkeypatch) -> Path:
    """A repository of three stages in a path with a space and braces, with the current folder in it."""
    root = tmp_path / "a {tiny} study"
    seed = "seed: int = 0  # seed of everything [0..]\n"
    write_notebook(
        root / "notebooks/01_prepare.ipynb",
        STUDY + seed + 'source_dir: str = ""  # folder of real recipes\n',
        BEGIN.format(stage="01_prepare"),
        "(out / 'data.txt').write_text(str(seed))",
    )
    write_notebook(
        root / "notebooks/02_train.ipynb",
        STUDY + seed + "epochs: int = 2  # passes over the data [1..]\nrate: float = 0.1  # step size (0..1]\n"
        'mode: str = "fine"  # what happens in training [fine|fail|hang]\n',
        BEGIN.format(stage="02_train"),
        "resumed = (out / 'checkpoint.txt').exists()\n(out / 'checkpoint.txt').write_text('1')\n"
        "for epoch in range(epochs):\n    print('epoch', epoch, 'rate', rate)",
        "import time\nif mode == 'hang' and not resumed:\n    time.sleep(60)\n"
        "if mode == 'fail':\n    raise ValueError('first line\\nsecond line')",
        "(out / 'weights.txt').write_text((out.parent / '01_prepare/data.txt').read_text() + f' {resumed}')",
    )
    write_notebook(
        root / "notebooks/03_score.ipynb",
        STUDY + "mark: str = ''  # text to put into the results\n",
        BEGIN.format(stage="03_score"),
        "import json\nweights = (out.parent / '02_train/weights.txt').read_text()\n"
        "head = 'system,variant,split,direction,candidates,medr,recall_1'\n"
        "row = f'{weights}{mark},baseline,iid,i2r,9,1.5,.5'\n"
        "(out.parent / 'results.csv').write_text(f'{head}\\n{row}\\n')\n"
        "(out.parent / 'metrics.json').write_text(json.dumps({'verdict': 'no gain <at all>'}))\n"
        "from PIL import Image\nImage.new('RGB', (4, 4)).save(out / 'recall_by_variant.png')",
    )
    (root / "params").mkdir()
    (root / "params/kitchen.yaml").write_text("# the default\nseed: 3\n")
    monkeypatch.chdir(root)
    # main() sets these; monkeypatch remembers what they were and puts it back.
    for name in ("CAUSAL_KITCHEN_ROOT", "CAUSAL_KITCHEN_OUTPUTS", "JUPYTER_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield root
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory) -> Store:
    """A small kitchen, prepared."""
    kitchen = KitchenConfig(train=96, val=24, test=30, text_only=20, seed=3)
    folder = tmp_path_factory.mktemp("store") / "data"
    prepare(cook(kitchen), folder, StoreConfig(64, min_word_count=2, ingredient_classes=20))
    return Store(folder)


@pytest.fixture
def tiny_config(tiny_store) -> SystemConfig:
    return SystemConfig(
        tiny_store.card["vocabulary"], len(tiny_store.classes.names), image_model="test_resnet", embed_dim=16,
        recipe_dim=16, recipe_layers=1, recipe_heads=2, recipe_feedforward=32, dropout=0.1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def clip_store(tmp_path_factory) -> Store:
    """The same small kitchen as CLIP reads it, with descriptions and segments."""
    kitchen = KitchenConfig(train=96, val=24, test=30, text_only=20, seed=3)
    folder = tmp_path_factory.mktemp("clip store") / "data"
    prepare(cook(kitchen), folder, StoreConfig(64, 2, 20, max_sentences=15, max_tokens=20, text_tokens="clip"))
    add_descriptions(folder, None, folder / "cache")
    add_segments(folder, 3, 56)
    return Store(folder)


@pytest.fixture
def clip_config(clip_store) -> SystemConfig:
    return SystemConfig(
        clip_store.card["vocabulary"], len(clip_store.classes.names), method="dar", clip_model="kitchen-clip-small",
        embed_dim=16, adapter_width=8, recipe_layers=1, recipe_heads=2, recipe_feedforward=32, dropout=0.1,
        descriptions="adapted", segments=3,
    )  # fmt: skip


@pytest.fixture
def dar(clip_config) -> System:
    torch.manual_seed(0)
    return build(clip_config).eval()
