"""Photos: every kind of file ends as upright RGB or as one line that names it."""

import io
import os
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipe_lib.data.images import ImageError, RandAugment, centre_crop, decode_jpeg, read_image, to_jpeg
from recipe_lib.data.recipe import DataError

BAD = Path(__file__).parents[3] / "shared" / "data" / "bad_inputs" / "images"
needs_shared = pytest.mark.skipif(not BAD.is_dir(), reason="the shared test data is not here")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def photo(width=64, height=48) -> Image.Image:
    """Red above, blue below: turns and channel swaps show."""
    image = Image.new("RGB", (width, height), (250, 10, 10))
    image.paste((10, 10, 250), (0, height // 2, width, height))
    return image


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and brings next to no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_common_formats(kind):
    image = read_image(saved(photo(), kind))
    pixels = np.asarray(image, int)
    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert np.abs(pixels[5, 32] - (250, 10, 10)).max() < 12
    assert np.abs(pixels[40, 32] - (10, 10, 250)).max() < 12


def test_a_photo_of_an_iphone_is_named_for_what_it_is(tmp_path):
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40
    (tmp_path / "phone.heic").write_bytes(data)
    for source, name in ((data, "64 bytes"), (tmp_path / "phone.heic", "phone.heic")):
        with pytest.raises(ImageError, match=f"{name}: a HEIC photo, which cannot be read here; save it as JPEG"):
            read_image(source)
    with pytest.raises(ImageError, match=r"^supper: not an image"):
        read_image(b"words", name="supper")


@pytest.mark.parametrize(("width", "height", "crop"), [(7, 9, 4), (8, 5, 5), (6, 6, 6), (9, 12, 3)])
def test_the_centre_crop_is_that_of_torchvision(width, height, crop):
    from torchvision.transforms import CenterCrop

    pixels = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(centre_crop(image, crop)), np.asarray(CenterCrop(crop)(image)))


def test_path_and_bytes_agree(tmp_path):
    data = saved(photo(), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    assert read_image(tmp_path / "a.jpg").tobytes() == read_image(data).tobytes()


def test_cmyk_keeps_its_colours():
    pixels = np.asarray(read_image(saved(photo().convert("CMYK"), "JPEG", quality=95)), int)
    assert np.abs(pixels[5, 32] - (250, 10, 10)).max() < 25
    assert np.abs(pixels[40, 32] - (10, 10, 250)).max() < 25


def test_sixteen_bits_scale_to_eight():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)  # 0, 257, 514 ... = 0, 1, 2 ... of 8 bits
    image = read_image(saved(Image.fromarray(np.tile(ramp, (64, 1))), "PNG"))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image)[0], np.repeat(np.arange(256)[:, None], 3, axis=1))


