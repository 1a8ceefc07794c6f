import io
import json

import numpy as np
import pytest
from PIL import Image

from recipe_lib.data.recipe import DataError, Recipe
from recipe_lib.data.store import ROW_GROUP, SHARD, Store, StoreConfig, prepare

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
CONFIG = StoreConfig(32, min_word_count=1, ingredient_classes=2)


def recipe(i, split="train", photos=1, **changes):
    fields = {
        "id": f"r{i}", "title": f"Soup {i}", "ingredients": ["1 onion, chopped", "2 cups stock", "1 onion"],
        "instructions": ["Chop.", "Boil 3 cups."], "images": [PHOTO] * photos, "split": split,
    }  # fmt: skip
    return Recipe(**fields | changes)


EVAL = [recipe("v", "val"), recipe("t", "test")]


def test_round_trip(tmp_path):
    recipes = [recipe(i) for i in range(3)] + [recipe(3, "val"), recipe(4, photos=0), recipe(5, "test", photos=2)]
    card = prepare(recipes, tmp_path / "data", CONFIG)
    assert card["recipes"] == {"test": 1, "text_only": 1, "train": 3, "val": 1}
    store = Store(tmp_path / "data")
    split = store.split("test")
    assert split.ids == ["r5"] and split.recipe(0)["ingredients"] == recipes[0].ingredients
    photos = split.photos(0)
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
    assert words[:3] == [["soup", "0"], ["1", "onion", ",", "chopped"], ["2", "cups", "stock"]]
    assert split.ingredient_lines.tolist() == [3] and len(words) == 1 + 3 + 2
    names = [store.classes.names[label] for label in split.labels]
    assert list(zip(names, split.positions.tolist(), strict=True)) == [("onion", 0), ("stock", 1), ("onion", 2)]
    assert split.label_matrix().sum() == 2


def test_limits_and_empty_fields(tmp_path):
    long = recipe(0, ingredients=["onion"] * 500 + ["stock"], instructions=["very " * 20_000])
    bare = recipe(1, title="", ingredients=["", "stock"], instructions=[])
    prepare([long, bare, *EVAL], tmp_path / "data", CONFIG)
    split = Store(tmp_path / "data").split("train")
    lengths = np.diff(split.sentence_start)
    assert lengths.max() <= 15 and lengths.min() >= 1, "an empty field is one <unk>, no mean is over nothing"
    assert np.diff(split.recipe_start).tolist() == [1 + 20 + 1, 1 + 1 + 1]
    assert split.positions[split.label_start[0] : split.label_start[1]].tolist() == [*range(20), *[-1] * 481]
    assert split.positions[split.label_start[1] :].tolist() == [0], "the empty line before it was not tokenised"


def test_the_card_knows_the_photos(tmp_path):
    """Other photos under the same text are other data: a checkpoint trained on the first must not be taken up."""
    cards = [prepare([recipe(0, images=[PHOTO // d]), *EVAL], tmp_path / "data", CONFIG) for d in (1, 2, 1)]
    assert cards[0] == cards[2] and cards[0]["sha256"] != cards[1]["sha256"]
    assert cards[0]["ingredient_classes"] == {"onion": 1, "stock": 1}


def test_rows_are_found_across_shards_and_row_groups(tmp_path):
    n = SHARD + ROW_GROUP + 5
    tiny = np.zeros((8, 8, 3), np.uint8)
    recipes = (recipe(i, images=[np.full_like(tiny, i % 251)]) for i in range(n))
    prepare([*recipes, *EVAL], tmp_path / "data", StoreConfig(8, 1, 2))
    split = Store(tmp_path / "data").split("train")
    assert len(split) == n
    for row in (0, ROW_GROUP - 1, ROW_GROUP, SHARD - 1, SHARD, n - 1):
        assert split.recipe(row)["id"] == f"r{row}" == split.ids[row]
        assert abs(int(np.asarray(Image.open(io.BytesIO(split.photos(row)[0])))[0, 0, 0]) - row % 251) <= 3


def test_same_recipes_same_bytes(tmp_path):
    for name in ("a", "b"):
        prepare([recipe(i) for i in range(4)] + EVAL, tmp_path / name, CONFIG)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


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
    assert not list(tmp_path.iterdir()), "nothing half-made is left"
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


def test_unknown_split_names_those_there_are(tiny_store):
    with pytest.raises(DataError, match="it has do_context, do_ingredients, iid"):
        tiny_store.split("tset")
    assert tiny_store.test_splits == ["iid", "do_context", "do_ingredients"]
    assert json.loads((tiny_store.folder / "card.json").read_text())["recipes"]["train"] == 96
