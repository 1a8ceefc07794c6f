import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from recipe_lib.evaluation import games
from recipe_lib.systems.registry import build
from tests.systems.test_games import DECODER, SMALL, replace


@pytest.mark.parametrize(("arguments", "rows"), [(SMALL, 2), (DECODER, 4)])
def test_pictures_beside_photos(tiny_store, tiny_config, arguments, rows):
    torch.manual_seed(0)
    system = build(replace(tiny_config, method="tnlbt", system_args=arguments)).eval()
    split = tiny_store.split("val")
    found = games.pictures(system, split, np.arange(4), 48)
    assert len(found) == rows and all(kind.shape[:2] == (4, 3) for kind in found.values())
    assert all(kind.min() >= 0 and kind.max() <= 1 for kind in found.values())
    fig = games.gallery(found, split.titles[:4])
    assert len(fig.axes) == 4 * rows and fig.axes[0].get_title() and fig.axes[4].get_ylabel() == "painted"
    plt.close(fig)
    if rows == 4:
        assert games.photo_share(found) > 0
        found["another's photo"] = found["painted"]
        assert games.photo_share(found) == 0


def test_each_players_curves():
    history = pd.DataFrame({"epoch": [1, 2], "retrieval": 1.0, "critic": [0.0, -1.0], "game_gap": [1.0, 2.0]})
    fig = games.curves(history)
    assert [[line.get_label() for line in ax.lines][:-1] for ax in fig.axes] == [["critic", "gap"]]
    assert history.columns.str.contains(games.PLAYERS).tolist() == [False, False, True, True]
    plt.close(fig)
