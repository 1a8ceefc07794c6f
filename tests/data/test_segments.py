import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipe_lib.data.images import decode_jpeg, read_image, to_jpeg
from recipe_lib.data.segments import CENTRE, GREY, GRID, SamSegmenter, Segment, cut, foreground, superpixel_segments
from recipe_lib.kitchen.model import KitchenConfig, cook

REAL = Path(__file__).parents[3] / "shared/data/real_recipes"


@pytest.fixture(scope="module")
def dishes():
    return [r.images[0] for r in cook(KitchenConfig(train=60, val=0, test=0, text_only=0))]


def disc(radius=0.3, inside=(220, 40, 30), outside=(240, 240, 235), size=64):
    """A red round dish on a white table, and where it lies."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    mask = y**2 + x**2 < radius**2
    return np.where(mask[..., None], np.uint8(inside), np.uint8(outside)), mask


def test_a_dish_has_several_parts_and_they_are_its_food(dishes):
    parts = [superpixel_segments(dish) for dish in dishes]
    counts = np.array([len(segments) for segments in parts])
    assert counts.max() == 4 and counts.min() >= 1 and (counts >= 2).mean() > 0.9
    coverage = np.mean([np.any([s.mask for s in segments], axis=0) for segments in parts], axis=0)
    corners = np.mean([coverage[y : y + 8, x : x + 8].mean() for y in (0, 56) for x in (0, 56)])
    assert coverage[20:44, 20:44].mean() > 0.6 and corners < 0.1
    for dish, segments in zip(dishes, parts, strict=True):
        assert [s.score for s in segments] == sorted((s.score for s in segments), reverse=True)
        for s in segments:
            left, top, right, bottom = s.box
            assert s.mask.shape == dish.shape[:2] and 0.02 <= s.area <= 0.9
            assert s.mask[top:bottom, left:right].sum() == s.mask.sum(), "nothing lies outside the box"
            assert (
                s.mask[top].any() and s.mask[bottom - 1].any() and s.mask[:, left].any() and s.mask[:, right - 1].any()
            )


def test_parts_are_of_one_colour(dishes):
    """Within a segment colours vary less than over the whole photo, else it is not a part but a window."""
    spread = [
        (dish[s.mask].std(0).mean(), dish.reshape(-1, 3).std(0).mean())
        for dish in dishes for s in superpixel_segments(dish)[:1]
    ]  # fmt: skip
    assert np.mean([within / over for within, over in spread]) < 0.75


def test_the_food_is_found_exactly():
    photo, mask = disc()
    (segment,) = superpixel_segments(photo)
    assert (segment.mask & mask).sum() > 0.95 * (segment.mask | mask).sum()
    assert segment.area == pytest.approx(np.pi * 0.3**2, rel=0.05)


def test_same_photo_same_segments(dishes):
    for dish in dishes[:5]:
        first, second = superpixel_segments(dish), superpixel_segments(dish.copy())
        assert [(s.score, s.mask.tobytes()) for s in first] == [(s.score, s.mask.tobytes()) for s in second]


def test_limits(dishes):
    for n in (0, 1, 2, 6):
        assert all(len(superpixel_segments(dish, n=n)) <= n for dish in dishes[:5])
    whole = [s.mask.tobytes() for s in superpixel_segments(dishes[0], n=4)]
    assert [s.mask.tobytes() for s in superpixel_segments(dishes[0], n=2)] == whole[:2]
    areas = [s.area for dish in dishes[:20] for s in superpixel_segments(dish, min_area=0.08, max_area=0.2)]
    assert areas and min(areas) >= 0.08 and max(areas) <= 0.2
    assert superpixel_segments(disc()[0], max_area=0.2) == []


def test_a_photo_without_parts_has_none():
    """Not the whole photo: the caller must see that there is nothing."""
    assert superpixel_segments(np.full((64, 64, 3), 200, np.uint8)) == []
    noise = np.random.default_rng(0).normal(128, 3, (64, 64, 3)).astype(np.uint8)
    assert superpixel_segments(noise) == []
    faint = disc(inside=(236, 236, 232))[0]
    assert superpixel_segments(faint) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2), (3, 5), (4, 4), (7, 60), (300, 30)])
def test_any_size(shape):
    photo = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    segments = superpixel_segments(photo)
    assert len(segments) <= 4 and all(s.mask.shape == shape and s.mask.any() for s in segments)
    assert all(cut(photo, s, 16).shape == (16, 16, 3) for s in segments)


def test_a_cut_segment_keeps_its_aspect_and_nothing_of_its_surroundings():
    photo = np.full((40, 60, 3), 255, np.uint8)
    mask = np.zeros((40, 60), bool)
    mask[10:20, 5:45] = True
    photo[mask] = (200, 0, 0)
    mask[14:16, 20:22] = False  # a hole
    segment = Segment(mask, 1.0)
    assert segment.box == (5, 10, 45, 20)
    crop = cut(photo, segment, 40)
    assert crop.shape == (40, 40, 3) and crop.dtype == np.uint8
    assert (
        (crop[15:25] == (200, 0, 0)).all(-1).sum() == 40 * 10 - 4
        and (crop[:15] == GREY).all()
        and (crop[25:] == GREY).all()
    )
    assert (crop[19:21, 15:17] == GREY).all()
    assert cut(photo, segment, 224).shape == (224, 224, 3)


def test_a_ranking_chooses_instead_of_the_rule(dishes):
    shapes = []

    def reddest(crops):
        shapes.append((crops.shape[1:], crops.dtype))
        return crops[..., 0].mean((1, 2)) - crops[..., 1].mean((1, 2))

    first = superpixel_segments(dishes[0], rank=reddest)
    assert shapes == [((224, 224, 3), np.uint8)]
    all_scores = reddest(np.stack([cut(dishes[0], s, 224) for s in superpixel_segments(dishes[0], n=99, rank=reddest)]))
    assert [s.score for s in first] == sorted(all_scores, reverse=True)[:4]


@pytest.mark.skipif(not REAL.exists(), reason="needs the shared data")
def test_real_photos():
    recipes = [json.loads(line) for line in (REAL / "recipes.jsonl").read_text("utf-8").splitlines()]
    names = [r["images"][0] for r in recipes if r["images"]][::80]
    photos = [np.asarray(decode_jpeg(to_jpeg(read_image(REAL / "images" / name), 256))) for name in names]
    parts = [superpixel_segments(photo) for photo in photos]
    assert all(s.mask.shape == photo.shape[:2] for photo, segments in zip(photos, parts, strict=True) for s in segments)
    assert np.mean([len(segments) for segments in parts]) > 1.5


# ---- SAM ----

SMALL = {"hidden_size": 16, "image_size": 64}
DECODER = {
    "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "attention_downsample_rate": 2,
    "iou_head_hidden_dim": 16,
}  # fmt: skip
ALL = {"points": 6, "pred_iou_thresh": -9.0, "stability_score_thresh": 0.0, "crops_nms_thresh": 0.99}


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """A SAM of 16 channels with random weights: its masks mean nothing, but they take the whole way."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    vision = SMALL | {
        "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "mlp_dim": 32,
        "window_size": 4, "global_attn_indexes": [0], "num_pos_feats": 8,
    }  # fmt: skip
    prompt = SMALL | {"patch_size": 8, "mask_input_channels": 4}
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=DECODER)
    transformers.SamModel(config).save_pretrained(folder)
    sides = {name: {"height": side, "width": side} for name, side in (("pad_size", 64), ("mask_pad_size", 16))}
    processor = transformers.SamImageProcessor(size={"longest_edge": 64}, mask_size={"longest_edge": 16}, **sides)
    processor.save_pretrained(folder)
    return str(folder)


