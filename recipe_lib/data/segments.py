"""Parts of a photo, as DAR encodes them beside the whole one (Song et al., ECCV 2024, arXiv:2312.04763).

Two ways to find them: `superpixel_segments` needs nothing but scikit-image and scikit-learn, `SamSegmenter` runs any
SAM of transformers. Both keep masks of a sensible size, rank them and return at most n, best first. `cut` makes the
small picture that is stored and encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from recipe_lib.data.descriptions import one_line_errors

Ranking = Callable[[np.ndarray], Sequence[float]]  # crops (m, 224, 224, 3) uint8 -> m scores, higher is better
GREY = (122, 116, 104)  # CLIP's mean colour: a frozen CLIP sees zeros there
WORK = 64  # shorter side that superpixels are sought at: parts of a dish are still large, and it is 16 times as fast
OVERLAP = 0.7  # intersection over union from which two masks are the same part


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of a photo.

    Args:
        mask: (H, W) bool, of the photo's size.
        score: of the rule or the ranking that chose it; comparable within one photo.
    """

    mask: np.ndarray
    score: float

    @property
    def area(self) -> float:
        """Share of the photo, 0..1."""
        return float(self.mask.mean())

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels; right and bottom are the first outside."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def cut(pixels: np.ndarray, segment: Segment, size: int) -> np.ndarray:
    """The segment alone, as a square picture for an image tower: (H, W, 3) uint8 -> (size, size, 3) uint8.

    The bounding box, made square around its centre so that shapes keep their aspect. All outside the mask is grey: the
    boxes of neighbours overlap, and with their surroundings kept, four segments would be four times the same picture.
    """
    left, top, right, bottom = segment.box
    side = max(right - left, bottom - top)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = GREY
    x, y = (side - (right - left)) // 2, (side - (bottom - top)) // 2
    inside = segment.mask[top:bottom, left:right, None]
    part = square[y : y + bottom - top, x : x + right - left]
    np.copyto(part, pixels[top:bottom, left:right], where=inside)
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC))


def superpixel_segments(
    pixels: np.ndarray,
    *,
    n: int = 4,
    min_area: float = 0.02,
    max_area: float = 0.9,
    colour_distance: float = 14.0,
    rank: Ranking | None = None,
) -> list[Segment]:
    """Regions of one colour: SLIC superpixels, neighbours merged while their colours are close. Deterministic.

    Args:
        pixels: photo (H, W, 3) uint8.
        n: segments at most; a photo may have fewer, a uniform one has none.
        min_area, max_area: share of the photo that a segment may take.
        colour_distance: CIELAB distance up to which neighbours are one part; about 2 is just visible.
        rank: scores the cut segments in place of the rule in `_prominence`.
    """
    from scipy import ndimage
    from skimage.color import rgb2lab
    from skimage.segmentation import slic
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.neighbors import kneighbors_graph  # noqa

    height, width = pixels.shape[:2]
    scale = min(1.0, WORK / min(height, width))
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    lab = rgb2lab(np.asarray(Image.fromarray(pixels).resize(shape, Image.Resampling.BOX)))
    lab = ndimage.gaussian_filter(lab, (0.6, 0.6, 0))
    labels = slic(lab, n_segments=120, compactness=8, max_num_iter=5, convert2lab=False, start_label=0)
    return labels, lab
