"""Answers are those of the evaluation, whatever is searched with and whatever is searched."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from recipe_lib.data.images import ImageError
from recipe_lib.data.loading import Draw, StudyDataset
from recipe_lib.data.recipe import DataError
from recipe_lib.evaluation.scores import encode
from recipe_lib.losses import posterior
from recipe_lib.search import engine
from recipe_lib.search.engine import RecipeSearch, moves
from recipe_lib.search.photo import other_surroundings
from recipe_lib.search.text import parse_recipe
from recipe_lib.systems.saving import load_system, save_system
from tests.search.conftest import TRAINING


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def as_text(recipe: dict) -> str:
    parts = (recipe["title"], "Ingredients", *recipe["ingredients"], "Method", *recipe["instructions"])
    return "\n".join(parts)


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    a, b = (x.double().numpy() for x in (a, b))
    return np.array([[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in b] for x in a])


@pytest.mark.parametrize("variant", ["debiased", "debiased@no_z", "baseline"])
def test_a_photo_of_the_user_ranks_recipes_as_the_evaluation_does(study, dishes, variant):
    search = RecipeSearch.load("tiny", variant, ["iid"])
    split = search.store.split("iid")
    folder = {"baseline": "02_baseline_training"}.get(variant, "04_debiasing_training/debiased")
    system = load_system(study / folder)
    encoded = encode(system, split, crop=48)
    term = 0 if variant.endswith("@no_z") else encoded.z
    cosine = cosines(encoded.embedding + term, encoded.recipes)
    for row in (0, 7, 29):
        answer = search.search(png(dishes[split.ids[row]]), top=30)
        assert [hit.similarity for hit in answer.hits] == pytest.approx(sorted(cosine[row], reverse=True), abs=1e-5)
        assert cosine[row][[hit.row for hit in answer.hits]] == pytest.approx(
            [h.similarity for h in answer.hits], abs=1e-5
        )
        if encoded.logits is None:
            assert answer.ingredients == {}
        else:
            p = posterior(encoded.logits[row])
            assert list(answer.ingredients) == [search.store.classes.names[i] for i in p.argsort(descending=True)]
            assert list(answer.ingredients.values()) == pytest.approx(p.sort(descending=True).values.tolist(), abs=1e-5)


def test_a_photo_is_prepared_as_the_store_prepares_it(study, dishes, tmp_path):
    search = RecipeSearch.load("tiny", recipes=["iid"])
    split = search.store.split("iid")
    seen = StudyDataset(split, 48)[Draw(np.array([4]), True, 0)].images[0].permute(1, 2, 0).numpy()
    (tmp_path / "dish.png").write_bytes(png(dishes[split.ids[4]]))
    for photo in (png(dishes[split.ids[4]]), tmp_path / "dish.png", str(tmp_path / "dish.png")):
        assert np.array_equal(search.read(photo), seen)
    assert np.array_equal(search.stored(split, 4), seen)


def test_a_recipe_as_text_ranks_photos_as_the_evaluation_does(study):
    search = RecipeSearch.load("tiny", recipes=["iid"])
    split = search.store.split("iid")
    encoded = encode(load_system(study / "04_debiasing_training/debiased"), split, crop=48)
    cosine = cosines(encoded.recipes, encoded.embedding + encoded.z)
    for row in (0, 11):
        hits = search.photos(as_text(split.recipe(row)), top=30)
        assert cosine[row][[hit.row for hit in hits]] == pytest.approx([hit.similarity for hit in hits], abs=1e-5)
        assert [hit.similarity for hit in hits] == pytest.approx(sorted(cosine[row], reverse=True), abs=1e-5)
        assert hits[0].photo == split.photo(hits[0].row)


def test_every_split_is_searched_and_each_text_comes_once(study, dishes):
    search = RecipeSearch.load("tiny")
    assert [part.name for part in search.parts] == ["iid", "do_context", "do_ingredients", "text_only", "train", "val"]
    split = search.store.split("do_context")
    hits = search.search(png(dishes[split.ids[3]]), top=150).hits
    texts = [as_text(hit.recipe) for hit in hits]
    every = {as_text(part.split.recipe(row)) for part in search.parts for row in range(len(part.split))}
    assert len(set(texts)) == len(texts) == min(150, len(every))
    assert split.recipe(3)["title"] == search.store.split("iid").recipe(3)["title"], "do_context has the recipes of iid"
    assert {hit.part.name for hit in hits} >= {"iid", "train", "text_only"} and "do_context" not in {
        hit.part.name for hit in hits
    }
    assert next(hit for hit in hits if hit.part.name == "text_only").photo is None


def test_recipes_of_a_folder_are_found_without_training(study, dishes, tmp_path):
    book = tmp_path / "my book"
    book.mkdir()
    search = RecipeSearch.load("tiny", recipes=["iid"])
    photo = png(dishes[search.store.split("iid").ids[5]])
    best = search.search(photo, top=1).hits[0].recipe
    mine = {"title": "Mine", "ingredients": ["1 stone"], "instructions": ["Boil it."]}
    (book / "a.jsonl").write_text("".join(json.dumps(recipe) + "\n" for recipe in (mine, {**best, "id": "copy"})))
    hits = RecipeSearch.load("tiny", recipes=[book]).search(photo).hits
    assert [hit.title for hit in hits] == [best["title"], "Mine"] and {hit.part.name for hit in hits} == {"my book"}
    assert hits[0].similarity == pytest.approx(search.search(photo, top=1).hits[0].similarity, abs=1e-5)
    both = RecipeSearch.load("tiny", recipes=["iid", book])
    assert len(both) == 32 and both.search(photo, top=40).hits[0].part.name == "iid", "the copy is the same recipe"
    Image.fromarray(dishes[search.store.split("iid").ids[5]]).save(book / "photo.png")
    (book / "b.jsonl").write_text(json.dumps(mine | {"title": "With photo", "images": "photo.png"}))
    grown = RecipeSearch.load("tiny", recipes=[book])
    assert len(grown) == 3 and [hit.title for hit in grown.photos("Stone\n\n1 stone")] == ["With photo"]


def test_a_folder_whose_photos_are_elsewhere_is_searched_by_its_text(study, dishes, tmp_path, caplog):
    recipe = {"title": "Soup", "ingredients": ["1 onion"], "instructions": ["Boil."], "images": ["gone.jpg"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(recipe) + "\n[broken\n")
    search = RecipeSearch.load("tiny", recipes=[tmp_path])
    assert [hit.title for hit in search.search(png(next(iter(dishes.values())))).hits] == ["Soup"]
    assert "1 skipped: a.jsonl:2" in caplog.text and "1 missing photos" in caplog.text


def test_a_broken_index_is_made_again(study, dishes):
    photo = png(next(iter(dishes.values())))
    first = [hit.id for hit in RecipeSearch.load("tiny", recipes=["iid"]).search(photo).hits]
    (study / "search/debiased/iid-recipes/index.faiss").write_bytes(b"broken")
    assert [hit.id for hit in RecipeSearch.load("tiny", recipes=["iid"]).search(photo).hits] == first


def test_an_index_is_kept_until_weights_change(study, dishes, monkeypatch):
    made = []
    whole = engine.SearchIndex.build
    monkeypatch.setattr(engine.SearchIndex, "build", lambda *a: made.append(1) or whole(*a))
    photo = png(next(iter(dishes.values())))
    told = []
    first = RecipeSearch.load("tiny", recipes=["iid", "val"]).search(photo, progress=lambda *a: told.append(a))
    assert len(made) == 2 and told == [("encoding recipes", 0, 54), ("encoding recipes", 30, 54)]
    again = RecipeSearch.load("tiny", "debiased@no_z", ["iid", "val"])
    again.search(photo)
    assert len(made) == 2, "recipes do not depend on the term"
    same = again.using("debiased").search(photo).hits
    assert [(hit.id, hit.similarity) for hit in same] == [(hit.id, hit.similarity) for hit in first.hits]
    folder = study / "04_debiasing_training/debiased"
    save_system(load_system(folder), folder)
    RecipeSearch.load("tiny", recipes=["iid", "val"]).search(photo)
    assert len(made) == 4


def test_a_large_index_is_approximate(study, dishes, monkeypatch):
    monkeypatch.setattr(engine, "LARGE", 90)
    search = RecipeSearch.load("tiny", recipes=["train", "iid"])
    assert len(search.search(png(next(iter(dishes.values()))), top=60).hits) == 60
    kinds = [type(index.index).__name__ for index in search._kept["recipes"]]
    assert kinds == ["IndexIVFScalarQuantizer", "IndexFlat"]


def test_what_moved():
    hits = {name: engine.Hit(name, name, 0.5, engine.Part("p", None, "p", ""), i) for i, name in enumerate("abcd")}
    before, after = [hits[name] for name in "abc"], [hits[name] for name in "cadb"]
    assert moves(after, before) == [2, -1, None, -2] and moves([], before) == []


def test_lines_hold_the_probability_of_their_ingredient(study, dishes):
    search = RecipeSearch.load("tiny", recipes=["iid"])
    answer = search.search(png(next(iter(dishes.values()))))
    lines = search.lines(answer.hits[0], answer)
    recipe, classes = answer.hits[0].recipe, search.store.classes
    assert [line for line, _ in lines] == recipe["ingredients"]
    for (_, p), name in zip(lines, recipe["names"], strict=False):
        assert p == (answer.ingredients[name] if name in classes.names else 0.0)
    assert any(p > 0 for _, p in lines)


def test_dar_is_searched_by_photo_and_recipe(dar, clip_store, tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(tmp_path))
    (tmp_path / "dar/01_data_preparation").mkdir(parents=True)
    (tmp_path / "dar/01_data_preparation/data").symlink_to(clip_store.folder)
    folder = tmp_path / "dar/02_baseline_training"
    folder.mkdir()
    save_system(dar, folder)
    (folder / "training.json").write_text(json.dumps({"crop_size": 56}))
    search, split = RecipeSearch.load("dar", recipes=["iid"]), clip_store.split("iid")
    encoded = encode(dar, split, crop=56, kept=tmp_path)
    pixels = search.stored(split, 2)
    assert search.search(pixels, top=30).hits[0].similarity == pytest.approx(
        cosines(encoded.embedding[[2]], encoded.recipes).max(), abs=1e-5
    )
    (tmp_path / "dish.jpg").write_bytes(split.photo(2))
    program = f"from recipe_lib.search.command import main; main(['dar', {str(tmp_path / 'dish.jpg')!r}, '--json'])"
    said = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert [hit["id"] for hit in said["recipes"]] == [
        h.id for h in RecipeSearch.load("dar").search(tmp_path / "dish.jpg").hits
    ]
    hits = search.photos(as_text(split.recipe(9)), top=30)
    cosine = cosines(encoded.recipes[[9]], encoded.embedding)[0]
    assert cosine[[hit.row for hit in hits]] == pytest.approx([hit.similarity for hit in hits], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing",), "nothing: no finished study here; run it first .*finished studies: tiny"),
        (("outputs/none",), "none: no finished study here"),
        (("../../etc",), "no finished study here"),
        (("tiny", "debaised"), "no variant 'debaised'; choose baseline, debiased, debiased@no_z"),
        (("tiny", "baseline@no_z"), "no variant 'baseline@no_z'"),
        (("tiny", "oracle"), "the oracle is told the ingredients"),
        (("tiny", "", ["idd"]), "idd: no such split or folder; splits: do_context"),
    ],
)
def test_what_is_not_there_is_one_line(study, arguments, said):
    with pytest.raises(DataError, match=said) as error:
        RecipeSearch.load(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "dish: the file is empty"),
        (b"no photo", "dish: not an image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "dish: a HEIC photo"),
        (png(np.zeros((1, 1, 3), np.uint8)), "dish: 1 x 1 pixels is too small"),
        (png(np.zeros((20, 400, 3), np.uint8)), "dish: 400 x 20 pixels is a strip"),
        (png(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8))[:900], "dish: cannot be read"),
    ],
)
def test_a_photo_that_cannot_be_used_is_one_line(study, data, said):
    search = RecipeSearch.load("tiny", "baseline", ["iid"])
    with pytest.raises(ImageError, match=said) as error:
        search.read(data, "dish")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", " \n\t", "\0"])
def test_an_empty_recipe_is_refused(study, text):
    with pytest.raises(DataError, match="the recipe is empty"):
        RecipeSearch.load("tiny", recipes=["iid"]).photos(text)


def test_a_recipe_without_a_known_word_is_refused(study):
    with pytest.raises(DataError, match="no word of this recipe is known"):
        RecipeSearch.load("tiny", recipes=["iid"]).photos("Qwxyz\n\nzzzq\n\nxqzw")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Soup\n2 tomatoes\n- salt\n\nBoil.\n\nServe.", ("Soup", ["2 tomatoes", "salt"], ["Boil.", "Serve."])),
        ("# Soup\n\n## Ingredients\n* 1 onion\n\n* salt\n## Method:\n1. Chop.\n2) Boil.",
         ("Soup", ["1 onion", "salt"], ["Chop.", "Boil."])),
        ("Soup\nDirections\nBoil water.\nINGREDIENTS:\nwater", ("Soup", ["water"], ["Boil water."])),
        ("Only a title", ("Only a title", [], [])),
        ("\n\n  Soup \r\n\r\n12 eggs\r\n", ("Soup", ["12 eggs"], [])),
    ],
)  # fmt: skip
def test_a_typed_recipe_in_parts(text, parts):
    assert parse_recipe(text) == parts


@pytest.mark.parametrize("radius", [0.2, 0.35, 0.5, 0.8])
def test_surroundings_by_loops(radius):
    rng = np.random.default_rng(0)
    pixels, other = rng.integers(256, size=(2, 9, 9, 3), dtype=np.uint8)
    before = pixels.copy()
    outside = [(y, x) for y in range(9) for x in range(9) if ((y - 4) ** 2 + (x - 4) ** 2) ** 0.5 > radius * 9]
    hidden, swapped = other_surroundings(pixels, radius), other_surroundings(pixels, radius, other)
    mean = np.mean([pixels[place] for place in outside], 0).round() if outside else None
    for place in np.ndindex(9, 9):
        assert np.array_equal(hidden[place], mean if place in outside else pixels[place])
        assert np.array_equal(swapped[place], other[place] if place in outside else pixels[place])
    assert np.array_equal(pixels, before)


def test_a_command_imports_no_compiler_and_leaves_it_importable(study, tmp_path, dishes):
    """Half of the seconds of a start; the answer is the same."""
    (tmp_path / "dish.png").write_bytes(png(next(iter(dishes.values()))))
    program = f"""