def test_wide_integers():
    wide = read_image(saved(Image.fromarray(np.full((8, 8), 257 * 100, np.int32)), "TIFF"))
    plain = read_image(saved(Image.fromarray(np.full((8, 8), 100, np.int32)), "TIFF"))
    assert np.asarray(wide).max() == np.asarray(plain).max() == 100
    with pytest.raises(ImageError, match="0..65535"):
        read_image(saved(Image.fromarray(np.full((8, 8), 10**6, np.int32)), "TIFF"))
    with pytest.raises(ImageError, match="floating-point"):
        read_image(saved(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"))


def test_transparency_is_flattened_on_white():
    layer = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    layer.paste((0, 0, 255, 128), (10, 0, 20, 20))
    pixels = np.asarray(read_image(saved(layer, "PNG")), int)
    np.testing.assert_array_equal(pixels[5, 5], (255, 255, 255))
    assert np.abs(pixels[5, 15] - (127, 127, 255)).max() <= 1
    grey = Image.new("LA", (20, 20), (0, 0))
    assert np.asarray(read_image(saved(grey, "PNG"))).min() == 255


def test_palette_with_transparency():
    image = Image.new("P", (20, 20), 0)
    image.putpalette([9, 99, 199, 250, 0, 0] + [0] * 762)
    image.paste(1, (10, 0, 20, 20))
    pixels = np.asarray(read_image(saved(image, "PNG", transparency=0)))
    np.testing.assert_array_equal(pixels[5, 5], (255, 255, 255))
    np.testing.assert_array_equal(pixels[5, 15], (250, 0, 0))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    pixels = np.asarray(read_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    np.testing.assert_array_equal(pixels[8, 8], (255, 0, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """The stored pixels are turned the other way, so every orientation must come back as the same photo."""
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = photo()
    upright.putpixel((0, 0), (0, 255, 0))
    stored = upright.transpose(turn[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert read_image(saved(stored, "PNG", exif=exif)).tobytes() == upright.tobytes()


def test_wrong_files_are_named(tmp_path):
    whole = saved(photo(400, 300), "JPEG")
    files = {
        "cut.jpg": (whole[: len(whole) // 2], "truncated"),
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"soup", "not an"),
    }
    for name, (data, reason) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=reason) as error:
            read_image(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
        with pytest.raises(DataError, match=reason):
            read_image(data)
    for gone in (tmp_path / "gone.jpg", tmp_path):
        with pytest.raises(ImageError, match="no such image file"):
            read_image(gone)


def test_files_that_pillow_would_run_or_wait_for(tmp_path):
    with pytest.raises(ImageError):  # EPS starts Ghostscript
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError):
        read_image(tmp_path / "pipe.jpg")


@pytest.mark.parametrize(("width", "height"), [(60000, 60000), (12000, 12000), (9000, 9000)])
def test_bombs_are_refused_by_their_header(width, height):
    tracemalloc.start()
    with pytest.raises(ImageError, match="pixels"):
        read_image(png_header(width, height))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_pixel_limit_and_strips():
    data = saved(photo(100, 100), "PNG")
    assert read_image(data, max_pixels=10_000).size == (100, 100)
    with pytest.raises(ImageError, match="over the limit of 9999"):
        read_image(data, max_pixels=9_999)
    with pytest.raises(ImageError, match="strip"):
        read_image(saved(photo(2000, 4), "PNG"))


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(400, 300, (320, 240)), (30, 40, (240, 320)), (7, 7, (240, 240)), (384, 257, (358, 240))],  # 358.6: as torchvision
)
def test_to_jpeg_sets_the_shorter_side(width, height, expected):
    data = to_jpeg(photo(width, height), 240)
    assert Image.open(io.BytesIO(data)).format == "JPEG"
    assert decode_jpeg(data).size == expected and decode_jpeg(data).mode == "RGB"


def test_to_jpeg_is_deterministic_and_takes_arrays():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    assert to_jpeg(pixels, 32) == to_jpeg(Image.fromarray(pixels), 32) == to_jpeg(pixels.copy(), 32)
    assert len(to_jpeg(pixels, 32, quality=30)) < len(to_jpeg(pixels, 32, quality=95))
    decoded = np.asarray(decode_jpeg(to_jpeg(np.full((40, 40, 3), 77, np.uint8), 40)))
    assert decoded.shape == (40, 40, 3) and np.abs(decoded.astype(int) - 77).max() <= 1


def test_filter_and_quality_are_the_ones_asked_for():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    for name in ("bilinear", "bicubic", "lanczos"):
        data = to_jpeg(pixels, 25, resample=name, quality=100)
        wanted = np.asarray(Image.fromarray(pixels).resize((25, 30), Image.Resampling[name.upper()]), int)
        assert np.abs(np.asarray(decode_jpeg(data), int) - wanted).mean() < 1, "with halved chroma it would be over 15"
    with pytest.raises(KeyError):
        to_jpeg(pixels, 25, resample="nearest")


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)]
)
def test_to_jpeg_refuses_other_arrays(array):
    with pytest.raises(ImageError, match="uint8"):
        to_jpeg(array, 8)


def test_to_jpeg_refuses_sizes_and_strips():
    with pytest.raises(ImageError, match="4096"):
        to_jpeg(photo(), 0)
    with pytest.raises(ImageError, match="strip"):
        to_jpeg(np.zeros((2, 900, 3), np.uint8), 64)


def test_decode_jpeg_refuses_other_bytes():
    whole = to_jpeg(photo(), 64)
    for data in (b"", b"soup", saved(photo(), "PNG"), saved(photo().convert("L"), "JPEG"), whole[: len(whole) // 2]):
        with pytest.raises(ImageError, match="not a stored JPEG"):
            decode_jpeg(data)


# ---- RandAugment ----


def test_rand_augment_follows_from_the_generator_alone():
    policy, image = RandAugment("rand-m9-n3-mstd0.5-inc1"), Image.effect_mandelbrot((48, 48), (-2, -1, 1, 1), 50)
    image = image.convert("RGB")
    first = [policy(image, rng).tobytes() for rng in [np.random.default_rng(3)] for _ in range(20)]
    random.seed(8)
    np.random.seed(8)
    expected = random.random(), np.random.rand()
    random.seed(8)
    np.random.seed(8)
    again = [policy(image, rng).tobytes() for rng in [np.random.default_rng(3)] for _ in range(20)]
    assert again == first and len(set(first)) > 10
    assert (random.random(), np.random.rand()) == expected, "the global states are as they were"
    assert [policy(image, np.random.default_rng(4)).tobytes()] != first[:1]


@pytest.mark.parametrize(
    "name",
    ["rand", "rand-", "rand-7", "rand-m", "rand-mfoo", "rand-m7-", "rand-x3", "rand-p2", "rand-tbest", "augmix-m5"],
)
def test_names_that_timm_would_misread_are_refused(name):
    with pytest.raises(ValueError, match=f"augment '{name}'"):
        RandAugment(name)
    with pytest.raises(ValueError, match="augment 'rand-n99-tweights'.*larger"):  # more than there are
        RandAugment("rand-n99-tweights")


@needs_shared
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("truncated.jpg", "truncated"),
        ("zero_byte.jpg", "empty"),
        ("text_file.jpg", "not an"),
        ("bomb_header.png", "pixels"),
    ],
)
def test_shared_broken_images(name, reason):
    with pytest.raises(ImageError, match=reason) as error:
        read_image(BAD / name)
    assert name in str(error.value)


@needs_shared
@pytest.mark.parametrize("name", ["cmyk.jpg", "sixteen_bit.png", "animated_gif.jpg"])
def test_shared_odd_images(name):
    pixels = np.asarray(read_image(BAD / name))
    assert pixels.shape[2] == 3 and 60 < pixels.mean() < 200 and pixels.std() > 20