def test_sam_masks_fit_limits_and_photos_of_different_sizes(sam, dishes):
    wide = np.asarray(Image.fromarray(dishes[2]).resize((96, 64)))
    photos = [dishes[0], dishes[1], wide]
    parts = SamSegmenter(sam, **ALL)(photos, n=3)
    assert len(parts) == 3 and all(1 <= len(segments) <= 3 for segments in parts)
    for photo, segments in zip(photos, parts, strict=True):
        assert all(s.mask.shape == photo.shape[:2] and s.mask.dtype == bool and 0.02 <= s.area <= 0.9 for s in segments)
        for i, a in enumerate(segments):
            assert all((a.mask & b.mask).sum() < 0.7 * (a.mask | b.mask).sum() for b in segments[:i]), "one part twice"
    again = SamSegmenter(sam, **ALL, batch_size=5)(photos[:1], n=3)[0]
    assert [s.mask.tobytes() for s in again] == [s.mask.tobytes() for s in parts[0]], "the batches have no say"


def test_of_two_masks_of_one_part_the_better_is_kept_and_a_blank_photo_has_none(sam):
    photo, mask = disc()
    wider, corner = disc(0.32)[1], np.zeros((64, 64), bool)
    corner[:20, :20] = True
    segmenter = SamSegmenter(sam)
    segmenter._masks = lambda image, **options: {"masks": [wider, mask, corner, np.zeros((64, 64), bool)]}
    (segments,) = segmenter([photo], rank=lambda crops: -np.arange(len(crops)))
    assert [s.mask.sum() for s in segments] == [wider.sum()], "the table is no part: it has the colours of the edge"
    (segments,) = segmenter([photo])
    assert [s.mask.sum() for s in segments] == [mask.sum()], "its colour is purer"
    assert segmenter([np.full((64, 64, 3), 200, np.uint8)]) == [[]]


