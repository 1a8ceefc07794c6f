"""Tables of recipes through the library `datasets`: columns by mapping, photos as bytes, bad rows named, streamed."""

import io
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.recipe import DataError
from recipe_lib.data.store import Store
from recipe_lib.kitchen.model import KitchenConfig
from recipe_lib.sources.cookbook import read_cookbook
from recipe_lib.sources.hub import read_hub
from recipe_lib.sources.read import read_source

pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def jpeg(colour=0, size=(16, 12)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (colour, 90, 90)).save(out, "JPEG")
    return out.getvalue()


def table(path: Path, rows: list[dict], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def row(i: int, **change) -> dict:
    photo = {"bytes": jpeg(i % 256), "path": f"{i}.jpg"}
    return {
        "title": f"Soup {i}",
        "ingredients": ["carrot", f"{i} g salt"],
        "instructions": ["Boil."],
        "image": photo,
    } | change


def everything(data: Path, **options):
    recipes, report = read_hub(data, **options)
    return list(recipes), report


def test_a_parquet_file_becomes_a_store_with_the_photos_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("recipe_lib.data.prepare.HELD", 10 * len(jpeg()))
    path = table(tmp_path / "recipes[1].parquet", [row(i) for i in range(60)], row_group_size=8)
    options = {"val": 0.2, "test": 0.2, "table": {"split": "train", "columns": []}}
    recipes, report = read_source("hub", str(path), KitchenConfig(), **options)
    prepare(recipes, tmp_path / "store", StoreConfig(12, 1, 2), workers=1)
    store = Store(tmp_path / "store")
    assert len(list((tmp_path / "store" / "shards").glob("0000?.json"))) in (5, 6), "large photos end a shard early"
    assert (report.pairs, report.text_only, report.skipped) == (60, 0, [])
    seen = {}
    for name in ("train", "val", "test"):
        split = store.split(name)
        for i, title in enumerate(split.titles):
            seen[title] = np.asarray(Image.open(io.BytesIO(split.photo(i))))[..., 0].mean()
    assert len(seen) == 60 and all(abs(red - int(title.split()[1])) < 3 for title, red in seen.items())


def test_splits_ids_and_twins_are_those_of_a_cookbook(tmp_path):
    (tmp_path / "book").mkdir()
    Image.new("RGB", (16, 12)).save(tmp_path / "book" / "a.jpg")
    rows = [{"id": f"r{i}", "title": f"T{i}", "ingredients": ["x"], "instructions": ["y"]} for i in range(80)]
    lines = [json.dumps(r | {"images": ["a.jpg"]}) for r in rows]
    (tmp_path / "book" / "recipes.jsonl").write_text("\n".join(lines))
    book = {recipe.id: recipe.split for recipe in read_cookbook(tmp_path / "book")[0]}
    rows = [r | {"image": {"bytes": jpeg(), "path": None}} for r in rows]
    path = table(tmp_path / "t.parquet", [*rows, rows[3] | {"id": "again", "title": "t3!"}])
    recipes, report = everything(path)
    assert {recipe.id: recipe.split for recipe in recipes} == book
    assert report.duplicates == ["row 81: 'again' repeats row 4"]
    bare = [{k: v for k, v in r.items() if k != "id"} for r in rows]
    first, shuffled = (everything(table(tmp_path / f"{n}.parquet", bare[:: 1 - 2 * n]))[0] for n in (0, 1))
    assert {r.id: (r.title, r.split) for r in first} == {r.id: (r.title, r.split) for r in shuffled}


def test_columns_by_other_names_and_texts_that_stand_for_lists(tmp_path):
    rows = [
        {"Name": "Pie", "ingr": "['1 apple', 'flour']", "how": "Peel.\nBake.", "pic": jpeg(), "from": "a", "n": 7},
        {"Name": "Tea", "ingr": "water|tea", "how": "Pour.", "pic": None, "from": "b", "n": 8},
    ]
    columns = ["title: Name", "ingredients: ingr", "instructions: how", "images: pic", "id: n", "source: from"]
    recipes, report = everything(table(tmp_path / "t.parquet", rows), columns=columns, shift=["source: a"])
    pie, tea = recipes
    assert (pie.id, pie.title, pie.ingredients, pie.instructions) == (
        "7",
        "Pie",
        ["1 apple", "flour"],
        ["Peel.", "Bake."],
    )
    assert (pie.split, tea.split, tea.ingredients, tea.images) == ("shift", "train", ["water", "tea"], [])
    assert (report.pairs, report.text_only) == (1, 1)
    for columns, word in ((["title: nome"], "no column 'nome'; it has Name, ingr"), (["title"], "'field: column'")):
        with pytest.raises(DataError, match=word):
            read_hub(tmp_path / "t.parquet", columns=columns)
    with pytest.raises(DataError, match=r"no recipe found \(row 1 \('7'\): no ingredients .* see hub_columns"):
        everything(tmp_path / "t.parquet", columns=["id: n"])


def test_image_features_lists_of_images_and_folders_are_not_decoded_by_the_library(tmp_path, monkeypatch):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture

    for kind, value in ((Picture(), {"bytes": b"no image", "path": None}), (List(Picture()), [jpeg(1), jpeg(2)])):
        features = Features({"title": Value("string"), "steps": List(Value("string")), "image": kind})
        values = value if isinstance(value, dict) else [{"bytes": photo, "path": None} for photo in value]
        data = {
            "title": ["A", "B"],
            "steps": [["x"], ["y"]],
            "image": [values, values and ([] if isinstance(values, list) else None)],
        }
        folder = tmp_path / type(kind).__name__ / "data"
        folder.mkdir(parents=True)
        Dataset.from_dict(data, features).to_parquet(folder / "train-00000-of-00001.parquet")
    (lists, _), report = everything(tmp_path / "List")[0], everything(tmp_path / "List")[1]
    assert lists.images == [jpeg(1), jpeg(2)] and report.pairs == 1
    with pytest.raises(DataError, match="no photo can be used: 1 broken .*row 1: photo: not an image"):
        everything(tmp_path / "Image")


def test_an_image_folder_and_paths_that_leave_it(tmp_path):
    Image.new("RGB", (16, 12)).save(tmp_path / "secret.jpg")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (16, 12)).save(folder / f"{name}.jpg")
    lines = [{"file_name": f"{n}.jpg", "title": n, "ingredients": ["x"], "instructions": ["y"]} for n in "ab"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipes, report = everything(folder)
    assert [recipe.images for recipe in recipes] == [[folder / "a.jpg"], [folder / "b.jpg"]], report
    names = ["pictures/a.jpg", "../secret.jpg", str(tmp_path.parent / "x.jpg"), "gone.jpg", "https://x.org/a.jpg"]
    rows = [row(i, image={"bytes": None, "path": name}) for i, name in enumerate(names)]
    recipes, report = everything(table(tmp_path / "in" / "t.parquet", [*rows, row(9)]))
    assert [bool(recipe.images) for recipe in recipes] == [False] * 5 + [True]
    assert (len(report.refused_photos), len(report.missing_photos), report.remote_photos) == (2, 2, 1)


def test_bad_rows_are_named_and_the_rest_is_read(tmp_path):
    bomb = b"BM" + (0).to_bytes(12, "little") + (40).to_bytes(4, "little") + (60000).to_bytes(4, "little") * 2
    bomb += b"\1\0\30\0" + bytes(24)
    rows = [
        row(0, title=None), row(1, ingredients=None, instructions=None), row(2, image=None),
        row(3, image={"bytes": b"", "path": None}), row(4, image={"bytes": bomb, "path": None}),
        row(5, image={"bytes": jpeg(size=(400, 300))[:-300], "path": None}), row(6),
    ]  # fmt: skip
    recipes, report = everything(table(tmp_path / "t.parquet", rows), val=0, test=0)
    assert [recipe.title for recipe in recipes] == [f"Soup {i}" for i in range(2, 7)]
    assert [line.partition(": ")[2] for line in report.skipped] == [
        "title missing",
        "no ingredients and no instructions",
    ]
    assert report.broken_photos[0].startswith("row 5: photo: the header declares far over")
    assert (report.pairs, report.text_only) == (2, 3), (
        "that half of the pixels are missing is for the preparation to see"
    )


def test_it_is_streamed_and_a_torn_file_ends_in_one_line(tmp_path):
    path = table(tmp_path / "t.parquet", [row(i) for i in range(400)], row_group_size=20)
    first = pq.ParquetFile(path).metadata.row_group(10).column(0).file_offset or path.stat().st_size // 2
    data = bytearray(path.read_bytes())
    middle = slice(path.stat().st_size // 2, path.stat().st_size // 2 + 4000)
    data[middle] = bytes(4000)
    path.write_bytes(data)
    recipes, _ = read_hub(path)
    assert first and len(list(islice(recipes, 100))) == 100, "what comes before the torn part is not held up by it"
    with pytest.raises(DataError, match="cannot be read to its end") as error:
        list(recipes)
    assert "\n" not in str(error.value)


def test_one_id_twice_and_data_that_are_not_there(tmp_path):
    rows = [row(i) | {"id": "same"} for i in range(2)]
    with pytest.raises(DataError, match="row 2: the id 'same' is there twice"):
        everything(table(tmp_path / "t.parquet", rows))
    (tmp_path / "no.parquet").write_bytes(b"no table")
    (tmp_path / "empty").mkdir()
    cases = {tmp_path / "no.parquet": "cannot be read", tmp_path / "empty": "cannot be read", "../x/y": "no such file"}
    for data, word in cases.items():
        with pytest.raises(DataError, match=word) as error:
            read_hub(data)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="split 'gone' cannot be read"):
        read_hub(tmp_path / "t.parquet", split="gone")


def test_without_the_library_one_line_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from recipe_lib.sources.hub import read_hub\nread_hub('someone/recipes')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith("install it: pip install 'datasets>=4.0'")
