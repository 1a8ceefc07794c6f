import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipe_lib.data import derived as augment
from recipe_lib.data.clip_text import CONTEXT, VOCABULARY, clip_ids, clip_tokens
from recipe_lib.data.cues import describe_cues
from recipe_lib.data.derived import add_descriptions, add_segments
from recipe_lib.data.descriptions import LLMDescriber
from recipe_lib.data.prepare import StoreConfig, prepare
from recipe_lib.data.recipe import DataError
from recipe_lib.data.segments import cut, superpixel_segments
from recipe_lib.data.store import Store
from recipe_lib.kitchen.model import KitchenConfig, cook
from tests.data.test_descriptions import build_model
from tests.data.test_prepare import recipe

CLIP = StoreConfig(64, min_word_count=1, ingredient_classes=2, max_sentences=15, max_tokens=20, text_tokens="clip")
PLAIN = np.full((64, 64, 3), 200, np.uint8)  # a photo without parts


def dishes(n: int) -> list[np.ndarray]:
    return [r.images[0] for r in cook(KitchenConfig(train=n, val=0, test=0, text_only=0, image_size=64, seed=4))][:n]


@pytest.fixture
def folder(tmp_path):
    """Three training recipes, one with three photos, one without parts; a text-only one; val and test with two."""
    one, two, three, *more = dishes(7)
    recipes = [
        recipe(0, images=[one]),
        recipe(1, images=[two, three, PLAIN]),
        recipe(2, images=[PLAIN]),
        recipe(3, photos=0),
        recipe(4, "val", images=more[:2]),
        recipe(5, "test", images=more[2:]),
    ]
    prepare(recipes, tmp_path / "data", CLIP)
    return tmp_path / "data"


def test_sentences_are_what_clip_reads(folder):
    store = Store(folder)
    split = store.split("train")
    words = [split.words[a:b].tolist() for a, b in zip(split.sentence_start, split.sentence_start[1:], strict=False)]
    texts = ["Soup 0", "1 onion, chopped", "2 cups stock", "1 onion", "Chop.", "Boil 3 cups."]
    assert words[: len(texts)] == [clip_ids(text, 20) for text in texts]
    assert store.card["vocabulary"] == VOCABULARY


def test_every_recipe_with_a_photo_is_described(folder, tmp_path):
    card = add_descriptions(folder, None, tmp_path / "cache")
    assert card["descriptions"]["sources"] == {"cues": 5} and not (tmp_path / "cache").exists()
    split = Store(folder).split("train")
    expected = [describe_cues(f"Soup {i}", split.recipe(i)["ingredients"], ["Chop.", "Boil 3 cups."]) for i in range(3)]
    assert split.descriptions == expected
    tokens, whole = split.description_tokens(np.array([2, 0])), clip_tokens([expected[2], expected[0]], CONTEXT).numpy()
    assert (tokens == whole[:, : tokens.shape[1]]).all() and not whole[:, tokens.shape[1] :].any()


def test_a_language_model_describes_and_its_cache_serves_again(folder, tmp_path, monkeypatch):
    model = build_model(tmp_path / "model", chat=True)
    describer = LLMDescriber(model, batch_size=2, max_new_tokens=12)
    first = add_descriptions(folder, describer, tmp_path / "cache.jsonl")
    assert sum(first["descriptions"]["sources"].values()) == 5 and "llm" in first["descriptions"]["sources"]
    told = {json.loads(line)["id"]: json.loads(line)["text"] for line in (tmp_path / "cache.jsonl").open()}
    split = Store(folder).split("train")
    assert dict(zip(split.ids, split.descriptions, strict=True)) == {id_: told[id_] for id_ in split.ids}
    monkeypatch.setattr(LLMDescriber, "_load", lambda self: pytest.fail("everything is in the cache"))
    again = add_descriptions(folder, LLMDescriber(model, batch_size=2, max_new_tokens=12), tmp_path / "cache.jsonl")
    assert again == first
    rules = add_descriptions(folder, None, tmp_path / "cache.jsonl")
    assert rules["descriptions"]["sources"] == {"cues": 5}, "another backend takes over"


def test_a_second_run_waits_for_the_cache_and_reads_what_the_first_wrote(tmp_path, capfd):
    model = build_model(tmp_path / "model", chat=True)
    soup = [("a", "Soup", [], [])]
    first = LLMDescriber(model, batch_size=1, max_new_tokens=4).describe(soup * 2, tmp_path / "c")
    told = next(first)
    second = LLMDescriber(model, batch_size=1, max_new_tokens=4)
    second._load = lambda: pytest.fail("it is in the cache")
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(lambda: list(second.describe(soup, tmp_path / "c")))
        time.sleep(0.3)
        assert not waits.done() and "another process is writing descriptions to" in capfd.readouterr().out
        first.close()
        assert waits.result(timeout=60) == [told]


