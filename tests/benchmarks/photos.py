"""Photos per second of one core: drawn by the kitchen, and cut into segments by superpixels.

python -m tests.benchmarks.photos [--runs 3]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from recipe_lib.data.segments import superpixel_segments
from recipe_lib.kitchen import model as kitchen
from recipe_lib.kitchen import plating
from tests.benchmarks import side_by_side, table

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    args, config = parser.parse_args(), kitchen.KitchenConfig()
    drawn = kitchen._decide(np.random.default_rng(0), config, True)
    scene = kitchen._scene(np.random.default_rng(1), config, drawn)
    photos = plating.draw(scene, 64)[0][:64]
    works = {
        "drawn": (kitchen.CHUNK, lambda: plating.draw(scene, 64)),
        "cut into segments": (len(photos), lambda: [superpixel_segments(photo) for photo in photos]),
    }
    seconds = side_by_side({name: work for name, (_, work) in works.items()}, args.runs, time.process_time)
    rows = [{"photos of 64 pixels": name, "per second": n / seconds[name]} for name, (n, _) in works.items()]
    print(table(rows))
