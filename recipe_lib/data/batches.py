"""Which recipes stand in one batch, so are each other's negatives: of one stratum, of a kind, or of like ingredients.

All read the recipes alone, never a photo: strata and neighbours of photos would hold the very context that is to go.
"""

from __future__ import annotations

import numpy as np

from recipe_lib.data.store import Split

STRATA = 10  # clusters of recipes, where no confounder is known
NEAREST = 8  # neighbours that a recipe may be paired with


def strata(split: Split, seed: int) -> np.ndarray:
    """(N,) the stratum of each recipe: the kitchen's cuisine, the confounder; elsewhere a cluster by its words."""
    from scipy.sparse import csr_array  # seconds, for those alone who ask for it
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer

    truth = [row.get("cuisine") for row in split.truth]
    if all(truth):
        return np.unique(truth, return_inverse=True)[1]
    start = split.sentence_start[split.recipe_start]
    words = csr_array((np.ones(len(split.words)), split.words, start))
    weighted = TfidfTransformer(sublinear_tf=True).fit_transform(words)
    dim = min(64, len(split) - 1, words.shape[1] - 1)
    topics = TruncatedSVD(dim, random_state=seed).fit_transform(weighted)
    return MiniBatchKMeans(min(STRATA, len(split)), n_init=3, random_state=seed).fit_predict(topics)


def neighbours(split: Split) -> np.ndarray:
    """(N, NEAREST) the recipes whose ingredient labels are nearest, by the cosine of rarity-weighted labels."""
    import faiss  # as above
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import TfidfTransformer

    labels = csr_array((np.ones(len(split.labels)), split.labels, split.label_start), (len(split), split.num_classes))
    vectors = TfidfTransformer().fit_transform(labels).toarray().astype(np.float32)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    nearest = index.search(vectors, NEAREST + 1)[1]
    # A recipe is its own nearest, or one of several that are all alike.
    own = nearest == np.arange(len(split))[:, None]
    own[~own.any(1), -1] = True
    return nearest[~own].reshape(len(split), -1)


def of_one_stratum(rows: np.ndarray, strata: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows in an order in which each stratum stands together, the strata in random order, each in the given order."""
    place = rng.permutation(strata.max() + 1)
    return rows[np.argsort(place[strata[rows]], kind="stable")]


def with_neighbours(rows: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """Rows in an order in which each is followed by its nearest one that is still free, where there is such a one."""
    free, order = set(rows.tolist()), []
    for row in rows.tolist():
        if row in free:
            free.discard(row)
            order.append(row)
            other = next((other for other in nearest[row].tolist() if other in free), None)
            if other is not None:
                free.discard(other)
                order.append(other)
    return np.array(order, rows.dtype)


def half_of_a_kind(rows: np.ndarray, category: np.ndarray, batch_size: int) -> np.ndarray:
    """Rows in an order in which half of each batch are pairs of one category, as AdaMine's batches (arXiv:1804.11146).

    Pairs follow from the given order, so a category is drawn in proportion to its pairs. The other half are the rows
    without a category, then whatever is left. Each row stands once: where pairs or others run out, batches go without.

    Args:
        category: of every row there is, -1 for none.
    """
    waiting: dict[int, int] = {}  # category -> the row that has no partner yet
    pairs: list[tuple[int, int]] = []
    for row in rows.tolist():
        kind = int(category[row])
        if kind >= 0 and kind in waiting:
            pairs.append((waiting.pop(kind), row))
        elif kind >= 0:
            waiting[kind] = row
    quarter = batch_size // 4
    paired = np.array(pairs[: len(rows) // 4], rows.dtype).reshape(-1, 2)
    others = rows[~np.isin(rows, paired)]
    others = others[np.argsort(category[others] >= 0, kind="stable")]
    order, beside = [], batch_size - 2 * quarter
    for step in range(-(-len(rows) // batch_size)):
        order += [paired[step * quarter : (step + 1) * quarter].ravel(), others[step * beside : (step + 1) * beside]]
    order += [paired[(step + 1) * quarter :].ravel(), others[(step + 1) * beside :]]
    return np.concatenate(order)
