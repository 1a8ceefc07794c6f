"""The authors' pickles: nothing that they hold is run, and every ingredient label keeps its line."""

import pickle
from collections import Counter
from pathlib import Path

import pytest

from recipe_lib.data.plain_pickle import read_plain_pickle
from recipe_lib.data.recipe import DataError
from recipe_lib.sources.recipe1m import read_recipe1m

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared test data is not here")
A, B, C, D = ("000000000a", "000000000b", "000000000c", "000000000d")
ING2LABEL = {"sea_salt": 0, "salt": 0, "soy sauce": 1, "soybean": 2, "Sauce": 3, "leek": 4}


def recipe(*lines, photos=("0123456789.jpg",), **changes) -> dict:
    return {"title": "soup", "ingredients": list(lines), "instructions": ["boil."], "images": list(photos)} | changes


def layout(folder: Path, **files) -> Path:
    """train, val and test of one recipe each and the classes, unless `files` says otherwise; None leaves a file out."""
    plain = {"train": {A: recipe("1 salt")}, "val": {B: recipe("2 leeks")}, "test": {C: recipe("1 leek")}}
    for name, value in (plain | {"ing2label_topk500": ING2LABEL} | files).items():
        if value is not None:
            (folder / f"{name}.pkl").write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))
    (folder / "train").mkdir(exist_ok=True)
    return folder


def everything(folder, **options):
    recipes, report = read_recipe1m(folder, **options)
    return {recipe.id: recipe for recipe in recipes}, report


def test_recipes_and_their_splits(tmp_path):
    more = {D: recipe("12 ounces  leek", " ", "1 pie", photos=())}
    recipes, report = everything(layout(tmp_path, train_noimages=more))
    assert [(r.id, r.split) for r in recipes.values()] == [(A, "train"), (B, "val"), (C, "test"), (D, "train")]
    assert recipes[B].images == [tmp_path / "val/0/1/2/3/0123456789.jpg"] and recipes[B].image_root == tmp_path / "val"
    assert recipes[D].ingredients == ["12 ounces leek", "1 pie"], "cleaned, no quantity repaired"
    assert recipes[D].images == [] and recipes[D].names == ["leek", None]
    assert (report.pairs, report.text_only) == ({"train": 1, "val": 1, "test": 1}, {"train": 1})


def test_a_class_is_called_by_its_most_frequent_name(tmp_path):
    """Of equals the shortest, then the first in the alphabet."""
    classes = {"fine sea salt": 0, "sea_salt": 0, "salt": 0, "zucchini": 1, "courgette": 1, "marrow": 2, "gourds": 2}
    lines = ["1 tsp fine sea salt", "2 courgettes", "courgette, diced", "1 zucchini", "sea_salt", "a crate of marrows"]
    recipes, _ = everything(layout(tmp_path, train={A: recipe(*lines)}, ing2label_topk500=classes))
    assert recipes[A].names == ["salt", "courgette", "courgette", "courgette", "salt", None]
    recipes, _ = everything(layout(tmp_path, train={A: recipe("1 marrow", "gourds x", "sea salt", "fine sea salt")}))
    assert recipes[A].names[2:] == ["salt", "salt"], "sea salt is salt by the rules too"


def test_the_longest_name_on_a_line_wins_within_the_recipes_labels(tmp_path):
    lines = ["soy sauce", "a bottle labelled soy sauce", "hot saucepan", "soybeans", "sauce of soybean"]
    recipes, _ = everything(layout(tmp_path, val={B: recipe(*lines)}))
    assert recipes[B].names == ["soy sauce", "soy sauce", None, "soybean", "sauce"]
    recipes, report = everything(layout(tmp_path, val={B: recipe(*lines)}, id2labels_val={B: [3, 4]}))
    assert recipes[B].names == ["sauce", "sauce", None, None, "sauce", "leek"], "a label without a line comes last"
    assert report.labels_without_line == 1
    recipes, _ = everything(layout(tmp_path, val={B: recipe(*lines)}, id2labels_val={}))
    assert recipes[B].names == [None] * 5


