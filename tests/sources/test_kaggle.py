"""The Kaggle set in the layout that it is downloaded in, with what is odd in it."""

import csv
from pathlib import Path

import pytest
from PIL import Image

from recipe_lib.data.recipe import DataError
from recipe_lib.sources.cookbook_formats import literal_lines
from recipe_lib.sources.kaggle import read_kaggle

LAYOUT = Path(__file__).parents[3] / "shared" / "data" / "kaggle_layout"
HEADER = ["", "Title", "Ingredients", "Instructions", "Image_Name", "Cleaned_Ingredients"]
NAME = "Food Ingredients and Recipe Dataset with Image Name Mapping.csv"


def unpacked(folder: Path, *rows: list[str], photos=("pie",), header=HEADER) -> Path:
    (folder / "Food Images" / "Food Images").mkdir(parents=True)
    for name in photos:
        Image.new("RGB", (12, 10), "red").save(folder / "Food Images" / "Food Images" / f"{name}.jpg")
    with (folder / NAME).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


@pytest.mark.skipif(not LAYOUT.is_dir(), reason="the shared test data is not here")
def test_the_real_rows():
    recipes, report = read_kaggle(LAYOUT)
    with (LAYOUT / NAME).open(encoding="utf-8", newline="") as file:
        rows = {row[""]: row for row in csv.DictReader(file)}
    assert (report.pairs, report.text_only, len(report.skipped), len(rows)) == (35, 4, 3, 42)
    assert [line.partition(" ('")[2][:5].strip("'):") for line in report.skipped] == ["9636", "12373", "12378"]
    assert sum("#NAME?" in line for line in report.missing_photos) == 2 and len(report.missing_photos) == 4
    by_id = {recipe.id: recipe for recipe in recipes}
    assert {id for id, recipe in by_id.items() if not recipe.images} == {"5", "11", "4606", "8504"}
    for id, recipe in by_id.items():
        row = rows[id]
        assert recipe.title == " ".join(row["Title"].split())
        assert [path.stem for path in recipe.images] in ([row["Image_Name"]], [])
        text = " ".join(recipe.instructions)
        assert text == " ".join(row["Instructions"].split()) and "\n" not in text
        assert all(line.split()[0] in row["Ingredients"] for line in recipe.ingredients)
    assert by_id["2939"].ingredients[0] == r"8 pasture-\xadraised eggs", "its backslash is kept"
    assert len({by_id[id].images[0].read_bytes() for id in ("7230", "7245")}) == 1, "one photo, two recipes: both stay"
    assert by_id["8059"].ingredients == [] and by_id["8059"].images
    assert by_id["1"].ingredients[3] == "¾ teaspoon finely ground black pepper"


def test_bad_rows_are_named_and_the_others_read(tmp_path):
    good = ["7", 'A "Pie"', '[\'1 apple\', "2\\" crust"]', "Peel.\nBake.\n", "pie", "['apple']"]
    rows = [
        good,
        ["8", " ", "['x']", "Boil.", "pie", ""],
        ["9", "Code", "[__import__('os').system('touch pwned')]", "Boil.", "pie", ""],
        ["10", "Nested", "[" * 5000, "Boil.", "pie", ""],
        ["11", "Formula", "['carrot']", "Boil.", "#NAME?", ""],
        ["12", "Outside", "['leek']", "Boil.", "../../../secret", ""],
        ["13", "Lost", "['bean']", "Boil.", "", ""],
        ["14", "A pie", "['1 apple']", "Bake.", "pie", "['plain apple']"],
    ]
    Image.new("RGB", (12, 10)).save(tmp_path / "secret.jpg")
    recipes, report = read_kaggle(unpacked(tmp_path / "set", *rows), val=0, test=0)
    by_id = {recipe.id: recipe for recipe in recipes}
    assert by_id.keys() == {"7", "11", "12", "13", "14"} and report.pairs == 2
    assert (by_id["7"].title, by_id["7"].ingredients) == ('A "Pie"', ["1 apple", '2" crust'])
    assert by_id["7"].instructions == ["Peel.", "Bake."] and by_id["7"].images[0].name == "pie.jpg"
    reasons = [line.partition(": ")[2] for line in report.skipped]
    assert reasons == ["title missing", *["ingredients is str, must be a list of texts"] * 2]
    assert "'#NAME?.jpg'" in report.missing_photos[0] and "'../../../secret.jpg'" in str(report)
    assert not Path("pwned").exists()
    cleaned = read_kaggle(tmp_path / "set", ingredients="cleaned_ingredients")[0]
    assert {r.id: r.ingredients for r in cleaned}["14"] == ["plain apple"]


def test_a_folder_that_is_not_the_set_says_what_it_needs(tmp_path):
    unpacked(tmp_path / "other", ["1", "Pie", "['apple']"], header=["", "Title", "Ingredients"])
    for folder, word in (("other", "no column Instructions"), ("gone", "no such folder")):
        with pytest.raises(DataError, match=word) as error:
            read_kaggle(tmp_path / folder)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="no photo can be used: 1 missing"):
        read_kaggle(unpacked(tmp_path / "bare", ["1", "Pie", "['apple']", "Bake.", "cake", ""]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", []),
        (" ['a', \"b's\", 'c\\'d',] ", ["a", "b's", "c'd"]),
        (r"['½', '\xbd', 'a\d']", ["½", "½", r"a\d"]),
    ],
)
def test_a_list_of_plain_texts_is_a_literal(text, expected):
    assert literal_lines(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "nan", "['a'", "('a',)", "['a' 'b']", "[b'a']", "[f'{1}']", "['a', 1]", "[['a']]", "['a'] + ['b']"),
        *(r"['\N{no such name}']", "['a\nb']", "[" * 100_000, "['a'," + "-" * 100_000 + "1]", "['" + "x" * (1 << 17)),
        *("['\\" + "\\" * 99_999, "[" + "'', " * 30_000 + "!"),
    ],
)
def test_anything_else_is_a_text(text):
    assert literal_lines(text) == text
