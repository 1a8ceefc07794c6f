"""The terminal: a table, JSON, a CSV for a folder, recipes as text; what goes wrong is one line."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from recipe_lib.search import command
from recipe_lib.search.engine import RecipeSearch


@pytest.fixture
def photos(study, dishes, tmp_path):
    """A folder of three photos, one of them broken, and a file that is no photo."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    for name, pixels in zip(("a.png", "c.jpg"), list(dishes.values())[:2], strict=True):
        Image.fromarray(pixels).save(folder / name)
    (folder / "b.jpg").write_bytes(b"no photo")
    (folder / "notes.txt").write_text("no photo either")
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = command.main([*map(str, arguments)])
    return status, *capsys.readouterr()


def test_a_table(photos, capsys):
    status, out, err = run(capsys, "tiny", photos / "a.png", "--top", 3)
    hits = RecipeSearch.load("tiny").search(photos / "a.png", 3)
    assert status == 0 and err == ""
    lines = out.splitlines()
    assert lines[1] == f"{photos / 'a.png'}  (tiny, debiased, 230 recipes)"
    for rank, (line, hit) in enumerate(zip(lines[2:5], hits.hits, strict=True), 1):
        assert line.split()[:2] == [str(rank), f"{hit.similarity:.2f}"] and hit.title[:70] in line
    seen = [f"{name} {100 * p:.0f} %" for name, p in list(hits.ingredients.items())[:10] if p >= 0.05]
    assert lines[5] == f"seen in it: {', '.join(seen) or 'nothing'}" and len(lines) == 6


def test_json_holds_the_recipes(photos, capsys):
    status, out, _ = run(capsys, "tiny", photos / "a.png", photos / "c.jpg", "--json", "--recipes", "val", "--top", 4)
    first, second = map(json.loads, out.splitlines())
    assert status == 0 and (first["asked"], second["asked"]) == (str(photos / "a.png"), str(photos / "c.jpg"))
    search = RecipeSearch.load("tiny", recipes=["val"])
    for answer, name in ((first, "a.png"), (second, "c.jpg")):
        hits = search.search(photos / name, 4).hits
        assert [recipe["id"] for recipe in answer["recipes"]] == [hit.id for hit in hits]
        assert answer["recipes"][0]["instructions"] == hits[0].recipe["instructions"]
        assert answer["variant"] == "debiased" and all(0 <= p <= 1 for p in answer["ingredients"].values())


def test_a_folder_leaves_a_csv_and_names_what_it_left_out(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "tiny", photos, "--top", 5, "--variant", "baseline")
    assert status == 0 and out == "my photos_recipes.csv: the recipes of 2 photos, 1 left out\n"
    assert err == f"left out: {photos / 'b.jpg'}: not an image\n"
    with open(tmp_path / "my photos_recipes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    hits = RecipeSearch.load("tiny", "baseline").search(photos / "c.jpg", 5).hits
    assert [row["photo"] for row in rows] == ["a.png"] * 5 + ["c.jpg"] * 5
    assert [(row["rank"], row["id"], row["from"]) for row in rows[5:]] == [
        (str(rank), hit.id, hit.part.name) for rank, hit in enumerate(hits, 1)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my photos", "my photos_recipes.csv"]


def test_a_recipe_as_text(photos, tmp_path, capsys):
    (tmp_path / "soup.txt").write_text("Tomato soup\n\n2 tomatoes\n\nBoil them.")
    status, out, _ = run(capsys, "tiny", "--text", tmp_path / "soup.txt", "--top", 2)
    hits = RecipeSearch.load("tiny").photos("Tomato soup\n\n2 tomatoes\n\nBoil them.", 2)
    assert status == 0 and [line[12:82].strip() for line in out.splitlines()[2:]] == [hit.title[:70] for hit in hits]


def test_good_photos_are_answered_beside_a_bad_one(photos, capsys):
    status, out, err = run(capsys, "tiny", photos / "b.jpg", photos / "a.png", photos / "none.jpg", "--json")
    assert status == 1 and len(out.splitlines()) == 1
    assert err.splitlines() == [
        f"error: {photos / 'b.jpg'}: not an image", f"error: {photos / 'none.jpg'}: no such image file"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "a.png"], "nothing: no finished study here; run it first"),
        (["nothing"], "nothing: no finished study here; run it first"),  # the page
        (["tiny", "a.png", "--variant", "oracle"], "the oracle is told the ingredients"),
        (["tiny", "a.png", "--recipes", "none"], "none: no such split or folder"),
        (["tiny", "a.png", "--top", "0"], "--top 0: must be 1 or more"),
        (["tiny", "--text", "none.txt"], "none.txt"),
        (["tiny", "."], "no photo in it"),
        (["tiny", "--host", "no.address"], "--host no.address: not an address"),
    ],
)
def test_what_is_wrong_is_one_line(study, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert status == 1 and out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_a_terminal_shows_that_an_index_is_made(photos, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _, _, err = run(capsys, "tiny", photos / "a.png", "--recipes", "val")
    assert err.split("\r\033[K")[1:] == ["loading tiny", "encoding recipes: 0 of 24", ""]


def test_photos_are_not_touched(photos, capsys):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in photos.iterdir()}
    run(capsys, "tiny", photos / "a.png")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in photos.iterdir()} == before
    assert not np.array_equal(*(np.asarray(Image.open(photos / name).convert("RGB")) for name in ("a.png", "c.jpg")))
