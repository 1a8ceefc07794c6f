import io
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from recipe_lib.data.ingredients import IngredientClasses
from recipe_lib.data.prepare import StoreConfig, prepare, prepare_more
from recipe_lib.data.recipe import DataError, Recipe
from recipe_lib.data.store import TEXT_ONLY, Store
from recipe_lib.data.text import tokenizer_from_vocabulary
from recipe_lib.kitchen.model import KitchenConfig, cook

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
CONFIG = StoreConfig(32, min_word_count=1, ingredient_classes=2)
SHARD = 128  # of the tests that need several


def recipe(i, split="train", photos=1, **changes):
    fields = {
        "id": f"r{i}", "title": f"Soup {i}", "ingredients": ["1 onion, chopped", "2 cups stock", "1 onion"],
        "instructions": ["Chop.", "Boil 3 cups."], "images": [PHOTO] * photos, "split": split,
    }  # fmt: skip
    return Recipe(**fields | changes)


EVAL = [recipe("v", "val"), recipe("t", "test")]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("recipe_lib.data.prepare.SHARD", SHARD)


def test_round_trip(tmp_path):
    recipes = [recipe(i) for i in range(3)] + [recipe(3, "val"), recipe(4, photos=0), recipe(5, "test", photos=2)]
    card = prepare(recipes, tmp_path / "data", CONFIG)
    assert card["recipes"] == {"test": 1, "text_only": 1, "train": 3, "val": 1}
    store = Store(tmp_path / "data")
    split = store.split("test")
    assert split.ids == ["r5"] and split.recipe(0)["ingredients"] == recipes[0].ingredients
    photos = [split.photo(0, i) for i in range(split.photo_count(0))]
    assert len(photos) == 2 and Image.open(io.BytesIO(photos[0])).size == (48, 32), "shorter side 32, aspect kept"
    assert store.test_splits == ["test"]


def test_token_ids_are_the_words_and_labels_point_to_their_lines(tmp_path):
    prepare([recipe(0), *EVAL], tmp_path / "data", CONFIG)
    store = Store(tmp_path / "data")
    split = store.split("train")
    words = [
        [store.tokenizer.id_to_token(t) for t in split.words[a:b]]
        for a, b in zip(split.sentence_start, split.sentence_start[1:], strict=False)
    ]
    assert all((sentence[0], sentence[-1]) == ("<start>", "<end>") for sentence in words)
    assert [sentence[1:-1] for sentence in words[:3]] == [
        ["soup", "0"],
        ["1", "onion", ",", "chopped"],
        ["2", "cups", "stock"],
    ]
    assert split.ingredient_lines.tolist() == [3] and len(words) == 1 + 3 + 2
    names = [store.classes.names[label] for label in split.labels]
    assert list(zip(names, split.positions.tolist(), strict=True)) == [("onion", 0), ("stock", 1), ("onion", 2)]
    assert split.label_matrix().sum() == 2


def test_a_line_with_two_classes_counts_for_both(tmp_path):
    lines = [["salt and pepper", "oil and gold"], ["pepper"], ["salt", "oil"], ["salt"], ["rosemary and gold", "oil"]]
    recipes = [recipe(i, ingredients=ingredients) for i, ingredients in enumerate(lines)]
    prepare([*recipes, *EVAL], tmp_path / "data", StoreConfig(32, 1, ingredient_classes=3))
    store = Store(tmp_path / "data")
    assert dict(zip(store.classes.names, store.classes.counts, strict=True)) == {"oil": 3, "salt": 3, "pepper": 2}
    split = store.split("train")
    names = [store.classes.names[label] for label in split.labels[: split.label_start[1]]]
    assert list(zip(names, split.positions.tolist(), strict=False)) == [("salt", 0), ("pepper", 0), ("oil", 1)]
    assert split.label_matrix().sum(0).tolist() == store.classes.counts


