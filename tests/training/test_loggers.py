"""Curves by parameter: TensorBoard's files hold what history.csv holds, and more inside epochs."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from recipe_lib.systems.registry import build
from recipe_lib.training import watching
from recipe_lib.training.fit import TrainingConfig, fingerprint, train
from recipe_lib.training.loggers import check_logger, make_logger

CONFIG = TrainingConfig(epochs=2, batch_size=32, crop_size=48, learning_rate=2e-3, seed=5)


def fresh(config):
    torch.manual_seed(0)
    return build(config)


def test_tensorboard_has_the_curves(tiny_store, tiny_config, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(watching, "CURVE", 4)
    bare = train(fresh(tiny_config), tiny_store, CONFIG, tmp_path / "bare")
    history = train(fresh(tiny_config), tiny_store, replace(CONFIG, logger="tensorboard"), tmp_path / "logged")
    assert history.drop(columns="seconds").equals(bare.drop(columns="seconds")), "it changes no number"
    (run,) = (tmp_path / "logged/logs").iterdir()
    read = events.EventAccumulator(str(run))
    read.Reload()
    tags = set(read.Tags()["scalars"])
    assert tags >= {"retrieval", "self_supervised", "e_norm", "val_i2r_recall_1", "lr", "images_per_second"}
    for name in ("retrieval", "e_norm", "val_i2r_recall_1", "val_r2i_medr"):
        assert [point.value for point in read.Scalars(name)] == pytest.approx(history[name].tolist(), rel=1e-6), name
    inside = read.Scalars("so_far/retrieval")
    assert [point.step for point in inside] == [4, 6, 10, 12], "every fourth of the six steps of an epoch, and its last"
    assert inside[1].value == pytest.approx(history["retrieval"][0], rel=1e-6)
    assert all(point.value == pytest.approx(2e-3) for point in read.Scalars("lr"))
    assert all(point.value > 0 for point in read.Scalars("images_per_second"))


def test_csv_is_what_there_is_anyway_and_no_logger_changes_the_training(tiny_store, tiny_config, tmp_path):
    assert make_logger("csv", tmp_path) is False and list(tmp_path.iterdir()) == []
    system = fresh(tiny_config)
    assert len({fingerprint(system, tiny_store, replace(CONFIG, logger=name)) for name in ("csv", "wandb")}) == 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_says_what_to_install(name):
    if find_spec(name):
        check_logger(name)
    else:
        with pytest.raises(ModuleNotFoundError, match=f"logger {name}: .*pip install '{name}'") as error:
            check_logger(name)
        assert "\n" not in str(error.value)
