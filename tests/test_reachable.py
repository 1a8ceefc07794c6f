"""What counts as the code that made a result: definitions along references, in made-up packages and in this one."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

from recipe_lib.data.prepare import _write_recipes
from recipe_lib.reachable import Reach, Sources, code_digest, versions, without_docstrings
from recipe_lib.training.fit import fit

FILES = {
    "__init__.py": "",
    "plots.py": "import matplotlib\nCOLOUR = 'red'\ndef curves():\n    return COLOUR\n"
    "def bars():\n    return matplotlib\n",
    "fit.py": "from .losses import triplet\nimport torch as t\nRATE = 1\n"
    "def fit(system):\n    return triplet(RATE), t\ndef unused():\n    return 2\n",
    "losses/__init__.py": "from lib.losses.triplet import triplet\nfrom lib.losses.circle import circle\n",
    "losses/triplet.py": "def triplet(x):\n    return x\n",
    "losses/circle.py": "def circle(x):\n    return -x\n",
    "find.py": "from importlib import import_module\n\ndef system(name):\n"
    "    return import_module(f'lib.systems.{name}').System\n",
    "systems/__init__.py": "",
    "systems/ht.py": "class System:\n    width = 1\n",
    "systems/acme.py": "import scipy\nclass System:\n    width = scipy.pi\n",
    "tables.py": "from pathlib import Path\ndef foods():\n    return Path(__file__).with_name('foods.csv')\n",
    "foods.csv": "tomato",
    "other.csv": "salt",
    "register.py": "ALL = {}\ndef known(f):\n    ALL[f.__name__] = f\n    return f\n",
    "makers.py": "from lib.register import known\n@known\ndef one():\n    return 1\ndef two():\n    return 2\n",
}


@pytest.fixture
def package(tmp_path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "lib"


def reach(package: Path, code: str, **chosen) -> Reach:
    rooms = {f"lib.{room}": names for room, names in chosen.items()}
    return Reach(Sources(package), rooms).code(without_docstrings(ast.parse(code)))


def names(package: Path, code: str, **chosen) -> set[str]:
    return {name.removeprefix("lib.") for name in reach(package, code, **chosen).definitions}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from lib.plots import curves", ""),
        ("from lib.plots import curves\ncurves()", "plots:curves plots:COLOUR"),
        ("from lib import plots\nplots.bars()", "plots:bars"),
        ("import lib.plots as p\nprint(p.bars)", "plots:bars"),
        ("import lib.losses.circle\nlib.losses.circle.circle(1)", "losses.circle:circle"),
        ("from lib.fit import fit\nfit(1)", "fit:fit fit:RATE losses.triplet:triplet"),
        ("from lib import losses\nlosses.circle(1)", "losses.circle:circle"),
        ("from lib import plots\nf(plots)", "plots:curves plots:COLOUR plots:bars"),
        ("from lib import plots\ngetattr(plots, name)()", "plots:curves plots:COLOUR plots:bars"),
        ("from lib.plots import *\ncurves()", "plots:curves plots:COLOUR plots:bars"),
        ("def draw():\n    from lib.plots import bars\n    return bars()", "plots:bars"),
        ("class A:\n    def f(self):\n        from lib import plots as p\n        return p.bars()", "plots:bars"),
    ],
)
def test_references_are_followed_definition_by_definition(package, code, expected):
    assert names(package, code) == set(expected.split())


def test_comments_docstrings_and_formatting_do_not_count(package):
    code = "from lib.fit import fit\nfit(1)"
    before = reach(package, code).state()
    path = package / "losses/triplet.py"
    path.write_text('"""Losses."""\n# the\ndef  triplet(x ):\n    """A loss."""\n    return (x)  # itself\n')
    assert reach(package, code).state() == before
    path.write_text("def triplet(x):\n    return 2 * x\n")
    assert reach(package, code).state() != before


def test_an_edit_elsewhere_changes_nothing_and_a_switched_import_does(package):
    code = "from lib.fit import fit\nfrom lib.losses import circle\nfit(circle)"
    before = reach(package, code).state()
    (package / "plots.py").write_text("COLOUR = 'blue'\n")
    path = package / "fit.py"
    path.write_text(path.read_text().replace("return 2", "return 3"))
    assert reach(package, code).state() == before
    path.write_text(path.read_text().replace("import triplet", "import circle as triplet"))
    assert reach(package, code).state() != before


def test_what_runs_at_import_counts_in_every_module_that_is_imported(package):
    code = "from lib.fit import fit\nfit(1)"
    before = reach(package, code).state()
    path = package / "losses/circle.py"  # imported by losses/__init__, of no use to fit
    path.write_text(path.read_text() + "import torch\nif __name__ == '__main__':\n    torch.use(3)\n")
    assert reach(package, code).state() == before, "no import runs that"
    path.write_text(path.read_text() + "torch.set_float32_matmul_precision('high')\n")
    assert reach(package, code).state() != before


def test_what_a_decorator_of_the_package_may_register_counts(package):
    assert names(package, "from lib.makers import two\ntwo()") == {
        "makers:two",
        "makers:",
        "register:known",
        "register:ALL",
    }


def test_modules_imported_by_name_are_all_or_the_chosen_ones(package):
    code = "from lib.find import system\nsystem(name)"
    assert {"systems.ht:System", "systems.acme:System"} <= names(package, code)
    chosen = reach(package, code, systems=["ht"])
    assert "lib.systems.ht:System" in chosen.definitions and "lib.systems.acme:System" not in chosen.definitions
    assert "scipy" not in chosen.packages and "scipy" in reach(package, code).packages
    assert "systems.ht:System" in names(package, "import importlib\nimportlib.import_module('lib.systems.ht')")


def test_data_files_that_the_code_names_count(package):
    code = "from lib.tables import foods\nfoods()"
    before = reach(package, code).state()
    (package / "other.csv").write_text("pepper")
    assert reach(package, code).state() == before
    (package / "foods.csv").write_text("potato")
    assert reach(package, code).state() != before
    (package / "tables.py").write_text("HERE = __file__\ndef foods():\n    return HERE\n")
    assert set(reach(package, code).files) == {"lib/foods.csv", "lib/other.csv"}, "all, where none is named"


def test_packages_are_those_that_the_reached_code_uses(package):
    assert reach(package, "from lib.plots import curves\nimport numpy as np\ncurves(np.pi, json)").packages == {"numpy"}
    assert reach(package, "from lib import plots\nplots.bars()").packages == {"matplotlib"}
    assert reach(package, "from lib.fit import fit\nfit(1)").packages == {"torch"}
    assert versions(["PIL"]).keys() == {"pillow"} and versions(["json", "no_such"]) == {}


def test_circles_end(package):
    (package / "a.py").write_text("from lib.b import g\ndef f():\n    return g()\n")
    (package / "b.py").write_text("from lib import a\nfrom lib.c import *\ndef g():\n    return a.f(), globals(), h\n")
    (package / "c.py").write_text("from lib.b import *\nh = 1\n")
    assert names(package, "import lib.a\nlib.a.f()") == {"a:f", "b:g", "c:h"}


# ---- this package ----


def test_training_and_shards_reach_their_own_code_and_no_figure():
    reached = Reach(Sources(Path(__file__).parents[1] / "recipe_lib")).name("recipe_lib.training.fit", "fit")
    assert {"recipe_lib.losses.triplet:triplet_loss", "recipe_lib.data.loading:PairedBatches"} <= set(
        reached.definitions
    )
    assert not [name for name in reached.definitions if name.startswith(("recipe_lib.plots", "recipe_lib.runner"))]
    assert {"torch", "lightning", "timm"} <= reached.packages and not {"matplotlib", "seaborn"} & reached.packages
    assert code_digest(fit) == code_digest(fit) != code_digest(_write_recipes)
    with pytest.raises(ValueError, match=r"pathlib.*Path: not a part of recipe_lib"):
        code_digest(Path)


def test_a_process_keeps_to_the_code_that_it_imported(tmp_path, monkeypatch):
    """An edit while a kernel runs concerns what is imported later, in another kernel."""
    package = tmp_path / "freshly"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "reachable.py").write_text((Path(__file__).parents[1] / "recipe_lib/reachable.py").read_text())
    (package / "work.py").write_text("def f():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    reachable, work = (importlib.import_module(f"freshly.{name}") for name in ("reachable", "work"))
    (package / "work.py").write_text("def f():\n    return 2\n")
    running = reachable.code_digest(work.f)
    for name in [name for name in sys.modules if name.startswith("freshly")]:
        monkeypatch.delitem(sys.modules, name)
    restarted = importlib.import_module("freshly.reachable").code_digest(importlib.import_module("freshly.work").f)
    assert running != restarted
