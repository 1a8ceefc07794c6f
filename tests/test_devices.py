import pytest

from recipe_lib import devices
from recipe_lib.training.fit import TrainingConfig


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_is_bfloat16_only_where_it_is_fast(monkeypatch, fast, precision):
    monkeypatch.setattr(devices, "fast_bfloat16", lambda _: fast)
    assert TrainingConfig.gather({"precision": "auto"}).precision == precision
    assert TrainingConfig.gather({"precision": "16-mixed"}).precision == "16-mixed"