def test_given_positions_win_over_the_text(tmp_path):
    train = {A: recipe("1 leek", "", "salt", "soy sauce"), D: recipe("salt")}
    places = {A: [{0: 0}, {2: 3}, {2: 2}, {2: 3}, {1: 4}, {99: 1}]}
    recipes, report = everything(layout(tmp_path, train=train, id2pos_train=places))
    assert recipes[A].ingredients == ["1 leek", "salt", "soy sauce"]
    assert recipes[A].names == ["salt", "sauce;soybean", None, "leek", "soy sauce"], "both of one line; no line"
    assert recipes[D].names == ["salt"] and report.labels_without_line == 2
    recipes, _ = everything(layout(tmp_path, train=train, id2pos_train=places, id2labels_train={A: [0, 4], D: []}))
    assert recipes[A].names == ["salt", None, None, "leek"] and recipes[D].names == [None]


def test_two_classes_of_a_line_are_found_in_the_text(tmp_path):
    lines = ["salt and leeks", "leeks & water", "soy sauce and salt", "macaroni and soybeans", "salt and sea salt"]
    classes = ING2LABEL | {"macaroni and soybeans": 5}
    recipes, _ = everything(layout(tmp_path, val={B: recipe(*lines)}, ing2label_topk500=classes))
    assert recipes[B].names == ["salt;leek", "leek", "soy sauce;salt", "macaroni and soybeans", "salt"]
    recipes, _ = everything(layout(tmp_path, val={B: recipe(*lines)}, id2labels_val={B: [4]}))
    assert recipes[B].names == ["leek", "leek", None, None, None], "within the recipe's labels"


def test_files_of_the_preprocessing_alone_have_no_names(tmp_path):
    """H-T's: pairs and text-only recipes in a folder `traindata` beside the photos."""
    (tmp_path / "traindata").mkdir()
    layout(tmp_path / "traindata", ing2label_topk500=None, val_noimages={D: recipe("2 leeks", photos=())})
    (tmp_path / "val").mkdir()
    recipes, report = everything(tmp_path)
    assert [(r.id, r.split, r.names) for r in recipes.values()] == [
        (A, "train", None), (B, "val", None), (C, "test", None), (D, "val", None)]  # fmt: skip
    assert recipes[B].images == [tmp_path / "val/0/1/2/3/0123456789.jpg"] and report.text_only == {"val": 1}


def test_recipes_once_per_photo_have_the_labels_of_the_recipe(tmp_path):
    train = {f"{A}_{i}": recipe("1 salt", "2 leeks", photos=[f"012345678{i}.jpg"]) for i in range(2)}
    train |= {"Recipe-7_x": recipe("1 salt"), "x" * 65: recipe("salt"), "a/b": recipe("salt"), "": recipe("salt")}
    more = {"id2labels_train": {A: [4], "Recipe-7_x": [0]}, "id2pos_train": {A: [{1: 4}], "Recipe-7_x": [{0: 0}]}}
    recipes, report = everything(layout(tmp_path, train=train, **more))
    names = {id: r.names for id, r in recipes.items() if r.split == "train"}
    assert names == {f"{A}_0": [None, "leek"], f"{A}_1": [None, "leek"], "Recipe-7_x": ["salt"]}
    assert len(report.skipped) == 3 and all("64 at most" in line for line in report.skipped)


def test_descriptions_and_folders_of_segments(tmp_path):
    train = {A: recipe("salt", llama_13b_generation=" A grey\n soup. "), D: recipe("salt")}
    layout(tmp_path, train=train | {"e": recipe("salt", llama_13b_generation=3)})
    recipes, report = everything(tmp_path)
    assert [recipes[id].description for id in (A, D)] == ["A grey soup.", ""] and recipes[A].segments is None
    assert len(report.skipped) == 1 and "llama_13b_generation is 'int'" in report.skipped[0]
    (tmp_path / "segment").mkdir()
    recipe_ = everything(tmp_path)[0][A]
    assert recipe_.segment_root / recipe_.segments[0] == tmp_path / "segment/train/0/1/2/3/0123456789"