import sys
from recipe_lib.search.command import main
assert main(["tiny", {str(tmp_path / "dish.png")!r}, "--json"]) == 0
heavy = {{"torch._dynamo", "torch._inductor", "pandas", "sklearn", "lightning", "matplotlib", "open_clip"}}
main(["tiny", {str(tmp_path / "dish.png")!r}, "--json"])
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
import torch, torch._dynamo
print(torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2)).tolist(), file=sys.stderr)
"""
    RecipeSearch.load("tiny").search(
        tmp_path / "dish.png"
    )  # else the index is made, for which scikit-learn is imported
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["[]", "[1.0, 1.0]"]
    answer = RecipeSearch.load("tiny").search(tmp_path / "dish.png")
    said = json.loads(done.stdout.splitlines()[0])["recipes"]
    assert [recipe["similarity"] for recipe in said] == pytest.approx([h.similarity for h in answer.hits], abs=1e-4)


def test_the_crop_is_that_of_the_training(study):
    assert RecipeSearch.load("tiny").crop == TRAINING.crop_size == 48
    folder = study / "04_debiasing_training/debiased"
    text = (folder / "training.json").read_text()
    (folder / "training.json").write_text(json.dumps(json.loads(text) | {"crop_size": 40}))
    try:
        assert RecipeSearch.load("tiny").crop == 40 and replace(TRAINING, crop_size=40).crop_size == 40
    finally:
        (folder / "training.json").write_text(text)