def test_sam_ranked_by_a_callable_and_nothing_found(sam, dishes):
    scores = iter(range(1000))
    segments = SamSegmenter(sam, **ALL)(dishes[:1], n=2, rank=lambda crops: [next(scores) for _ in crops])[0]
    assert segments[0].score == next(scores) - 1 and segments[1].score < segments[0].score
    strict = SamSegmenter(sam, points=4, pred_iou_thresh=9.0)
    assert strict(dishes[:2]) == [[], []]


def test_a_sam_that_is_not_there_is_one_line(sam, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^/no/such/sam: no such folder"):
        SamSegmenter("/no/such/sam")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError) as error:
        SamSegmenter(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="some/sam: the Hugging Face hub does not answer"):
        SamSegmenter("some/sam")


def dish_of(pixels, segments):
    return np.unpackbits(np.frombuffer(foreground(pixels, segments), np.uint8)).reshape(GRID, GRID).astype(bool)


def test_the_dish_is_whole_where_its_parts_have_holes():
    pixels, plate = disc(0.35, size=128)
    garnish = disc(0.2, size=128)[1] & ~disc(0.1, size=128)[1]
    pixels = np.where(garnish[..., None], np.uint8([30, 140, 40]), pixels)
    truth = disc(0.35, size=GRID)[1]
    for segments in ([Segment(plate & ~garnish, 1.0)], superpixel_segments(pixels, n=1)):
        dish = dish_of(pixels, segments)
        assert (dish & truth).sum() > 0.9 * (dish | truth).sum()
    corner = np.zeros(plate.shape, bool)
    corner[:20, :20] = True
    kept = dish_of(pixels, [Segment(plate, 1.0)])
    assert (dish_of(pixels, [Segment(plate | corner, 1.0)]) == kept).all(), "a piece of the table says nothing"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (64, 64)])
def test_a_photo_of_one_colour_keeps_a_disc(shape, level):
    dish = dish_of(np.full((*shape, 3), level, np.uint8), [])
    away = np.hypot(*((np.mgrid[:GRID, :GRID] + 0.5) / GRID - 0.5))
    assert dish[away < CENTRE].all() and 0.1 < dish.mean() < 0.3 and away[dish].max() < 0.4


def test_plates_of_a_kitchen_keep_their_food_and_lose_their_table(dishes):
    masks = np.array([dish_of(dish, superpixel_segments(dish, n=2)) for dish in dishes])
    table = np.ones((GRID, GRID), bool)
    table[3:-3, 3:-3] = False
    assert masks[:, table].mean() < 0.1 and masks[:, 12:20, 12:20].mean() > 0.9 and 0.15 < masks.mean() < 0.75
