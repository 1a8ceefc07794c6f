"""Parts of a photo, as DAR encodes them beside the whole one (Song et al., ECCV 2024, arXiv:2312.04763).

Two ways to find them: `superpixel_segments` needs scikit-image and no weights, `SamSegmenter` runs a SAM of
transformers. Both keep masks of a sensible size and return the n best, best first. `cut` makes the small picture that
is stored and encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from recipe_lib.data.descriptions import one_line_errors

Rank = Callable[[np.ndarray], Sequence[float]]  # crops (m, 224, 224, 3) uint8 -> m scores, higher is better
GREY = (122, 116, 104)  # CLIP's mean colour: where a crop is empty, the frozen encoder sees zeros
WORK = (
    64  # shorter side, pixels, at which parts are sought and judged: enough for parts of a dish, and 16 times as fast
)
GRID = 32  # cells per side of the mask of the dish
CENTRE, REACH = 0.15, 0.4  # radii in shares of the side: all within is dish, and parts beyond do not speak for it
CONTRAST = 5.0  # CIELAB; a region closer to the colours at the photo's edge is no part (a table, a blank photo)
FAINT = 0.2  # of the best segment's score: what the rule puts below is a rim or a piece of the table
SAME = 0.7  # intersection over union from which two masks are one part


@dataclass(frozen=True, eq=False, slots=True)
class Segment:
    """A part of a photo.

    Args:
        mask: (H, W) bool, never empty.
        score: what it was chosen by; says something beside other segments of the same photo only.
    """

    mask: np.ndarray
    score: float

    @property
    def area(self) -> float:
        """Share of the photo, 0..1."""
        return _share(self.mask)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels; right and bottom are the first outside."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def cut(pixels: np.ndarray, segment: Segment, size: int) -> np.ndarray:
    """The segment alone, as a square for an image tower: photo (H, W, 3) uint8 -> (size, size, 3) uint8.

    Its bounding box, padded to a square so that shapes keep their aspect; everything outside the mask is GREY. Boxes of
    the parts of one dish overlap: with the surroundings left in, four segments would be much the same picture.
    """
    left, top, right, bottom = segment.box
    side = max(right - left, bottom - top)
    square = np.full((side, side, 3), GREY, np.uint8)
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    part, mask = square[y : y + bottom - top, x : x + right - left], segment.mask[top:bottom, left:right]
    part[mask] = pixels[top:bottom, left:right][mask]
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC))


def foreground(pixels: np.ndarray, segments: Sequence[Segment]) -> bytes:
    """Where the dish lies in a photo, found from its segments: a GRID x GRID mask over the photo, bit by bit.

    A random walker (Grady, 2006) decides cell by cell between the dish, which the parts and the centre are certain to
    belong to, and the surroundings, which the photo's rim is. Parts alone would leave holes where a dish has a third
    colour, and hold pieces of the table; where a walk meets no edge, the mask is about a disc.

    Args:
        pixels: photo (H, W, 3) uint8.
        segments: of it; may be none.
    """
    from skimage.color import rgb2lab
    from skimage.segmentation import random_walker

    y, x = (np.mgrid[:GRID, :GRID] + 0.5) / GRID - 0.5
    away = np.hypot(y, x)
    seeds = (away < CENTRE).astype(int)
    if segments:
        parts = np.logical_or.reduce([segment.mask for segment in segments])
        seeds[(_cells(parts.astype(np.uint8) * 255) > 191) & (away < REACH)] = 1
    seeds[np.maximum(abs(y), abs(x)) > 0.5 - 1 / GRID] = 2
    # One more on the lightness: the walker divides by the spread of all values, which black alone has none of.
    lab = rgb2lab(_cells(pixels)) + np.array([1, 0, 0])
    return np.packbits(random_walker(lab, seeds, mode="bf", channel_axis=-1) == 1).tobytes()


def _cells(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((GRID, GRID), Image.Resampling.BOX))


def superpixel_segments(
    pixels: np.ndarray,
    *,
    n: int = 4,
    min_area: float = 0.02,
    max_area: float = 0.9,
    distance: float = 18.0,
    rank: Rank | None = None,
) -> list[Segment]:
    """Groups of superpixels of one colour that lie near each other, such as the tomatoes of a salad; deterministic.

    SLIC superpixels, then average-linkage clustering. A group need not be connected: the pieces of a cut ingredient
    seldom touch, and each alone is too small to be encoded.

    Args:
        pixels: photo (H, W, 3) uint8, of any size.
        n: segments at most. A photo may have fewer; one without parts, such as a blank one, has none: [].
        min_area, max_area: share of the photo that a segment takes.
        distance: mean CIELAB distance up to which superpixels are one group; the photo's longer side counts 25.
        rank: scores the crops in place of the rule: root of the area x nearness to the centre x contrast to
            the photo's edge.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from skimage.segmentation import slic

    lab = _small_lab(pixels)
    # SLIC stretches the values to 0..1; undone here, else a dull photo's noise weighs as much as a salad's colours.
    compactness = 7.5 / max(1.0, np.ptp(lab))
    labels = slic(lab, n_segments=130, compactness=compactness, max_num_iter=4, convert2lab=False, start_label=0)
    count = np.bincount(labels.ravel())
    if len(count) < 2:  # a photo of few pixels
        return []
    y, x = np.mgrid[: labels.shape[0], : labels.shape[1]] * (25 / max(labels.shape))
    # Light and shadow change the lightness of one ingredient more than its colour.
    features = (0.6 * lab[..., 0], lab[..., 1], lab[..., 2], y, x)
    means = np.stack([np.bincount(labels.ravel(), f.ravel()) / count for f in features], 1)
    group = fcluster(linkage(means, "average"), distance, "distance")[labels]
    return _best(pixels, [group == i for i in range(1, group.max() + 1)], lab, n, min_area, max_area, rank)