def test_the_kitchens_labels_are_its_own_names(tiny_store):
    """One name a line, found in the table as it stands: no line of the kitchen is read as two."""
    kitchen = {r.id: r for r in cook(KitchenConfig(train=96, val=24, test=30, text_only=20, seed=3))}
    index = {name: i for i, name in enumerate(tiny_store.classes.names)}
    for name in ("train", "text_only", "iid"):
        split = tiny_store.split(name)
        for row, id_ in enumerate(split.ids):
            own = slice(*split.label_start[row : row + 2])
            expected = [(index[n], i) for i, n in enumerate(kitchen[id_].names) if n in index]
            assert list(zip(split.labels[own].tolist(), split.positions[own].tolist(), strict=True)) == expected
    counts = Counter(n for r in kitchen.values() if r.split == "train" and len(r.images) for n in set(r.names))
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:20]
    assert top == list(zip(tiny_store.classes.names, tiny_store.classes.counts, strict=True))


def test_a_published_vocabulary_gives_the_ids(tmp_path):
    words = ["<pad>", "<start>", "<end>", "onion", "1", "2-inch", "soup", "<unk>"]
    tokenizer = tokenizer_from_vocabulary(dict(enumerate(words)))
    recipes = [recipe(0, title="Soup", ingredients=["1 2-inch onion, cut"]), *EVAL]
    card = prepare(recipes, tmp_path / "data", StoreConfig(32, 1, 1), tokenizer=tokenizer)
    split = Store(tmp_path / "data").split("train")
    assert card["vocabulary"] == 8 and split.words[:10].tolist() == [1, 6, 2, 1, 4, 5, 3, 7, 7, 2]


def test_limits_and_empty_fields(tmp_path):
    long = recipe(0, ingredients=["onion"] * 500 + ["stock"], instructions=["very " * 20_000])
    bare = recipe(1, title="", ingredients=["", "stock"], instructions=[])
    prepare([long, bare, *EVAL], tmp_path / "data", CONFIG)
    split = Store(tmp_path / "data").split("train")
    lengths = np.diff(split.sentence_start)
    assert lengths.max() == 15 and lengths.min() == 2, "an empty field is <start> and <end>: no mean is over nothing"
    assert np.diff(split.recipe_start).tolist() == [1 + 20 + 1, 1 + 1 + 1]
    assert split.positions[split.label_start[0] : split.label_start[1]].tolist() == [*range(20), *[-1] * 481]
    assert split.positions[split.label_start[1] :].tolist() == [0], "the empty line before it was not tokenised"


