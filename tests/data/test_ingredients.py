"""Ingredient names by rules, and the classes made of them."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe_lib.data.ingredients import IngredientClasses, ingredient_name, ingredient_names, mentions
from recipe_lib.data.recipe import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared test data is not here")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("½ tsp ground cloves", "clove"),
        ("4 cloves garlic, minced", "garlic"),
        ("2-4 sprigs fresh herbs", "herb"),
        ("Salt and pepper", "salt"),
        ("Zest of 1 lemon", "lemon"),
        ("juice and zest of 2 limes", "lime"),
        ("Spaghetti: 320 g | 11 oz", "spaghetti"),
        ("3 tbsp extra-virgin olive oil", "olive oil"),
        ("1 ½ cups (12 fluid ounces) vegetable stock", "vegetable stock"),
        ("1½ pounds boneless, skinless chicken thighs", "chicken thigh"),
        ("1 (14.5 oz (411 g)) can chickpeas", "chickpea"),
        ("185g/6½oz plain flour", "flour"),
        ("1,5 dl cream", "cream"),
        ("1/2lb. ground beef", "beef"),
        ("2 - 3 large eggs", "egg"),
        ("1 or 2 onions.", "onion"),
        ("1 cup half and half", "half-and-half"),
        ("2 tomatoes – diced", "tomato"),
        ("a handful of berries for serving", "berry"),
        ("1 bay leaf", "bay leaf"),
        ("2 celery ribs", "celery"),
        ("oats", "oats"),
        ("150 g asparagus", "asparagus"),
        ("6 radishes", "radish"),
        ("Optional: sour cream", "sour cream"),
        ("chocolate sprinkles", "chocolate sprinkles"),
        ("Handful of spinach/kale", "spinach"),
        ("butter (unclosed note", "butter"),
        ("Frosting", "frosting"),
        ("For the filling:", None),
        ("4 cups", None),
        ("(spices)", None),
        ("", None),
        ("12", None),
        ("3个鸡蛋", "个鸡蛋"),
        ("鸡蛋 2个", "鸡蛋"),
        ("हल्दी 1 चम्मच", "हल्दी चम्मच"),
        ("2 כפות שמן", "כפות שמן"),
        ("1 jalapen\u0303o", "jalapeño"),
    ],
)
def test_names(line, name):
    assert ingredient_name(line) == name


@given(st.text())
def test_any_text_gives_a_clean_name_or_none(line):
    name = ingredient_name(line)
    assert name is None or (name == name.lower().strip() != "" and len(name.splitlines()) == 1 and ";" not in name)


@given(
    st.lists(
        st.sampled_from(
            "2 1/2 ½ cups g large fresh ground red cloves garlic tomatoes and or , ( ) leaves - lemon zest of s".split()
        )
    )
)
def test_a_name_is_its_own_name(words):
    name = ingredient_name(" ".join(words))
    assert name is None or ingredient_name(name) == name


def test_long_lines_cost_little():
    assert ingredient_name("(" * 100_000) is None
    assert len(ingredient_name("flour " * 20_000).split()) <= 6


@needs_shared
def test_agreement_with_the_shared_detections():
    """Those rules merge no synonyms and join "salt and pepper"; everything else should mostly agree."""
    layers = [json.loads((SHARED / "recipe1m_layout" / name).read_text()) for name in ("layer1.json", "det_ingrs.json")]
    lines = {recipe["id"]: [item["text"] for item in recipe["ingredients"]] for recipe in layers[0]}
    pairs = [
        (ingredient_name(line), detected["text"])
        for recipe in layers[1]
        for line, detected, valid in zip(lines[recipe["id"]], recipe["ingredients"], recipe["valid"], strict=True)
        if valid
    ]
    same = sum(ours == theirs for ours, theirs in pairs)
    near = sum(ours is not None and (ours in theirs or theirs in ours) for ours, theirs in pairs)
    print(f"{len(pairs)} lines, the same name {same / len(pairs):.1%}, one within the other {near / len(pairs):.1%}")
    assert same > 0.88 * len(pairs) and near > 0.97 * len(pairs)


@needs_shared
def test_lines_in_twenty_languages():
    for row in (SHARED / "multilingual" / "recipes.jsonl").read_text(encoding="utf-8").splitlines():
        names = [ingredient_name(line) for line in json.loads(row)["ingredients"]]
        assert any(names), row[:80]


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("salt and pepper", "salt;?pepper"),
        ("Salt & freshly ground black pepper, to taste", "salt;?black pepper"),
        ("1 tbsp each salt and pepper (optional)", "salt;?pepper"),
        ("2 tbsp butter and 1 tbsp flour for the pan", "butter;?flour"),
        ("macaroni and cheese", "macaroni;?cheese"),
        ("red and green pepper", "red;?green pepper"),
        ("1 cup half and half", "half-and-half"),
        ("chopped and peeled apple", "apple"),
        ("juice and zest of 1 lemon", "lemon"),
        ("lemon juice and zest", "lemon"),
        ("salt, pepper and oil", "salt"),
        ("salt and pepper and oil", "salt"),
        ("oil and/or butter", "oil"),
        ("salt or pepper", "salt"),
        ("kosher salt and table salt", "salt"),
        ("and", None),
    ],
)
def test_two_names_of_a_line(line, names):
    assert ingredient_names(line) == names
    assert (names or "").split(";")[0] == (ingredient_name(line) or "")


def test_a_line_counts_for_each_class_that_it_names():
    classes = IngredientClasses(["salt", "pepper", "cheese", "macaroni", "pepper jack"], [1] * 5, {"mac and cheese": 2})
    labels = {
        "salt;pepper": [0, 1], "pepper ; salt;salt": [1, 0], "salt;gold": [0], "gold;salt": [0],
        "salt;?pepper": [0, 1], "macaroni;?cheese": [3, 2], "salt;?gold": [0], "gold;?salt": [],
        "salt and pepper": [0, 1], "salt & pepper": [0, 1], "salt and gold": [], "gold and salt": [],
        "mac;?cheese": [2], "mac and cheese": [2], "salt and pepper and cheese": [], "": [], ";": [], ";?": [],
    }  # fmt: skip
    for name, expected in labels.items():
        assert classes.label(["salt", None, name]) == [(0, 0), *((2, index) for index in expected)], name
    dish = IngredientClasses(["macaroni", "macaroni and cheese", "cheese"], [1] * 3)
    assert dish.label(["macaroni;?cheese", "macaroni and cheese"]) == [(0, 1), (1, 1)], "a class as a whole is not cut"
    names = ["salt;pepper", "oil;?egg", None]
    assert mentions(names) == {"salt", "pepper", "oil"} and mentions(names, classes) == {"salt", "pepper"}


def from_recipes(recipes, k):
    return IngredientClasses.from_counts(Counter(name for names in recipes for name in mentions(names)), k)


def test_classes_count_recipes_and_break_ties_by_name():
    recipes = [["salt", "egg", "salt"], ["salt", None, "milk"], ["egg", "flour", ""], ["salt", "milk"]]
    classes = from_recipes(recipes, 3)
    assert classes.names == ["salt", "egg", "milk"] and classes.counts == [3, 2, 2]
    assert classes.label(["milk", None, "flour", "salt", "milk"]) == [(0, 2), (3, 0), (4, 2)]
    assert classes.label([]) == []


def test_a_table_takes_the_numbers_of_the_recipes():
    table = IngredientClasses(["egg", "salt"], [9, 9], {"eggs": 0})
    recipes = [["egg", "eggs"], ["eggs", "flour"], ["salt", "egg"]]
    counted = table.recounted(Counter(name for names in recipes for name in mentions(names, table)))
    assert counted.names == table.names and counted.counts == [3, 1] and counted.aliases == {"eggs": 0}
    with pytest.raises(DataError, match="'salt': no paired training recipe"):
        table.recounted({"egg": 1})


@pytest.mark.parametrize("k", [0, -1, 5])
def test_impossible_number_of_classes(k):
    with pytest.raises(DataError, match="choose 1 to 4"):
        from_recipes([["a", "b"], ["c", "d"]], k)


def test_edited_aliases_are_honoured(tmp_path):
    table = "\ufeffclass,name,recipes,aliases\r\n0,olive oil,12,evoo; olio d'oliva ;\r\n\r\n1,salt,9,\r\n"
    (tmp_path / "classes.csv").write_text(table, encoding="utf-8", newline="")
    classes = IngredientClasses.load(tmp_path / "classes.csv")
    assert classes.label(["salt", "evoo", "olio d'oliva", "pepper"]) == [(0, 1), (1, 0), (2, 0)]
    classes.save(tmp_path / "again.csv")
    assert IngredientClasses.load(tmp_path / "again.csv") == classes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.csv", "classes.csv"]


@pytest.mark.parametrize(
    ("rows", "line", "reason"),
    [
        ("0,salt,9,\n1,salt,3,", 3, "'salt' is already"),
        ("0,salt,9,sea salt\n1,pepper,3,sea salt", 3, "'sea salt' is already"),
        ("0,salt,9,salt", 2, "already"),
        ("0,salt,9", 2, "must be 0,name"),
        ("0,salt,nine,", 2, "must be 0,name"),
        ("0,salt,9,\n2,egg,3,", 3, "must be 1,name"),
        ("0,,9,", 2, "must be 0,name"),
        ('0,"salt,9,\n', 2, "must be 0,name"),
    ],
)
def test_malformed_tables(tmp_path, rows, line, reason):
    path = tmp_path / "classes.csv"
    path.write_text(f"class,name,recipes,aliases\n{rows}\n")
    with pytest.raises(DataError, match=reason) as error:
        IngredientClasses.load(path)
    assert str(error.value).startswith(f"{path}:{line}") or line == 2


def test_tables_that_are_none(tmp_path):
    for data in (b"", b"name\nsalt\n", b"class,name,recipes,aliases\n", b"class,name,recipes,aliases\n0,\xff,1,\n"):
        (tmp_path / "classes.csv").write_bytes(data)
        with pytest.raises(DataError, match="classes.csv"):
            IngredientClasses.load(tmp_path / "classes.csv")
    with pytest.raises(DataError, match="gone.csv"):
        IngredientClasses.load(tmp_path / "gone.csv")


texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)


@given(recipes=st.lists(st.lists(st.none() | texts, max_size=5), min_size=1), data=st.data())
def test_save_and_load_give_the_same_classes(tmp_path_factory, recipes, data):
    parts = {part for names in recipes for name in names if name for part in name.split(";")}
    available = {" ".join(part.split()) for part in parts if not part.startswith("?")} - {""}
    if not available:
        with pytest.raises(DataError):
            from_recipes(recipes, 1)
        return
    classes = from_recipes(recipes, data.draw(st.integers(1, len(available))))
    path = tmp_path_factory.mktemp("classes") / "classes.csv"
    classes.save(path)
    loaded = IngredientClasses.load(path)
    assert loaded == classes
    for names in recipes:
        assert loaded.label(names) == classes.label(names)
    assert classes.counts == sorted(classes.counts, reverse=True)