@pytest.mark.parametrize(
    ("id", "fields", "reason"),
    [
        (A, recipe(title=None), "title is None"),
        (A, recipe(ingredients="salt"), "ingredients is 'salt', must be a list"),
        (A, recipe(instructions=[3]), "instructions holds 'int'"),
        (A, recipe(images={}), "images is 'dict'"),
        (A, recipe(instructions=[]), "no ingredients and no instructions"),
        (A, ["x"], "is 'list', must be a dict"),
        ("../etc", recipe("salt"), "id is '../etc'"),
        (7, recipe("salt"), "id is 'int'"),
    ],
)
def test_a_bad_recipe_is_skipped_and_named(tmp_path, id, fields, reason):
    recipes, report = everything(layout(tmp_path, train={id: fields, D: recipe("salt")}))
    assert set(recipes) == {B, C, D}
    assert (
        len(report.skipped) == 1 and report.skipped[0].startswith("train.pkl recipe ") and reason in report.skipped[0]
    )


def test_photos_that_are_refused(tmp_path):
    recipes, report = everything(layout(tmp_path, train={A: recipe("salt", photos=["../x.jpg", "/x.jpg", 7])}))
    assert recipes[A].images == [] and len(report.refused_photos) == 3 and "'../x.jpg'" in report.refused_photos[0]


class Payload:
    def __reduce__(self):
        return exec, ("open('pwned.txt', 'w').close()",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        *[(pickle.dumps({A: Payload()}, protocol), r"asks for '\w+.exec'") for protocol in range(6)],
        (b"(S'x'\nios\nsystem\n.", "asks for 'os.system'"),
        (b"cos\nsys\x1btem\n.", r"asks for 'os.sys\\x1btem'"),
        (pickle.dumps({A: b"x"}), "another type"),
        (pickle.dumps({A: {1, 2}}), "another type"),
        (b"Pelsewhere\n.", "an object outside"),
        (b"\x82\x01.", "another type"),
    ],
)
def test_what_is_not_plain_is_refused(tmp_path, monkeypatch, data, reason):
    monkeypatch.chdir(tmp_path)
    layout(tmp_path, train=data)
    recipes, _ = read_recipe1m(tmp_path)
    with pytest.raises(DataError, match=reason) as error:
        list(recipes)
    assert "train.pkl" in str(error.value) and "\n" not in str(error.value) and "only dict, list" in str(error.value)
    assert not (tmp_path / "pwned.txt").exists()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"val": None}, "val.pkl: no such file; the authors' preprocessing.py"),
        ({"test": None}, "test.pkl: no such file"),
        ({"ing2label_topk500": None, "id2labels_val": {}}, "0 files ing2label_topk.*, which id2labels_val.pkl needs"),
        ({"ing2label_topk60": ING2LABEL}, "2 files ing2label_topk"),
    ],
)
def test_missing_files_stop_at_the_call(tmp_path, files, reason):
    with pytest.raises(DataError, match=reason):
        read_recipe1m(layout(tmp_path, **files))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"train": ["x"]}, "train.pkl: holds 'list', must hold a dict"),
        ({"ing2label_topk500": {"salt": "0"}}, "topk500.pkl: 'salt' -> '0', must be a name and a number"),
        ({"ing2label_topk500": {3: 0}}, "must be a name and a number"),
        ({"id2labels_val": {B: [99]}}, f"id2labels_val.pkl: '{B}' has not a list of numbers of ing2label"),
        ({"id2labels_val": {B: "04"}}, "id2labels_val.pkl"),
        ({"id2pos_train": {A: [{0: 99}]}}, "id2pos_train.pkl"),
        ({"id2pos_train": {A: [{-1: 0}]}}, "id2pos_train.pkl"),
        ({"id2pos_train": {A: {0: 0}}}, "id2pos_train.pkl"),
    ],
)
def test_files_of_wrong_form(tmp_path, files, reason):
    recipes, _ = read_recipe1m(layout(tmp_path, **files))
    with pytest.raises(DataError, match=reason):
        list(recipes)