def test_the_card_knows_the_photos(tmp_path):
    """Other photos under the same text are other data: a checkpoint trained on the first must not be taken up."""
    cards = [prepare([recipe(0, images=[PHOTO // d]), *EVAL], tmp_path / "data", CONFIG) for d in (1, 2, 1)]
    assert cards[0] == cards[2] and cards[0]["sha256"] != cards[1]["sha256"]
    assert cards[0]["ingredient_classes"] == {"onion": 1, "stock": 1}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_same_recipes_same_bytes_with_any_number_of_processes(tmp_path, small_shards):
    recipes = [recipe(i, photos=i % 3) for i in range(2 * SHARD + 4)] + EVAL
    for name, workers in (("a", 1), ("b", 2), ("c", 1)):
        prepare(iter(recipes), tmp_path / name, StoreConfig(8, 1, 2), workers=workers)
    found = files(tmp_path / "a")
    assert "train/00002.jpegs" in found and "text_only/00001.tokens.parquet" in found and len(found) == 31
    assert found == files(tmp_path / "b") == files(tmp_path / "c")


def test_finished_shards_are_taken_over_and_changed_ones_made_again(tmp_path, small_shards):
    config = StoreConfig(8, 1, 2)
    recipes = [recipe(i) for i in range(2 * SHARD)] + EVAL
    first = prepare(recipes, tmp_path / "data", config)
    before = {p.name: p.stat().st_ino for p in (tmp_path / "data/train").iterdir()}
    assert prepare(recipes, tmp_path / "data", config, workers=1) == first
    assert {p.name: p.stat().st_ino for p in (tmp_path / "data/train").iterdir()} == before, "nothing was made again"

    recipes[SHARD].title = "Stew"
    second = prepare(recipes[: SHARD + 1] + EVAL, tmp_path / "data", config, workers=1)
    after = {p.name: p.stat().st_ino for p in (tmp_path / "data/train").iterdir()}
    assert second["recipes"]["train"] == SHARD + 1 and second["sha256"] != first["sha256"]
    assert after["00000.jpegs"] == before["00000.jpegs"] and after["00001.jpegs"] != before["00001.jpegs"]
    prepare(recipes[: SHARD + 1] + EVAL, tmp_path / "anew", config, workers=1)
    assert files(tmp_path / "data") == files(tmp_path / "anew")
    other = prepare(recipes[: SHARD + 1] + EVAL, tmp_path / "data", StoreConfig(8, 1, 2, max_tokens=3))
    assert other["recipes"] == second["recipes"] and other["sha256"] != second["sha256"]
    again = {p.name: p.stat().st_ino for p in (tmp_path / "data/train").iterdir()}
    assert (
        again["00000.jpegs"] == after["00000.jpegs"] and again["00000.tokens.parquet"] != after["00000.tokens.parquet"]
    )


@pytest.mark.parametrize("changed", [{"image_filter": "lanczos"}, {"jpeg_quality": 80}])
def test_photos_are_made_again_for_another_filter_or_quality(tmp_path, changed):
    first = prepare([recipe(0), *EVAL], tmp_path / "data", CONFIG)
    before = files(tmp_path / "data")
    second = prepare([recipe(0), *EVAL], tmp_path / "data", replace(CONFIG, **changed))
    assert second["sha256"] != first["sha256"] and second["config"] | changed == second["config"]
    assert files(tmp_path / "data")["train/00000.jpegs"] != before["train/00000.jpegs"]


def test_shards_are_made_again_when_the_code_that_makes_them_changes(tmp_path, monkeypatch):
    """By hand in JupyterLab too: no runner clears the folder there."""
    module = sys.modules[prepare.__module__]
    real = module.code_digest
    edited = None

    def code(*makers):
        return "edited" if makers[0].__name__ == edited else real(*makers)

    def inodes():
        return {p.suffixes[0]: p.stat().st_ino for p in (tmp_path / "data/train").iterdir()}

    monkeypatch.setattr(module, "code_digest", code)
    first = prepare([recipe(0), *EVAL], tmp_path / "data", CONFIG, workers=1)
    before = inodes()
    edited = "_write_tokens"
    assert prepare([recipe(0), *EVAL], tmp_path / "data", CONFIG, workers=1) == first
    after = inodes()
    assert after[".jpegs"] == before[".jpegs"] and after[".tokens"] != before[".tokens"]
    edited = "_write_recipes"
    assert prepare([recipe(0), *EVAL], tmp_path / "data", CONFIG, workers=1) == first
    assert inodes()[".jpegs"] != before[".jpegs"]


CHILD = """
import sys
from pathlib import Path
from tests.data.test_prepare import EVAL, SHARD, recipe
from recipe_lib.data import prepare
prepare.SHARD = SHARD
if __name__ == "__main__":
    recipes = (recipe(i, photos=i % 3) for i in range(int(sys.argv[2]) * SHARD))
    prepare.prepare([*recipes, *EVAL], Path(sys.argv[1]), prepare.StoreConfig(48, 1, 2), workers=2)
"""


def prepare_in_a_child(folder: Path, shards: int, script: str = CHILD, **options) -> subprocess.Popen:
    file = folder.parent / "child.py"
    file.write_text(script)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, str(file), str(folder), str(shards)], env=env, **options)


def kill_and_go_on(root: Path, kills: int, shards: int) -> None:
    """Prepare a store, killed with -9 again and again; assert that it ends as one that was left in peace.

    Kills fall after 30 to 90 per cent of a whole preparation: the processes' start, shards, token ids.
    """
    quiet = {"stderr": subprocess.DEVNULL}
    began = time.perf_counter()
    assert prepare_in_a_child(root / "calm", shards, **quiet).wait() == 0
    whole, rng, killed = time.perf_counter() - began, np.random.default_rng(0), 0
    for _ in range(kills):
        child = prepare_in_a_child(root / "data", shards, **quiet)
        workers = []
        try:
            child.wait(rng.uniform(0.3, 0.9) * whole)
        except subprocess.TimeoutExpired:
            workers = psutil.Process(child.pid).children(recursive=True)
            child.kill()
            child.wait()
            killed += 1
        assert not psutil.wait_procs(workers, timeout=10)[1], "the workers end with their parent"
        if (root / "data").exists():
            assert Store(root / "data").card["recipes"]["val"] == 1, "what has the name is whole"
    assert killed >= kills / 3
    assert prepare_in_a_child(root / "data", shards, **quiet).wait() == 0
    assert files(root / "data") == files(root / "calm")
    assert sorted(p.name for p in root.iterdir()) == ["calm", "child.py", "data"]


def test_killed_three_times_the_store_is_the_same_and_no_process_stays(tmp_path):
    """Ten times and with more shards: ./run_all.sh bench kills"""
    kill_and_go_on(tmp_path, kills=3, shards=8)


def test_no_space_left_is_one_line_and_no_store(tmp_path):
    limits = "import resource, signal\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)\n"
    script = limits + "signal.signal(25, signal.SIG_IGN)\n" + CHILD
    child = prepare_in_a_child(tmp_path / "data", 2, script, stderr=subprocess.PIPE, text=True)
    error = child.communicate()[1].splitlines()[-1]
    assert child.returncode and "DataError" in error and ".jpegs: cannot be written (File too large)" in error
    assert not (tmp_path / "data").exists()


def test_links_out_of_the_photos_folder_are_not_followed(tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "secret.jpg")
    inside = tmp_path / "photos"
    inside.mkdir()
    (inside / "a.jpg").symlink_to(tmp_path / "secret.jpg")
    (inside / "b.jpg").write_bytes((tmp_path / "secret.jpg").read_bytes())
    linked = recipe(0, images=[inside / "a.jpg"], image_root=inside.resolve())
    kept = recipe(1, images=[inside / "b.jpg"], image_root=inside.resolve())
    card = prepare([linked, kept, *EVAL], tmp_path / "data", CONFIG)
    assert card["recipes"] == {"test": 1, "text_only": 1, "train": 1, "val": 1}
    assert "recipe r0" in card["skipped"][0] and "link that leaves" in card["skipped"][0]


def test_a_table_of_classes_is_used_with_its_aliases(tmp_path):
    table = IngredientClasses(["broth", "onion"], [0, 0], {"stock": 0})
    card = prepare([recipe(0), *EVAL], tmp_path / "data", CONFIG, classes=table)
    assert card["ingredient_classes"] == {"broth": 1, "onion": 1}
    assert Store(tmp_path / "data").split("train").labels.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="holds 2 ingredient classes, ingredient_classes is 3"):
        prepare([recipe(0), *EVAL], tmp_path / "data", StoreConfig(32, 1, 3), classes=table)


def test_names_beyond_the_lines_are_labels_without_a_line(tmp_path):
    prepare([recipe(0, names=["onion", "stock", None, "salt"]), *EVAL], tmp_path / "data", StoreConfig(32, 1, 3))
    store = Store(tmp_path / "data")
    found = [store.classes.names[label] for label in store.split("train").labels]
    assert list(zip(found, store.split("train").positions.tolist(), strict=True)) == [
        ("onion", 0), ("stock", 1), ("salt", -1)
    ]  # fmt: skip


def test_recipes_without_any_photo_are_counted_where_they_cannot_train(tmp_path):
    card = prepare([recipe(0), recipe(1, photos=0), recipe(2, "val", 0), *EVAL], tmp_path / "data", CONFIG)
    assert card["recipes"]["text_only"] == 1 and card["without_photo"] == {"val": 1} and not card["skipped"]


def test_broken_photo_is_named_and_the_recipe_still_trains_as_text(tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    card = prepare(
        [recipe(0), recipe(1, images=[broken]), recipe(2, "val", images=[broken]), *EVAL], tmp_path / "data", CONFIG
    )
    assert card["recipes"] == {"test": 1, "text_only": 1, "train": 1, "val": 1}
    assert "recipe r1" in card["skipped"][0] and "broken.jpg" in card["skipped"][0]
    assert any("recipe r2: no photo in split val" in line for line in card["skipped"])


def test_errors_leave_no_store(tmp_path):
    with pytest.raises(DataError, match="recipe r0: the id is there twice"):
        prepare([recipe(0), recipe(0)], tmp_path / "data", CONFIG)
    with pytest.raises(DataError, match="no training recipe has a photo"):
        prepare([recipe(0, photos=0)], tmp_path / "data", CONFIG)
    with pytest.raises(DataError, match="no pair fell into the validation"):
        prepare([recipe(0), recipe(1, "val")], tmp_path / "data", CONFIG)
    assert not (tmp_path / "data").exists()
    with pytest.raises(DataError, match="run notebook 01"):
        Store(tmp_path / "data")


def test_an_old_store_stays_until_the_new_one_is_whole(tmp_path):
    prepare([recipe(0), *EVAL], tmp_path / "data", CONFIG)

    def dying():
        yield recipe(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(dying(), tmp_path / "data", CONFIG)
    assert Store(tmp_path / "data").split("train").ids == ["r0"]
    prepare([recipe(2), *EVAL], tmp_path / "data", CONFIG)
    assert Store(tmp_path / "data").split("train").ids == ["r2"]


def test_a_copy_that_was_killed_is_no_store_to_go_on_with(tmp_path, monkeypatch):
    """Without hard links the finished shards are copied: half of one must not pass for a shard."""
    first = prepare([recipe(0), *EVAL], tmp_path / "data", CONFIG)

    def no_links(*_):
        raise OSError("no hard links here")

    def half(source, target, **_):
        Path(target).write_bytes(Path(source).read_bytes()[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr("os.link", no_links)
    whole = shutil.copyfile
    monkeypatch.setattr("shutil.copyfile", half)
    with pytest.raises(KeyboardInterrupt):
        prepare([recipe(0), *EVAL], tmp_path / "data", CONFIG)
    monkeypatch.setattr("shutil.copyfile", whole)
    assert prepare([recipe(0), *EVAL], tmp_path / "data", CONFIG) == first
    assert Store(tmp_path / "data").split("train").ids == ["r0"] and {p.name for p in tmp_path.iterdir()} == {"data"}


def test_further_recipes_are_prepared_as_those_of_the_store_are(tmp_path, tiny_store):
    """The same recipes give the same ids, labels and photos: nothing is learnt from them, not a word and no class."""
    recipes = list(cook(KitchenConfig(train=96, val=24, test=30, text_only=20, seed=3)))
    iid = [recipe for recipe in recipes if recipe.split == "iid"]
    text = [recipe for recipe in recipes if recipe.split == "text_only"]
    strange = Recipe("strange", "Qwxyz", ["1 qwxyz"], [], [], "test")
    more = prepare_more([*iid, *text, strange], tmp_path / "more", tiny_store)
    assert more.card["recipes"] == {"train": len(iid), TEXT_ONLY: len(text) + 1}
    was, now = tiny_store.split("iid"), more.split("train")
    for name in ("words", "sentence_start", "recipe_start", "ingredient_lines", "labels", "label_start", "positions"):
        assert np.array_equal(getattr(was, name), getattr(now, name)), name
    assert [now.photo(row) for row in range(len(now))] == [was.photo(row) for row in range(len(was))]
    assert more.split(TEXT_ONLY).ids[-1] == "strange" and more.split(TEXT_ONLY).label_matrix()[-1].sum() == 0
    assert more.classes == tiny_store.classes and more.tokenizer.to_str() == tiny_store.tokenizer.to_str()
    assert prepare_more(iid[:3], tmp_path / "more", tiny_store).card["recipes"] == {"train": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more"]


def test_names_make_each_line_one_token(tmp_path):
    """By the source's names, or by rules where it brings none; a line without one is empty."""
    own = [
        recipe(0, ingredients=["2 spoons of EVOO", " ", "salt", "?"], names=["olive oil", None, "salt", None]),
        recipe(1, ingredients=["1 tablespoon olive oil", "3 fat eggs"], instructions=["Add olive oil."]),
    ]
    config = replace(CONFIG, text_tokens="names", min_word_count=2)
    card = prepare([*own, *EVAL], tmp_path / "data", config)
    store = Store(tmp_path / "data")
    split = store.split("train")
    assert card["vocabulary"] == store.tokenizer.get_vocab_size()
    token = store.tokenizer.token_to_id("olive_oil")
    sentences = [
        split.words[a:b].tolist() for a, b in zip(split.sentence_start, split.sentence_start[1:], strict=False)
    ]
    lines = [sentences[a + 1 : a + 1 + n] for a, n in zip(split.recipe_start, split.ingredient_lines, strict=False)]
    assert lines[0][0] == lines[1][0] == [1, token, 2]
    assert lines[0][1:] == [[1, 3, 2], [1, 2]] and split.positions.max() < 3
    plain = prepare([*own, *EVAL], tmp_path / "plain", replace(config, text_tokens="words"))
    assert plain["vocabulary"] == card["vocabulary"] - 1
