import io
import json

import numpy as np
import pytest
from PIL import Image

from recipe_lib.data.prepare import SHARD, StoreConfig, prepare
from recipe_lib.data.recipe import DataError
from recipe_lib.data.shards import ROW_GROUP
from recipe_lib.data.store import Store
from tests.data.test_prepare import EVAL, recipe


def test_rows_are_found_across_shards_and_row_groups(tmp_path):
    n = SHARD + ROW_GROUP + 5
    tiny = np.zeros((8, 8, 3), np.uint8)
    recipes = (recipe(i, images=[np.full_like(tiny, i % 251)]) for i in range(n))
    prepare([*recipes, *EVAL], tmp_path / "data", StoreConfig(8, 1, 2))
    split = Store(tmp_path / "data").split("train")
    assert len(split) == n
    for row in (0, ROW_GROUP - 1, ROW_GROUP, SHARD - 1, SHARD, n - 1):
        assert split.recipe(row)["id"] == f"r{row}" == split.ids[row]
        assert abs(int(np.asarray(Image.open(io.BytesIO(split.photo(row))))[0, 0, 0]) - row % 251) <= 3


def test_unknown_split_names_those_there_are(tiny_store):
    with pytest.raises(DataError, match="it has do_context, do_ingredients, iid"):
        tiny_store.split("tset")
    assert tiny_store.test_splits == ["iid", "do_context", "do_ingredients"]
    assert json.loads((tiny_store.folder / "card.json").read_text())["recipes"]["train"] == 96
