"""The order of the report: verdict, figures, a short table, what made it."""

import json

import pandas as pd
from PIL import Image

from recipe_lib.runner.report import write_report


def test_the_verdict_comes_first_and_the_long_table_is_linked(tmp_path):
    (tmp_path / "manifest.json").write_text(
        json.dumps({"stages": {}, "parameters": {"epochs": 3}, "environment": {"git": None, "packages": {}}})
    )
    (tmp_path / "metrics.json").write_text(json.dumps({"verdict": "no gain"}))
    rows = [
        {"system": system, "variant": variant, "split": split, "direction": way, "candidates": n, "recall_1": n / 1000}
        for system, variant in (("H-T", "baseline"), ("H-T", "debiased@no_z"), ("H-T++", "debiased"))
        for split, whole in (("iid", 100), ("do_context", 200))
        for way in ("i2r", "r2i")
        for n in (50, whole)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    for stage in ("01_data", "05_evaluation"):
        (tmp_path / stage).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / stage / "forest_plot.png")
    page = write_report(tmp_path).read_text()
    order = ["no gain", "Figures of 05_evaluation", "Figures of 01_data", "R@1 among all candidates", "epochs"]
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    assert 'href="results.csv"' in page and "no_z" not in page and "0.050" not in page
    heads = [f'<th scope="col">{split} {way}</th>' for split in ("iid", "do_context") for way in ("i2r", "r2i")]
    assert "".join(heads) in page
    cells = "".join(f"<td>{cell}</td>" for cell in ("H-T++", "debiased", "0.100", "0.100", "0.200", "0.200"))
    assert cells in page and page.count("<td>0.100</td>") == 4