def test_segments_lie_beside_their_photos(folder):
    card = add_segments(folder, 3, 56)
    store = Store(folder)
    split = store.split("train")
    assert split.photo_start.tolist() == [0, 1, 4, 5]
    for row, which in [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]:
        photo = np.asarray(Image.open(io.BytesIO(split.photo(row, which))))
        expected = [cut(photo, segment, 56) for segment in superpixel_segments(photo, n=3)]
        kept = [np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in split.segments(row, which)]
        assert len(kept) == len(expected) == split.segment_counts[split.photo_start[row] + which]
        for a, b in zip(kept, expected, strict=True):
            assert np.abs(a.astype(int) - b).mean() < 8, "the same but for JPEG"
    assert split.segments(2) == split.segments(1, 2) == [] and len(split.segments(0)) > 0
    assert [len(store.split(s).segments(0, 1)) for s in ("val", "test")] == [0, 0], "read by nobody, so not cut"
    counts = sum(int(store.split(s).segment_counts.sum()) for s in ("train", "val", "test"))
    expected = {"n": 3, "size": 56, "photos": 7, "segments": counts, "photos_without": 2}
    assert card["segments"] == expected | {"sha256": card["segments"]["sha256"]} == store.card["segments"]


@pytest.fixture
def given(tmp_path):
    """Recipes with descriptions and, for their photos, folders of pictures of segments."""
    root = tmp_path / "segment"

    def pictures(photo: str, **files) -> Path:
        for name, grey in files.items():
            path = root / photo / name.replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 20), (grey,) * 3).save(path)
        return Path(photo)

    one = pictures("a/1", c_png=30, a_jpg=10, b_jpeg=20)
    (root / "a/1/notes.txt").write_text("no picture")
    (tmp_path / "photo.jpg").write_bytes(b"no photo")
    two, test = pictures("a/3", a_png=40), pictures("t/1", a_png=50)
    pictures("t/2", a_png=60)
    recipes = [
        recipe(0, images=dishes(1), description="A grey soup.", segments=[one], segment_root=root),
        recipe(
            1, images=[tmp_path / "photo.jpg", *dishes(2)], segments=[Path("gone"), two, Path("a/4")], segment_root=root
        ),
        recipe(2, images=dishes(1)),
        recipe(3, "val", images=dishes(1), description="A pie."),
        recipe(4, "test", images=dishes(2), segments=[test, Path("t/2")], segment_root=root),
    ]
    prepare(recipes, tmp_path / "data", CLIP)
    return tmp_path / "data"


def test_given_descriptions_are_taken_and_the_rules_fill_up(given, tmp_path):
    card = add_descriptions(given, None, tmp_path / "cache", given=True)
    assert card["descriptions"]["sources"] == {"cues": 3, "given": 2}
    split = Store(given).split("train")
    told = describe_cues("Soup 1", split.recipe(1)["ingredients"], ["Chop.", "Boil 3 cups."])
    assert split.descriptions[:2] == ["A grey soup.", told] and Store(given).split("val").descriptions == ["A pie."]
    rules = add_descriptions(given, None, tmp_path / "cache")
    assert rules["descriptions"]["sources"] == {"cues": 5}, "another backend takes over"


def greys(split, row, which=0) -> list[int]:
    parts = [np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in split.segments(row, which)]
    assert all(part.shape == (56, 56, 3) for part in parts)
    return [round(float(part.mean())) for part in parts]


def test_given_segments_follow_their_photos(given, tmp_path):
    card = add_segments(given, 2, 56, given=True)["segments"]
    assert [card[key] for key in ("photos", "segments", "photos_without", "skipped")] == [6, 4, 3, []]
    split = Store(given).split("train")
    assert greys(split, 0) == [10, 20], "two, in the order of names"
    assert [greys(split, 1, which) for which in range(2)] == [[40], []], "its first photo could not be read"
    assert greys(split, 2) == [] and [greys(Store(given).split("test"), 0, i) for i in range(2)] == [[50], []]
    assert add_segments(given, 2, 56, given=True)["segments"] == card
    Image.new("RGB", (30, 20), (99,) * 3).save(tmp_path / "segment/a/1/a.jpg")
    add_segments(given, 2, 56, given=True)
    assert greys(Store(given).split("train"), 0) == [99, 20], "a picture that has changed is read again"


def test_given_segments_do_not_leave_their_root(given, tmp_path):
    (tmp_path / "secret.png").write_bytes((tmp_path / "segment/a/3/a.png").read_bytes())
    (tmp_path / "segment/a/1/a.jpg").unlink()
    (tmp_path / "segment/a/1/a.jpg").symlink_to(tmp_path / "secret.png")
    (tmp_path / "segment/a/1/b.jpeg").write_bytes(b"no picture")
    card = add_segments(given, 2, 56, given=True)["segments"]
    assert greys(Store(given).split("train"), 0) == [30]
    leaves, broken = card["skipped"]
    assert "a.jpg: is a link that leaves" in leaves and "b.jpeg: not an image" in broken