class SamSegmenter:
    """Automatic masks of SAM (Kirillov et al., 2023), SAM 2 or SAM-HQ through transformers.

    Args:
        model: name on the Hugging Face hub, such as "facebook/sam-vit-base", or a local folder; safetensors only.
        device, dtype: of the model, such as "cuda" and "float16".
        points: points per side of the grid that masks are grown from.
        batch_size: points at a time.
        options: further arguments of the transformers pipeline "mask-generation", such as pred_iou_thresh.

    Raises:
        ValueError: no such model, or not one of mask generation.
        ConnectionError: the hub does not answer.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        points: int = 32,
        batch_size: int = 64,
        **options: float,
    ):
        from transformers import pipeline

        with one_line_errors(model):
            self._masks = pipeline(
                "mask-generation",
                model,
                device=device,
                dtype=dtype,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        self._options = {"points_per_crop": points, "points_per_batch": batch_size, **options}
        self._name = f"{model} {points} {sorted(options.items())}"

    def __str__(self) -> str:
        """What decides its masks."""
        return self._name

    def __call__(
        self,
        photos: Sequence[np.ndarray],
        *,
        n: int = 4,
        min_area: float = 0.02,
        max_area: float = 0.9,
        rank: Rank | None = None,
    ) -> list[list[Segment]]:
        """The segments of each photo (H, W, 3) uint8; arguments and order as in `superpixel_segments`."""
        segments = []
        for pixels in photos:
            masks = self._masks(Image.fromarray(pixels), **self._options)["masks"]
            masks = [np.asarray(mask, bool) for mask in masks]
            segments.append(_best(pixels, masks, _small_lab(pixels), n, min_area, max_area, rank))
        return segments


def _small_lab(pixels: np.ndarray) -> np.ndarray:
    """Photo (H, W, 3) uint8 -> CIELAB (h, w, 3), its shorter side WORK at most."""
    from skimage.color import rgb2lab

    scale = min(1.0, WORK / min(pixels.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    return rgb2lab(np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)))


def _best(pixels, masks: list[np.ndarray], lab: np.ndarray, n: int, low: float, high: float, rank) -> list[Segment]:
    """The n best masks, of any size, that fit the limits; of two that are the same the better one."""
    height, width = lab.shape[:2]
    y, x = np.mgrid[:height, :width]
    near = np.exp(-(((y + 0.5) / height - 0.5) ** 2 + ((x + 0.5) / width - 0.5) ** 2) / 0.05)
    frame = np.ones((height, width), bool)
    rim = max(1, min(height, width) // 16)
    frame[rim:-rim, rim:-rim] = False
    fitting = []
    for mask in masks:
        if _share(mask) < low / 2:  # most of them: not worth the rest
            continue
        small, mask = _resized(mask, lab.shape), _resized(mask, pixels.shape)
        area = _share(mask)
        if not low <= area <= high or not area or not small.any() or small[frame].all():
            continue
        edge = lab[frame & ~small]
        contrast = float(np.linalg.norm(edge - lab[small].mean(0), axis=1).mean())
        if contrast >= CONTRAST:
            # The root: a few olives on a pizza are a part worth more than a tenth of its dough.
            fitting.append(Segment(mask, float(area**0.5 * near[small].mean() * contrast)))
    if rank and fitting:
        scores = rank(np.stack([cut(pixels, segment, 224) for segment in fitting]))
        fitting = [Segment(segment.mask, float(score)) for segment, score in zip(fitting, scores, strict=True)]
    elif fitting:
        least = FAINT * max(segment.score for segment in fitting)
        fitting = [segment for segment in fitting if segment.score >= least]
    chosen: list[Segment] = []
    for segment in sorted(fitting, key=lambda segment: -segment.score):
        if len(chosen) == n:
            break
        if all((segment.mask & c.mask).sum() < SAME * (segment.mask | c.mask).sum() for c in chosen):
            chosen.append(segment)
    return chosen


def _share(mask: np.ndarray) -> float:
    """Of a mask that is set; ten times as fast as its mean."""
    return np.count_nonzero(mask) / mask.size


def _resized(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Mask (h, w) at another size, with smooth outlines."""
    if mask.shape == shape[:2]:
        return mask
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)) > 127
