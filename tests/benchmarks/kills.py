"""A preparation that is killed with -9 ten times, at random moments: the store is that of one left in peace."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.data.test_prepare import kill_and_go_on

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        kill_and_go_on(Path(folder), kills=10, shards=48)
    print("killed ten times: the store is the same, byte for byte, and no process stayed")
