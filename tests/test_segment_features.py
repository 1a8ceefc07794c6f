import io

import numpy as np
import pytest
import torch
from PIL import Image

from recipe_lib.segment_features import segment_features


def test_features_are_those_of_each_segment(dar, clip_store, tmp_path):
    split = clip_store.split("train")
    features = np.load(segment_features(dar, split, tmp_path))
    assert features.shape == (len(split), split.segment_counts.max(), 128)
    for row in (0, 7, 40):
        pictures = [np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in split.segments(row)]
        expected = dar.segment_encoder.features(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
        torch.testing.assert_close(torch.from_numpy(features[row, : len(pictures)]), expected, rtol=1e-4, atol=1e-4)
        assert not features[row, len(pictures) :].any()


def test_an_interrupted_run_goes_on(dar, clip_store, tmp_path, monkeypatch):
    split, encode = clip_store.split("train"), type(dar.segment_encoder).features
    whole = np.load(segment_features(dar, split, tmp_path / "."))
    (path,) = tmp_path.glob("*.npy")
    path.unlink()
    monkeypatch.setattr("recipe_lib.segment_features.BATCH", 12)
    monkeypatch.setattr("recipe_lib.segment_features.FLUSH", 2)
    calls = []

    def killed(self, segments):
        calls.append(len(segments))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return encode(self, segments)

    monkeypatch.setattr(type(dar.segment_encoder), "features", killed)
    with pytest.raises(KeyboardInterrupt):
        segment_features(dar, split, tmp_path)
    assert not path.exists()
    again = np.load(segment_features(dar, split, tmp_path))
    np.testing.assert_allclose(again, whole, rtol=1e-4, atol=1e-4)
    assert len(calls) == 8 + (len(split) // 4 - 6), "six of the batches were on the disk"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_they_are_kept_for_the_tower_that_made_them(dar, clip_store, tmp_path, monkeypatch):
    split = clip_store.split("val")
    path = segment_features(dar, split, tmp_path, first_only=True)
    monkeypatch.setattr(type(dar.segment_encoder), "features", lambda *_: pytest.fail("they are there"))
    assert segment_features(dar, split, tmp_path, first_only=True) == path
    monkeypatch.undo()
    dar.image_encoder.adapters.up[0].bias.data += 1  # not the tower
    assert segment_features(dar, split, tmp_path, first_only=True) == path
    dar.image_encoder.tower.visual.proj.data += 1
    other = segment_features(dar, split, tmp_path, first_only=True)
    assert other != path and not np.array_equal(np.load(other), np.load(path))
    assert not list(tmp_path.glob("*.partial"))