@pytest.fixture(scope="module")
def shared():
    return everything(SHARED / "authors_layout", image_dir=SHARED / "recipe1m_layout")


def named(recipe) -> list[str]:
    return [name for names in recipe.names if names for name in names.split(";")]


@needs_shared
def test_the_shared_pickles(shared):
    recipes, report = shared
    assert report.pairs == {"train": 657, "val": 141, "test": 141} and report.text_only == {"train": 192}
    assert all(path.is_file() for recipe in recipes.values() for path in recipe.images)
    names = {name for recipe in recipes.values() for name in named(recipe)}
    assert len(names) == 60 and {"salt", "olive oil", "egg"} < names
    given, number = {}, read_plain_pickle(SHARED / "authors_layout/ing2label_topk500.pkl")
    for split in ("train", "val", "test"):
        given |= read_plain_pickle(SHARED / f"authors_layout/id2labels_{split}.pkl")
    for id, labels in given.items():
        assert {number[name] for name in named(recipes[id])} == set(labels)
    assert report.labels_without_line == sum(len(r.names) - len(r.ingredients) for r in recipes.values()) < 20


@needs_shared
@pytest.mark.parametrize("gone", [{"id2pos_train"}, {"id2pos_train", "id2labels_train"}])
def test_computed_positions_are_mostly_those_given(shared, tmp_path, gone):
    for path in (SHARED / "authors_layout").glob("*.pkl"):
        if path.stem not in gone:
            (tmp_path / path.name).symlink_to(path)
    recipes, _ = everything(tmp_path, image_dir=SHARED / "recipe1m_layout")
    agree = Counter()
    for id, places in read_plain_pickle(SHARED / "authors_layout/id2pos_train.pkl").items():
        for position in (position for place in places for position in place):
            computed, given = (set(r[id].names[position].split(";")) if r[id].names[position] else set()
                               for r in (recipes, shared[0]))  # fmt: skip
            agree[given <= computed] += 1  # of "salt and pepper" the shared labels hold one
    assert agree.total() == 4866 and agree[True] / agree.total() > (0.99 if len(gone) == 1 else 0.98)


@needs_shared
def test_both_layouts_hold_the_same_recipes(shared):
    """Text differs in case, and where the authors' repair of lost slashes took true numbers for fractions."""
    official, _ = everything(SHARED / "recipe1m_layout")
    same = Counter()
    for id, ours in shared[0].items():
        theirs = official[id]
        assert (ours.split, ours.images, ours.image_root) == (theirs.split, theirs.images, theirs.image_root)
        assert ours.title == theirs.title.lower()
        assert ours.instructions == [step.lower() for step in theirs.instructions]
        for mine, other in zip(ours.ingredients, theirs.ingredients, strict=True):
            same[mine == other.lower()] += 1
            # Put every fraction's slash out again: now all lines agree.
            assert mine.replace("/", "") == other.lower().replace("/", "")
    assert (same[True], same.total()) == (11539, 11652)
    missing = set(official) - set(shared[0])
    assert {official[id].split for id in missing} == {"val", "test"} and len(missing) == 108
    assert not any(official[id].images for id in missing), "text-only ones, which the authors leave out"


@needs_shared
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("evil_os_system", "asks for 'posix.system'"),
        ("custom_class", "asks for 'my_project_types.Recipe'"),
        ("truncated", "not a complete pickle"),
        ("not_a_pickle", "not a complete pickle"),
    ],
)
def test_the_shared_bad_pickles(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    layout(tmp_path, val=(SHARED / f"bad_inputs/pickles/{name}.pkl").read_bytes())
    recipes, _ = read_recipe1m(tmp_path)
    with pytest.raises(DataError, match=f"val.pkl: .*{reason}") as error:
        list(recipes)
    assert "\n" not in str(error.value) and not (tmp_path / "pwned.txt").exists()
