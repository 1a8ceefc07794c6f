import faiss
import numpy as np
import pytest
import torch

from recipe_lib.retrieval.search import FILES, SearchIndex


def cookbook(n=3000, d=32, clusters=60, seed=0):
    """Recipes around the centres of dishes; a photo is its recipe with noise."""
    rng = np.random.default_rng(seed)
    recipes = rng.normal(size=(clusters, d))[rng.integers(clusters, size=n)] + 0.7 * rng.normal(size=(n, d))
    photos = recipes[:50] + 0.3 * rng.normal(size=(min(n, 50), d))
    return recipes, photos, [f"id{i}" for i in range(n)], [f"dish {i}" for i in range(n)]


def loops(recipes, photo, k):
    cosine = [float(r @ photo / np.linalg.norm(r) / np.linalg.norm(photo)) for r in recipes]
    best = sorted(range(len(recipes)), key=lambda i: -cosine[i])[:k]
    return [f"id{i}" for i in best], [cosine[i] for i in best]


def test_exact_equals_loops():
    recipes, photos, ids, titles = cookbook(n=400)
    index = SearchIndex.build(torch.from_numpy(recipes), ids, titles)
    hits, names, similarity = index.search(torch.from_numpy(photos))
    for photo, row, name, values in zip(photos, hits, names, similarity, strict=True):
        best, cosine = loops(recipes, photo, 10)
        assert row.tolist() == best and name.tolist() == [f"dish {i[2:]}" for i in best]
        assert values == pytest.approx(cosine, abs=1e-6)


def test_rows_are_those_of_the_ids():
    recipes, photos, ids, titles = cookbook(n=400)
    index = SearchIndex.build(recipes, ids, titles)
    (rows, near), (hits, names, similarity) = index.nearest(photos, 7), index.search(photos, 7)
    assert (index.ids[rows] == hits).all() and (index.titles[rows] == names).all() and (near == similarity).all()


def test_approximate_finds_nearly_the_same():
    recipes, photos, ids, titles = cookbook()
    exact = SearchIndex.build(recipes, ids, titles).search(photos)
    close = SearchIndex.build(recipes, ids, titles, kind="approximate").search(photos)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact[0], close[0], strict=True)])
    assert recall > 0.8
    assert (close[0][:, 0] == exact[0][:, 0]).mean() > 0.9
    both = exact[0] == close[0]
    assert np.abs(exact[2] - close[2])[both].max() < 0.02


def test_an_approximate_index_scans_an_eighth_of_its_clusters():
    recipes, photos, ids, titles = cookbook()
    index = SearchIndex.build(recipes, ids, titles, kind="approximate")
    assert index.index.nlist == 54 and index.index.nprobe == 7 and "the nearest eighth" in SearchIndex.__doc__
    faiss.cvar.indexIVF_stats.reset()
    index.search(photos)
    assert faiss.cvar.indexIVF_stats.ndis / len(photos) < 2 * len(recipes) / 8, "clusters differ in size"


@pytest.mark.parametrize("kind", ["exact", "approximate"])
def test_saved_index_finds_the_same(tmp_path, kind):
    recipes, photos, ids, titles = cookbook(n=500)
    index = SearchIndex.build(recipes, ids, titles, kind=kind)
    index.save(tmp_path / "run" / "search")
    assert sorted(p.name for p in (tmp_path / "run" / "search").iterdir()) == sorted(FILES), "no partial files"
    for a, b in zip(index.search(photos), SearchIndex.load(tmp_path / "run" / "search").search(photos), strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("kind", ["exact", "approximate"])
@pytest.mark.parametrize("n", [1, 5, 60, 200])
def test_small_cookbooks_return_all_they_have(kind, n):
    recipes, photos, ids, titles = cookbook(n=n)
    hits, _, similarity = SearchIndex.build(recipes, ids, titles, kind=kind).search(photos[:3, :], k=100)
    assert hits.shape == (len(photos[:3]), min(n, 100)) and (np.diff(similarity) <= 0).all()
    assert all(len(set(row)) == min(n, 100) for row in hits)


def test_files_that_do_not_belong_together_are_named(tmp_path):
    recipes, _, ids, titles = cookbook(n=100)
    SearchIndex.build(recipes, ids, titles).save(tmp_path / "a")
    SearchIndex.build(recipes[:90], ids[:90], titles[:90]).save(tmp_path / "b")
    (tmp_path / "a" / FILES[1]).write_bytes((tmp_path / "b" / FILES[1]).read_bytes())
    with pytest.raises(ValueError, match="recipes.parquet: not the ids and titles of the 100 recipes in index.faiss"):
        SearchIndex.load(tmp_path / "a")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [None, b"", b"garbage" * 50])
def test_missing_or_broken_file_is_named(tmp_path, name, content):
    recipes, _, ids, titles = cookbook(n=60)
    SearchIndex.build(recipes, ids, titles).save(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not there, or broken") as error:
        SearchIndex.load(tmp_path)
    assert "\n" not in str(error.value)


def test_bad_input_is_refused():
    recipes, photos, ids, titles = cookbook(n=60)
    index = SearchIndex.build(recipes, ids, titles)
    with pytest.raises(ValueError, match=r"queries \(50, 31\) must be \(Q, 32\)"):
        index.search(photos[:, :31])
    with pytest.raises(ValueError, match="query 0 is zero"):
        index.search(photos * 0)
    recipes[7] = np.nan
    for kind in ("exact", "approximate"):  # the approximate index meets it in a random order
        with pytest.raises(ValueError, match="^embedding 7 is zero or not finite"):
            SearchIndex.build(recipes, ids, titles, kind)
    with pytest.raises(ValueError, match="equally many"):
        SearchIndex.build(recipes, ids[1:], titles)
    with pytest.raises(ValueError, match="one of exact, approximate"):
        SearchIndex.build(recipes, ids, titles, kind="fast")
