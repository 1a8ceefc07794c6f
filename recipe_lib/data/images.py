"""Photos in and out: any common image file -> upright RGB -> small JPEG -> array for training.

Files come from outside: the header is judged before a pixel is decoded, and whatever a broken file makes Pillow raise
ends as one `ImageError` that names the file.
"""

from __future__ import annotations

import io
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from recipe_lib.data.recipe import DataError

MAX_PIXELS = 64_000_000  # 64 megapixels: 192 MB once decoded; phones make 12 to 50
MAX_ASPECT = 10  # longer : shorter side; to_jpeg enlarges by the shorter side, so a 1 x 60000 strip would explode
FILTERS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos")}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # none that starts another program, as EPS does
HEIC = (b"ftypheic", b"ftypheix", b"ftypheim", b"ftyphevc", b"ftypmif1", b"ftypmsf1")  # what phones' files begin with


class ImageError(DataError):
    """A photo that cannot be used. One line: which file, what is wrong with it."""


def read_image(source: Path | bytes, max_pixels: int = MAX_PIXELS, name: str = "") -> Image.Image:
    """Read one photo as upright 8-bit RGB.

    CMYK and palettes are converted, transparency flattened on white, 16-bit greys scaled to 8 bits; of an animation the
    first frame is taken. A header that declares more than `max_pixels` is refused before decoding.

    Args:
        source: a file, or its bytes.
        name: what errors call it; "" for the file's own, or the number of bytes.

    Raises:
        ImageError: unreadable, empty, not an image, truncated, too large or a thin strip.
    """
    with _judged(source, max_pixels, name) as (image, shown):
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), shown)


def check_image(source: Path | bytes, max_pixels: int = MAX_PIXELS, name: str = "") -> None:
    """Judge a photo as `read_image` does, by its header alone: some broken pixels stay unseen."""
    with _judged(source, max_pixels, name):
        pass


@contextmanager
def _judged(source: Path | bytes, max_pixels: int, name: str) -> Iterator[tuple[Image.Image, str]]:
    """An image whose header is good, not decoded yet, and its name; whatever goes wrong inside is an ImageError."""
    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))
    try:
        if isinstance(source, Path) and not source.is_file():
            raise ImageError(f"{name}: no such image file")
        data = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
        # Pillow warns from 89 megapixels on; our own limit below is the one that decides.
        with data, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(data, formats=FORMATS) as image:
                _check_size(*image.size, max_pixels, name)
                yield image, name
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: {_what_it_is(source)}") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: the header declares far over {max_pixels} pixels; make it smaller") from None
    except Exception as error:  # Pillow's readers raise whatever they stumble over in a broken file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageError(f"{name}: cannot be read as an image ({reason})") from None


def to_jpeg(image: Image.Image | np.ndarray, size: int, *, resample: str = "bilinear", quality: int = 95) -> bytes:
    """Resize so that the shorter side is `size` pixels, aspect kept, and encode as JPEG; deterministic.

    With "bilinear" the pixels are those of torchvision's Resize(size), but for what JPEG loses: at quality 95, of
    real photos at 256 pixels, 1.3 of 255 per value (2.5 at 90 with halved chroma). Small images are enlarged: a crop
    of `size` x `size` fits every stored photo.

    Args:
        image: RGB image, or (H, W, 3) uint8; ImageError for any other array, too large an image or a thin strip.
        size: shorter side in pixels, 1 to 4096.
        resample: one of FILTERS; each averages over all pixels that one of the smaller image covers.
        quality: JPEG quality, 1 to 100; the chroma is not halved (4:4:4).
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ImageError(f"array of {image.dtype} {image.shape}: an image must be uint8 (H, W, 3)")
        image = Image.fromarray(image)
    if not 1 <= size <= 4096:
        raise ImageError(f"image size {size}: must be between 1 and 4096 pixels")
    width, height = image.size
    _check_size(width, height, MAX_PIXELS, "image")
    short = min(width, height)
    shape = (size * width // short, size * height // short)
    out = io.BytesIO()
    image.convert("RGB").resize(shape, FILTERS[resample]).save(out, "JPEG", quality=quality, subsampling="4:4:4")
    return out.getvalue()


def decode_jpeg(data: bytes) -> Image.Image:
    """JPEG bytes that `to_jpeg` made -> RGB image, decoded. Raises ImageError for anything else."""
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        image.load()
        if image.mode != "RGB":
            raise ValueError(f"mode {image.mode}")
    except Exception as error:  # see read_image
        raise ImageError(f"{len(data)} bytes: not a stored JPEG ({error}); prepare the data again") from None
    return image


class RandAugment:
    """timm's RandAugment (arXiv:1909.13719), its choices drawn from a generator.

    Args:
        name: timm's name of a policy, such as "rand-m7-mstd0.5"; see `timm.data.auto_augment.rand_augment_transform`.

    Raises:
        ValueError: not such a name. timm itself passes over what it does not understand.
    """

    def __init__(self, name: str):
        section = r"-(m\d+|n[1-9]\d*|p(1|0(\.\d+)?)|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3aw?))"
        if not re.fullmatch(f"rand({section})+", name):
            raise ValueError(f"augment {name!r}: not a RandAugment policy by timm's name, such as rand-m7-mstd0.5")
        from timm.data.auto_augment import rand_augment_transform

        self.name, self.policy = name, rand_augment_transform(name)
        try:
            self(Image.new("RGB", (8, 8)), np.random.default_rng(0))
        except ValueError as error:  # more operations than its set has
            raise ValueError(f"augment {name!r}: {error}") from None

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        # timm draws from Python's and numpy's global states, which no two workers share: seeded here, then put back.
        states, seed = (random.getstate(), np.random.get_state()), int(rng.integers(1 << 32))
        random.seed(seed)
        np.random.seed(seed)
        try:
            return self.policy(image)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def centre(spare: np.ndarray) -> list[int]:
    """Half of what a crop leaves over of each side; halves round to even, as in torchvision's CenterCrop."""
    return np.rint(spare / 2).astype(int).tolist()


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle size x size pixels."""
    left, top = centre(np.array(image.size) - size)
    return image.crop((left, top, left + size, top + size))


def _what_it_is(source: Path | bytes) -> str:
    """Why no reader took a file."""
    if not isinstance(source, bytes):
        with source.open("rb") as file:
            source = file.read(12)
    if source[4:12] in HEIC:
        return "a HEIC photo, which cannot be read here; save it as JPEG (iPhone: Settings, Camera, Most Compatible)"
    return "not an image" if source else "the file is empty"


def _check_size(width: int, height: int, max_pixels: int, name: str) -> None:
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width} x {height} pixels is over the limit of {max_pixels}; make it smaller")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{name}: {width} x {height} pixels is a strip (over {MAX_ASPECT}:1), not a photo; crop it")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greys; convert("RGB") clips them to white in some versions of Pillow
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError(f"{name}: grey values outside 0..65535; save it with 8 or 16 bits")
        # 65535 / 255 = 257 exactly. 32-bit files that hold plain 8-bit values (0..255) keep them.
        wide = image.mode != "I" or grey.max() > 255
        return Image.fromarray(np.rint(grey / (257 if wide else 1)).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