def test_nothing_given_is_an_error(folder, tmp_path):
    with pytest.raises(DataError, match="no recipe of the source brings a description; choose description_backend"):
        add_descriptions(folder, None, tmp_path / "cache", given=True)
    with pytest.raises(DataError, match="the source brings no segment of a photo; choose segment_backend"):
        add_segments(folder, 2, 56, given=True)
    assert not {"segments", "descriptions"} & set(Store(folder).card)


def test_what_is_finished_is_not_made_again_and_workers_change_nothing(folder, monkeypatch):
    monkeypatch.setattr("recipe_lib.data.prepare.SHARD", 2)
    recipes = [recipe(i, images=[photo]) for i, photo in enumerate(dishes(5))]
    recipes += [recipe(10, "val", images=[PLAIN]), recipe(11, "test", images=[PLAIN])]
    prepare(recipes, folder, CLIP, workers=1)
    assert len(list((folder / "train").glob("*.recipes.parquet"))) == 3
    cards = [add_segments(folder, 2, 56, workers=2), add_descriptions(folder, None, folder / "c", workers=2)]
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/*.[ds]e*")}
    assert [add_segments(folder, 2, 56, workers=1), add_descriptions(folder, None, folder / "c", workers=1)] == [
        cards[1]
    ] * 2
    assert before and before == {p: p.stat().st_mtime_ns for p in before}
    assert add_segments(folder, 1, 56, workers=1)["segments"]["segments"] < cards[0]["segments"]["segments"]


def test_what_other_code_made_is_made_again(folder, monkeypatch):
    def states():
        return {p.name: p.stat().st_mtime_ns for p in (folder / "train").iterdir() if p.name.count(".") == 2}

    def make():
        add_descriptions(folder, None, folder / "cache", workers=1)
        return add_segments(folder, 2, 32, workers=1)

    real, edited = augment.code_digest, None
    monkeypatch.setattr(augment, "code_digest", lambda maker: "edited" if maker.__name__ == edited else real(maker))
    card, before = make(), states()
    for edited, kind in (("_describe_shard", ".descriptions."), ("_segment_shard", ".segments.")):  # noqa: B007
        assert make() == card, "the made-up edit changes no result"
        after = states()
        assert {name for name in before if after[name] != before[name]} >= {n for n in before if kind in n} != set()


def test_interrupted_segments_go_on_within_the_shard(folder, monkeypatch):
    monkeypatch.setattr(augment, "CHUNK", 2)
    photos, limit = [], [3]

    class Slow:
        """A segmenter that is interrupted."""

        def __str__(self) -> str:
            return "slow"

        def __call__(self, chunk, *, n, rank):
            if len(photos) + len(chunk) > limit[0]:
                raise KeyboardInterrupt
            photos.extend(chunk)
            return [superpixel_segments(photo, n=n) for photo in chunk]

    with pytest.raises(KeyboardInterrupt):
        add_segments(folder, 3, 56, sam=Slow())
    assert len(photos) == 2, "the first chunk"
    limit[0] = 100
    card = add_segments(folder, 3, 56, sam=Slow())
    assert len(photos) == 7, "no photo twice"
    assert card["segments"]["sha256"] == add_segments(folder, 3, 56)["segments"]["sha256"]
    assert not list((folder / "shards").glob("segments-*"))


def test_other_recipes_take_the_old_ones_along(folder, tmp_path):
    add_segments(folder, 3, 56)
    add_descriptions(folder, None, tmp_path / "c")
    recipes = [recipe(7, images=dishes(1)), recipe(8, "val", images=[PLAIN]), recipe(9, "test", images=[PLAIN])]
    card = prepare(recipes, folder, CLIP)
    assert not {"segments", "descriptions"} & set(card) and not list(folder.glob("*/*.[ds]e*"))
    with pytest.raises(DataError, match="no descriptions here"):
        Store(folder).split("train").description_tokens(np.arange(1))
    with pytest.raises(DataError, match="no segments here"):
        Store(folder).split("train").segments(0)


def test_a_recipe_without_steps_has_an_empty_one(tmp_path):
    recipes = [recipe(0, instructions=[], ingredients=["", "salt", "salt"], images=[PLAIN]), recipe(1, title="")]
    recipes += [recipe(2, "val"), recipe(3, "test")]
    prepare(recipes, tmp_path / "data", StoreConfig(64, 1, 1, max_sentences=15, max_tokens=20, text_tokens="clip"))
    add_descriptions(tmp_path / "data", None, tmp_path / "cache")
    split = Store(tmp_path / "data").split("train")
    sentences = range(split.recipe_start[0], split.recipe_start[1])
    words = [split.words[split.sentence_start[i] : split.sentence_start[i + 1]].tolist() for i in sentences]
    assert words == [clip_ids(text, 20) for text in ("Soup 0", "salt", "salt", "")]
    assert split.descriptions[1].startswith("A photo of a dish of food")
