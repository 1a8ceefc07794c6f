import json
import shutil

import numpy as np
import pytest

from recipe_lib.data.categories import add_categories, category_of, frequent_pairs, title_categories
from recipe_lib.data.ingredients import IngredientClasses
from recipe_lib.data.loading import Draw, StudyDataset
from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.recipe import DataError, Recipe
from recipe_lib.data.store import Store

TITLES = (
    ["Chicken Soup"] * 5 + ["Easy Chicken Soup with Rice Pudding"] * 2 + ["Rice Pudding"] * 4 + ["Mac and Cheese"] * 9
)


def test_pairs_are_of_neighbouring_words_that_say_something():
    pairs = frequent_pairs([title.lower() for title in TITLES])
    assert pairs == ["mac cheese", "chicken soup", "rice pudding", "soup rice"]  # "easy chicken" says nothing
    assert frequent_pairs(["a b c", "x"], most=0) == []


def test_the_more_frequent_pair_takes_a_title_and_a_rare_one_is_none():
    table = title_categories(TITLES, 10, rare=2)
    # "mac cheese" stands in no title as a string; two of the six puddings went to the soup, which had more.
    assert (table.names, table.counts) == (["chicken soup", "rice pudding"], [7, 4])
    assert title_categories(TITLES, 1, rare=2).names == ["chicken soup"]
    assert title_categories(TITLES, 10, rare=4).names == ["chicken soup"]
    with pytest.raises(DataError, match="give a categories_file"):
        title_categories(TITLES, 10, rare=20)


def test_a_title_has_the_first_category_that_it_holds_and_a_known_dish_its_own():
    phrases = {"chicken soup": 0, "rice pudding": 1, "hühnersuppe": 0}
    assert category_of("Rice pudding after CHICKEN SOUP", "", phrases) == 0
    assert category_of("Hühnersuppe", "", phrases) == 0
    assert category_of("Chickensoup", "", phrases) == -1
    assert category_of("Chicken Soup", "rice pudding", phrases) == 1
    assert category_of("Chicken Soup", "pie", phrases) == -1


@pytest.fixture
def copied(tiny_store, tmp_path):
    shutil.copytree(tiny_store.folder, tmp_path / "data")
    return tmp_path / "data"


def test_the_kitchen_knows_its_dishes(copied):
    card = add_categories(copied, 1000)
    store = Store(copied)
    names = IngredientClasses.load(copied / "categories.csv").names
    assert card == store.card and card["categories"]["n"] == len(names) > 3
    for name in ("train", "iid"):
        split = store.split(name)
        assert [names[i] for i in split.categories] == [truth["dish"] for truth in split.truth]
    all_of_them = store.split("train").categories
    few = add_categories(copied, 2)["categories"]
    assert few["n"] == 2 and few["labelled"]["train"] == sum(all_of_them < 2)
    assert set(Store(copied).split("train").categories) == {-1, 0, 1}
    assert few["sha256"] != card["categories"]["sha256"]


def test_a_batch_has_categories_only_where_they_are_asked_for(copied):
    add_categories(copied, 1000)
    split, draw = Store(copied).split("train"), Draw(np.array([3, 1, 7]), True, 0)
    asked, plain = (StudyDataset(split, 48, augment=True, category=asked)[draw] for asked in (True, False))
    assert asked.category.tolist() == split.categories[[3, 1, 7]].tolist() and plain.category is None
    assert (asked.images == plain.images).all()


def test_of_real_recipes_training_titles_alone_make_the_table(tmp_path):
    """And the table, edited, is taken back: row for row, aliases too."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    titles = {
        "train": ["Apple Pie"] * 22 + ["Fish Soup"] * 21 + ["Bean Stew"] * 5,
        "val": ["Bean Stew"] * 30 + ["Apple Pie"],
    }
    titles["test"] = ["My apple pie", "Nothing"]
    recipes = [
        Recipe(f"{split}{i}", title, ["1 apple"], ["bake"], [pixels], split)
        for split, own in titles.items() for i, title in enumerate(own)
    ]  # fmt: skip
    folder = tmp_path / "data"
    prepare(recipes, folder, StoreConfig(16, 1, 1), workers=1)
    with pytest.raises(DataError, match="no categories here"):
        _ = Store(folder).split("train").categories
    card = add_categories(folder, 1000)
    assert card["categories"]["labelled"] == {"train": 43, "val": 1, "test": 1}
    assert (folder / "categories.csv").read_text() == "class,name,recipes,aliases\n0,apple pie,22,\n1,fish soup,21,\n"
    (tmp_path / "mine.csv").write_text("class,name,recipes,aliases\n0,Bean Stew,0,fish soup\n")
    card = add_categories(folder, 1000, IngredientClasses.load(tmp_path / "mine.csv"))
    assert card["categories"]["labelled"] == {"train": 26, "val": 30, "test": 0}
    assert Store(folder).split("test").categories.tolist() == [-1, -1]
    assert json.loads((folder / "card.json").read_text())["categories"]["n"] == 1
    with pytest.raises(DataError, match="no training recipe has one"):
        add_categories(folder, 1000, IngredientClasses(["plum cake"], [1]))
