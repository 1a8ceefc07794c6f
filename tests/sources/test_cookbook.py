"""A folder of one's own recipes: four formats, photos that stay inside, and a report that names what was left out."""

import csv
import json
import os
import stat
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from recipe_lib.data.recipe import DataError, Recipe
from recipe_lib.sources.cookbook import read_cookbook

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared test data is not here")
SOUP = {"id": "soup", "title": "Soup", "ingredients": ["1 carrot"], "instructions": ["Boil."], "images": []}


def photo(path: Path, colour="red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), colour).save(path)
    return path


def json_lines(folder: Path, *rows, name="recipes.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def only(folder: Path) -> Recipe:
    recipes, report = read_cookbook(folder)
    assert len(recipes) == 1, report
    return recipes[0]


def test_json_lines(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    json_lines(
        tmp_path, SOUP | {"id": "b"}, SOUP | {"id": "a", "title": "Stew", "images": ["a.jpg", "a.jpg"], "more": 1}
    )
    recipes, report = read_cookbook(tmp_path, val=0, test=0)
    assert [recipe.id for recipe in recipes] == ["a", "b"]
    assert recipes[0] == Recipe("a", "Stew", ["1 carrot"], ["Boil."], [tmp_path / "images" / "a.jpg"], "train")
    assert (report.pairs, report.text_only, report.skipped) == (1, 1, [])


def test_whole_sources_are_held_back_and_another_field_holds_the_lines(tmp_path):
    soup = SOUP | {"images": ["a.jpg"], "stars": 5}
    rows = [soup | {"id": f"{i}", "title": f"Soup {i}", "source": f"book {i % 3}"} for i in range(30)]
    rows = [row | {"plain": [f"carrot {row['id']}"]} for row in rows]
    photo(json_lines(tmp_path / "lines", *rows) / "a.jpg")
    photo(tmp_path / "table" / "a.jpg")
    with (tmp_path / "table" / "book.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "title", "ingredients", "plain", "instructions", "images", "Source"])
        table.writerows([r["id"], r["title"], "x", r["plain"][0], "Boil.", "a.jpg", r["source"]] for r in rows)
    for folder in ("lines", "table"):
        options = {"shift": ["source: book 1", "source: none"], "ingredients": "plain"}
        recipes, _ = read_cookbook(tmp_path / folder, **options)
        held = {recipe.id for recipe in recipes if recipe.split == "shift"}
        assert held == {row["id"] for row in rows if row["source"] == "book 1"}, folder
        assert {recipe.split for recipe in recipes} == {"train", "val", "test", "shift"}
        assert all(recipe.ingredients == [f"carrot {recipe.id}"] for recipe in recipes)
        others = {r.id: r.split for r in read_cookbook(tmp_path / folder)[0] if r.id not in held}
        assert others == {r.id: r.split for r in recipes if r.id not in held}, "the others stay where they were"
        with pytest.raises(DataError, match="no recipe with photo has source: none; see test_shift"):
            read_cookbook(tmp_path / folder, shift=["source: none"])


def test_markdown_and_json_ld_have_other_fields_too(tmp_path):
    photo(tmp_path / "a.jpg")
    for i in range(4):
        front = f"title: Soup {i}\nsource: book {i % 2} \nplain: [carrot {i}]\nimages: a.jpg"
        (tmp_path / f"{i}.md").write_text(f"---\n{front}\n---\n## Ingredients\n- {i} carrots\n## Steps\n1. Boil.\n")
    cake = {"@type": "Recipe", "name": "Cake", "source": "book 1 ", "plain": ["egg"], "image": "a.jpg"}
    (tmp_path / "cake.json").write_text(json.dumps([cake | {"recipeIngredient": "2 eggs"}, cake | {"plain": "x"}]))
    (tmp_path / "bare.md").write_text("# Bare\n## Ingredients\n- salt\n")
    recipes, report = read_cookbook(tmp_path, shift=["source: book 1"], ingredients="Plain")
    assert {r.title for r in recipes if r.split == "shift"} == {"Soup 1", "Soup 3", "Cake"}
    assert {tuple(r.ingredients) for r in recipes} == {("egg",), *((f"carrot {i}",) for i in range(4))}
    assert any("bare.md ('Bare'): no field 'plain'; see ingredients_field" in line for line in report.skipped)


def test_a_photo_without_an_end_takes_linear_time(tmp_path):
    (tmp_path / "a.md").write_text("# Pie\n## Ingredients\n- salt\n![x](" + "A" * 300_000)
    begin = time.perf_counter()
    assert len(read_cookbook(tmp_path)[0]) == 1 and time.perf_counter() - begin < 5


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(tmp_path, delimiter):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png")
    with (tmp_path / "book.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(["Title", "Ingredients", "Directions", "Image"])
        table.writerow(["Cake, plain", "2 eggs\nSpaghetti: 320 g | 11 oz\n\n", "Mix|Bake", "a.png|b.png"])
        table.writerow(["No photo", "salt", "", ""])
        table.writerow(["Too long", "salt", "Stir", "", "what is this"])
    recipes, report = read_cookbook(tmp_path)
    cake = next(recipe for recipe in recipes if recipe.title == "Cake, plain")
    assert cake.ingredients == ["2 eggs", "Spaghetti: 320 g | 11 oz"] and cake.instructions == ["Mix", "Bake"]
    assert [path.name for path in cake.images] == ["a.png", "b.png"]
    assert len(recipes) == 2 and len(report.skipped) == 1 and "book.csv:7: more cells" in report.skipped[0]


def test_json_ld(tmp_path):
    for name in "abcd":
        photo(tmp_path / f"{name}.png")
    steps = [
        {
            "@type": "HowToSection",
            "name": "Dough",
            "itemListElement": [{"@type": "HowToStep", "text": "Mix."}, "Knead."],
        },
        {"@type": "HowToStep", "name": "Bake."},
    ]
    images = ["a.png", {"@type": "ImageObject", "url": "./b.png"}, {"contentUrl": "c.png"}, "https://x.org/d.png"]
    bread = {"@type": ["Thing", "Recipe"], "name": "Bread", "recipeIngredient": ["flour"], "image": images}
    tea = {"@type": "https://schema.org/Recipe", "name": "Tea", "recipeIngredient": "tea", "image": "d.png"}
    tea["recipeInstructions"] = "<p>Boil &amp; pour.</p><p>Wait.</p>"
    graph = {"@context": "https://schema.org", "@graph": [{"@type": "WebSite"}, bread | {"recipeInstructions": steps}]}
    (tmp_path / "bread.json").write_text(json.dumps(graph))
    (tmp_path / "tea.jsonld").write_text(json.dumps([[tea]]))
    (tmp_path / "package.json").write_text('{"name": "site"}')
    recipes, report = read_cookbook(tmp_path)
    by_title = {recipe.title: recipe for recipe in recipes}
    assert by_title["Bread"].instructions == ["Mix.", "Knead.", "Bake."]
    assert [path.name for path in by_title["Bread"].images] == ["a.png", "b.png", "c.png"]
    assert (by_title["Tea"].ingredients, by_title["Tea"].instructions) == (["tea"], ["Boil & pour.", "Wait."])
    assert report.remote_photos == 1 and report.skipped == ["package.json: holds no recipe"]


def test_markdown_sections(tmp_path):
    photo(tmp_path / "my pie.png")
    photo(tmp_path / "b.png")
    text = """# Apple pie #
![The pie](my%20pie.png "warm") and ![](<b.png>)

## Ingredients (for 4)
* 2 [apples](http://x.org)
- [ ] **sugar**
### For the crust
1. flour
200 g butter

## Method
1. Peel
   the apples.
2. Bake.

Let it cool
for an hour.
## Notes
Not a step.
"""
    (tmp_path / "pie.md").write_text(text)
    pie = only(tmp_path)
    assert pie.title == "Apple pie" and [path.name for path in pie.images] == ["my pie.png", "b.png"]
    assert pie.ingredients == ["2 apples", "sugar", "flour", "200 g butter"]
    assert pie.instructions == ["Peel the apples.", "Bake.", "Let it cool for an hour."]


def test_markdown_front_matter(tmp_path):
    photo(tmp_path / "sub" / "a.png")
    front = "---\ntitle: 'Soup: hot'\nimage: a.png\ningredients:\n- \"water: 1 l\"\ndirections:\n- Boil\n---\n"
    (tmp_path / "sub" / "soup.md").write_text(front + "# Other title\n")
    (tmp_path / "README.md").write_text("# My cookbook\nRecipes I like.\n")
    soup = only(tmp_path)
    assert (soup.title, soup.ingredients, soup.instructions) == ("Soup: hot", ["water: 1 l"], ["Boil"])
    assert [path.name for path in soup.images] == ["a.png"]


@pytest.mark.parametrize(
    ("front", "reason"),
    [
        ("title: x\ningredients:\n- Spaghetti: 320 g", "ingredients holds"),
        ("title: x\ningredients: salt", "ingredients is str"),
        ("title: 300\ningredients: [a]", "title is int"),
        ("- a\n- b", "not made of lines"),
    ],
)
def test_front_matter_of_wrong_types_is_named(tmp_path, front, reason):
    json_lines(tmp_path, SOUP)
    (tmp_path / "x.md").write_text(f"---\n{front}\n---\n")
    recipes, report = read_cookbook(tmp_path)
    assert len(recipes) == 1 and report.skipped[0].startswith("x.md") and reason in report.skipped[0]


@pytest.mark.parametrize(
    "front",
    [
        "title: [",
        "title: !!python/object/apply:os.system ['touch pwned']",
        "a: &a [x, x]\ntitle: *a",
        "date: 2024-99-99\ntitle: x",
        "title: x\nservings: !!bool foo",
        "title: x\nservings: !!int ''",
        "title: x\nsince: !!timestamp y",
        "a: " + "[" * 5000,
    ],
)
def test_front_matter_that_is_not_plain_yaml_stops(tmp_path, front, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.md").write_text(f"---\n{front}\n---\n")
    with pytest.raises(DataError, match="x.md") as error:
        read_cookbook(tmp_path)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["x.md"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ingredients": "salt"}, "ingredients is str"),
        ({"ingredients": None}, "ingredients is NoneType"),
        ({"ingredients": ["salt", 3]}, "ingredients holds '3'"),
        ({"ingredients": ["salt", 0]}, "ingredients holds '0'"),
        ({"ingredients": [None]}, "ingredients holds 'None'"),
        ({"instructions": {"a": "b"}}, "instructions is dict"),
        ({"title": None}, "title missing"),
        ({"title": 7}, "title is int"),
        ({"id": ["a"]}, "id is list"),
        ({"id": True}, "id is bool"),
        ({"images": 5}, "images is int"),
        ({"images": [5]}, "images holds '5'"),
        ({"ingredients": [], "instructions": [" ", "\u0000"]}, "no ingredients and no instructions"),
    ],
)
def test_wrong_types_are_skipped_and_named(tmp_path, change, reason):
    json_lines(tmp_path, SOUP, SOUP | {"id": "bad", "title": "Bad"} | change)
    recipes, report = read_cookbook(tmp_path)
    assert [recipe.id for recipe in recipes] == ["soup"]
    assert len(report.skipped) == 1 and reason in report.skipped[0]
    assert report.skipped[0].startswith("recipes.jsonl:2 (") and "skipped: recipes.jsonl:2" in str(report)


def test_a_line_that_is_no_object(tmp_path):
    json_lines(tmp_path, SOUP, ["Soup"], "Soup", {"ingredients": ["salt"]})
    recipes, report = read_cookbook(tmp_path)
    assert len(recipes) == 1 and len(report.skipped) == 3 and "title missing" in report.skipped[2]


def test_empty_fields_are_kept_while_something_is_left(tmp_path):
    rows = [
        {"id": "a", "title": "", "ingredients": ["x"]},
        {"id": "b", "title": "B", "ingredients": [], "instructions": ["y"]},
    ]
    recipes, _ = read_cookbook(json_lines(tmp_path, *rows))
    assert [(r.title, r.ingredients, r.instructions) for r in recipes] == [("", ["x"], []), ("B", [], ["y"])]


@pytest.mark.parametrize(
    ("name", "data", "where"),
    [
        ("a.jsonl", b'{"title": "x"}\n{"title": ', "a.jsonl:2"),
        ("a.jsonl", b'{"title": "\xff"}\n', "a.jsonl:1"),
        ("a.jsonl", b'{"title": ' + b"9" * 5000 + b"}", "a.jsonl:1"),
        ("a.json", b"[" * 100_000, "a.json"),
        ("a.json", b'{"@type": "Recipe"', "a.json"),
        ("a.csv", b'title,ingredients\nx,"y', "a.csv:2"),
        ("a.csv", b"title,ingredients\n\xff,y\n", "a.csv"),
        ("a.csv", b"title,ingredients\nx," + b"y" * 200_000, "a.csv:2"),
        ("a.md", b"# \xff", "a.md"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_left_out_and_named(tmp_path, name, data, where):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as error:
        read_cookbook(tmp_path)
    assert "no recipe found" in str(error.value) and where in str(error.value) and "\n" not in str(error.value)
    json_lines(tmp_path / "good", SOUP)
    recipes, report = read_cookbook(tmp_path)
    assert [recipe.id for recipe in recipes] == ["soup"]
    (line,) = [line for line in report.broken_files + report.skipped if line.startswith(f"{where}: ")]
    assert len(line) < 250 and (line in report.broken_files) == (not name.endswith("jsonl"))
    assert ("1 broken files: " + line in str(report)) == (not name.endswith("jsonl"))


def test_a_broken_file_is_left_out_whole_and_a_broken_line_alone(tmp_path):
    json_lines(tmp_path, SOUP)
    (tmp_path / "more.jsonl").write_text('{"title": "cut\n{"title": "Bread", "ingredients": ["flour"]}\n')
    (tmp_path / "book.csv").write_text('title,ingredients\nPie,apples\n,\nCake,"flour\n')
    recipes, report = read_cookbook(tmp_path)
    assert sorted(recipe.title for recipe in recipes) == ["Bread", "Soup"], "of the table not even the first rows"
    assert len(report.broken_files) == 1 and report.broken_files[0].startswith("book.csv:4: not a sound CSV table")
    assert [line.split(": ")[0] for line in report.skipped] == ["more.jsonl:1"]


def test_photos_of_which_none_can_be_used_say_why(tmp_path):
    root, secret = tmp_path / "book", photo(tmp_path / "elsewhere" / "a.jpg")
    json_lines(root, *(SOUP | {"id": f"{i}", "title": f"{i}", "images": [f"{i}.jpg"]} for i in range(3)))
    for i in range(3):
        (root / f"{i}.jpg").symlink_to(secret)
    reason = (
        r"no photo can be used: 3 outside the folder \(first: recipes.jsonl:1: '0.jpg' leaves the cookbook's folder\)"
    )
    with pytest.raises(DataError, match=reason) as error:
        read_cookbook(root)
    assert str(root) in str(error.value) and "\n" not in str(error.value)
    (root / "1.jpg").unlink()
    (root / "2.jpg").unlink()
    (root / "2.jpg").write_bytes(b"cut")
    with pytest.raises(DataError, match="1 outside the folder, 1 missing, 1 broken"):
        read_cookbook(root)
    photo(root / "1.jpg")
    assert read_cookbook(root)[1].pairs == 1
    far = json_lines(tmp_path / "far", SOUP | {"images": ["https://x.org/a.jpg"]})
    with pytest.raises(DataError, match="1 remote \\(first: remote photos are never fetched\\)"):
        read_cookbook(far)


def test_roots_that_are_none(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for root, reason in (("gone", "no such folder"), ("file", "not a folder"), ("empty", "no recipe found")):
        with pytest.raises(DataError, match=reason):
            read_cookbook(tmp_path / root)
    json_lines(tmp_path / "bad", {"title": None})
    with pytest.raises(DataError, match="title missing"):
        read_cookbook(tmp_path / "bad")


@pytest.mark.parametrize("options", [{"val": -0.1}, {"test": -1}, {"val": 0.5, "test": 0.5}, {"limit": 0}])
def test_impossible_shares(tmp_path, options):
    with pytest.raises(DataError, match="shares"):
        read_cookbook(json_lines(tmp_path, SOUP), **options)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    locked = json_lines(tmp_path / "locked", SOUP)
    locked.chmod(0)
    try:
        for root in (tmp_path, locked):
            with pytest.raises(DataError, match="permissions"):
                read_cookbook(root)
    finally:
        locked.chmod(stat.S_IRWXU)


def test_the_same_id_names_both_places(tmp_path):
    json_lines(tmp_path, SOUP, SOUP | {"id": "x", "title": "X"})
    json_lines(tmp_path / "more", SOUP | {"title": "Another"}, name="b.jsonl")
    with pytest.raises(DataError, match=r"more/b.jsonl:1 and recipes.jsonl:1 share the id 'soup'"):
        read_cookbook(tmp_path)


def test_duplicates_are_dropped_and_reported(tmp_path):
    rows = [SOUP | {"id": "c", "title": "SOUP!"}, SOUP | {"id": "a"}, SOUP | {"id": "b", "ingredients": ["2 carrots"]}]
    plain = [{"id": i, "title": "T", "ingredients": [], "instructions": [step]} for i, step in (("d", "x"), ("e", "y"))]
    recipes, report = read_cookbook(json_lines(tmp_path, *rows, *plain))
    assert [recipe.id for recipe in recipes] == ["a", "b", "d", "e"]
    assert report.duplicates == ["recipes.jsonl:1: 'c' repeats 'a' (recipes.jsonl:2)"]


def test_made_ids_are_stable_and_differ(tmp_path):
    row = {"title": "Soup", "instructions": ["Boil."]}
    json_lines(tmp_path / "one", row | {"ingredients": ["a"]}, row | {"ingredients": ["b"]})
    json_lines(
        tmp_path / "two", row | {"ingredients": ["a"]}, row | {"ingredients": ["b"]}, row | {"ingredients": ["c"]}
    )
    one, two = (read_cookbook(tmp_path / name)[0] for name in ("one", "two"))
    assert len({recipe.id for recipe in two}) == 3
    assert {r.id: r.ingredients for r in one}.items() <= {r.id: r.ingredients for r in two}.items()


def test_photos_that_leave_the_folder_are_refused(tmp_path):
    secret = photo(tmp_path / "secret.jpg")
    root = tmp_path / "book"
    photo(root / "images" / "good.jpg")
    photo(root / "top.jpg")
    (root / "images" / "link.jpg").symlink_to(secret)
    (root / "images" / "inside.jpg").symlink_to("good.jpg")
    (root / "loop.jpg").symlink_to("loop.jpg")
    out = ["../secret.jpg", "%2e%2e/secret.jpg", str(secret), "link.jpg", "images/link.jpg", "../top.jpg", "a\0.jpg"]
    out += [f"file://{secret}", "C:\\secret.jpg", "../" * 20 + "etc/passwd"]
    inside = ["inside.jpg", "images/../top.jpg"]
    json_lines(
        root, SOUP | {"images": out + inside + ["loop.jpg", "x" * 5000, "https://x.org/a.jpg", "//x.org/a.jpg", ""]}
    )
    json_lines(root / "sub", SOUP | {"id": "s", "title": "S", "images": ["../top.jpg"]})
    recipes, report = read_cookbook(root)
    assert [path.relative_to(root).as_posix() for path in recipes[1].images] == ["images/good.jpg", "top.jpg"]
    assert [path.name for path in recipes[0].images] == ["top.jpg"]
    assert len(report.refused_photos) == len(out), report.refused_photos
    assert all(line.startswith("recipes.jsonl:1: '") for line in report.refused_photos)
    assert (len(report.missing_photos), report.remote_photos) == (2, 2)


def test_recipe_files_that_are_links_or_hidden_are_not_read(tmp_path):
    json_lines(tmp_path / "elsewhere", SOUP | {"id": "stolen", "title": "Stolen"})
    root = json_lines(tmp_path / "book", SOUP)
    json_lines(root / ".git", SOUP)
    (root / "link.jsonl").symlink_to(tmp_path / "elsewhere" / "recipes.jsonl")
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(root / "pipe.json")
    recipes, report = read_cookbook(root)
    assert [recipe.id for recipe in recipes] == ["soup"]
    assert sorted(line.split(":")[0] for line in report.skipped) == ["link.jsonl", "pipe.json"]


def test_broken_and_missing_photos_leave_a_text_only_recipe(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(photo(tmp_path / "good.jpg").read_bytes()[:200])
    (tmp_path / "empty.jpg").write_bytes(b"")
    rows = [
        SOUP | {"images": ["cut.jpg", "gone.jpg"]},
        SOUP | {"id": "t", "title": "T", "images": ["good.jpg", "empty.jpg"]},
        SOUP | {"id": "u", "title": "U", "images": "good.jpg"},
    ]
    recipes, report = read_cookbook(json_lines(tmp_path, *rows), val=0, test=0.99)
    assert [len(recipe.images) for recipe in recipes] == [0, 1, 1]
    assert recipes[0].split == "train"
    assert (
        len(report.broken_photos) == 2 and "cut.jpg" in report.broken_photos[0] and "empty" in report.broken_photos[1]
    )
    assert report.missing_photos == ["recipes.jsonl:1: 'gone.jpg'"]
    assert (report.pairs, report.text_only) == (2, 1)


def test_splits_follow_the_id_alone(tmp_path):
    photo(tmp_path / "a.png")
    rows = [SOUP | {"id": f"{i}", "title": f"{i}", "images": ["a.png"] if i % 4 else []} for i in range(800)]
    json_lines(tmp_path / "all", *rows)
    json_lines(tmp_path / "half", *rows[::-2])
    for name in ("all", "half"):
        photo(tmp_path / name / "a.png")
    whole, half = (read_cookbook(tmp_path / name, val=0.1, test=0.3)[0] for name in ("all", "half"))
    splits = {recipe.id: recipe.split for recipe in whole}
    assert all(splits[recipe.id] == recipe.split for recipe in half)
    assert {recipe.split for recipe in whole if not recipe.images} == {"train"}
    counts = Counter(recipe.split for recipe in whole if recipe.images)
    assert abs(counts["test"] / 600 - 0.3) < 0.08 and abs(counts["val"] / 600 - 0.1) < 0.06
    assert [recipe.id for recipe in whole] == sorted(splits)
    assert [recipe.id for recipe in read_cookbook(tmp_path / "all", limit=7)[0]] == sorted(splits)[:7]


def test_odd_characters(tmp_path):
    line = "👩‍🍳 שמן \u202eمرق\u202c cafe\u0301 \u0000\ud800 a\tb\x1b[31m"
    soup = only(json_lines(tmp_path, SOUP | {"title": line, "id": "\ud83d x"}))
    assert soup.title == "👩‍🍳 שמן \u202eمرق\u202c cafe\u0301 a b[31m" and soup.id == "x"
    soup.title.encode()


anything = st.text(st.characters(), max_size=20)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(anything, st.lists(anything, max_size=3), st.lists(anything, max_size=3)), min_size=1, max_size=4
    )
)
def test_any_text_comes_back_clean(tmp_path_factory, rows):
    fields = [{"id": i, "title": t, "ingredients": a, "instructions": b} for i, (t, a, b) in enumerate(rows)]
    root = json_lines(tmp_path_factory.mktemp("book"), *fields, SOUP)
    recipes, report = read_cookbook(root)
    assert len(recipes) + len(report.skipped) + len(report.duplicates) == len(rows) + 1
    str(report).encode()
    for recipe in recipes:
        if recipe.id == "soup":
            continue
        for ours, theirs in (
            (recipe.ingredients, rows[int(recipe.id)][1]),
            (recipe.instructions, rows[int(recipe.id)][2]),
        ):
            assert all(line == " ".join(line.split()) != "" for line in ours)
            "".join(ours).encode()
            kept = [c for c in "".join(theirs) if c.isalnum()]
            assert [c for c in "".join(ours) if c.isalnum()] == kept


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200), st.sampled_from(["md", "csv", "json", "jsonl"]))
def test_any_file_is_read_or_named(tmp_path_factory, text, kind):
    root = json_lines(tmp_path_factory.mktemp("book"), SOUP)
    (root / f"x.{kind}").write_text(
        {"md": "---\n", "csv": "title,ingredients\n"}.get(kind, "") + text, encoding="utf-8"
    )
    recipes, report = read_cookbook(root)
    assert recipes and all(f"x.{kind}" in line and len(line.splitlines()) == 1 for line in report.broken_files)


@needs_shared
def test_all_real_recipes_come_through():
    recipes, report = read_cookbook(SHARED / "real_recipes")
    assert (report.pairs, report.text_only, sum(len(recipe.images) for recipe in recipes)) == (939, 1441, 946)
    assert len(str(report).splitlines()) == 1, "nothing was left out"
    counts = Counter(recipe.split for recipe in recipes if recipe.images)
    assert 110 < counts["test"] < 175 and 110 < counts["val"] < 175


@needs_shared
@pytest.mark.parametrize("name", ["jsonld", "markdown"])
def test_shared_schema_org_folders(name):
    recipes, report = read_cookbook(SHARED / "schema_org" / name)
    assert (report.pairs, report.text_only, report.skipped) == (20, 0, [])
    assert all(recipe.title and recipe.ingredients and recipe.instructions for recipe in recipes)


@needs_shared
def test_several_formats_and_many_languages():
    assert read_cookbook(SHARED / "schema_org")[1].pairs == 40
    recipes, report = read_cookbook(SHARED / "multilingual")
    assert (report.pairs, report.text_only) == (60, 141)
    assert all("".join([recipe.title, *recipe.ingredients]).encode() for recipe in recipes)
