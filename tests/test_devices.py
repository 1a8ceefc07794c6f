import subprocess
import sys

import pytest
import torch

from recipe_lib import devices
from recipe_lib.training.fit import TrainingConfig


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_is_bfloat16_only_where_it_is_fast(monkeypatch, fast, precision):
    monkeypatch.setattr(devices, "fast_bfloat16", lambda _: fast)
    assert TrainingConfig.gather({"precision": "auto"}).precision == precision
    assert TrainingConfig.gather({"precision": "16-mixed"}).precision == "16-mixed"


MEAN = """
import sys, torch
from recipe_lib.devices import mean_over_devices
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
print(mean_over_devices(torch.tensor(rank + 1)).item())
"""


def test_a_mean_is_over_all_processes(tmp_path):
    assert devices.mean_over_devices(torch.tensor(3)) == 3
    command = [sys.executable, "-c", MEAN]
    both = [subprocess.Popen([*command, str(i), str(tmp_path / "meet")], stdout=subprocess.PIPE) for i in (0, 1)]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == [b"1.5", b"1.5"]
