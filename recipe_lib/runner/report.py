"""One HTML page about a run, self-contained: verdict, every figure, main results, times, parameters."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import nbformat
import pandas as pd
from jinja2 import Environment
from nbconvert import HTMLExporter

from recipe_lib.paths import atomic_write_text
from recipe_lib.runner.fingerprint import ASIDE, read_manifest

PAGE = Path(__file__).with_name("report.html")  # a Jinja template


def write_report(study_dir: Path) -> Path:
    """Write report.html into a study's folder, and each executed notebook as HTML beside it.

    Reads manifest.json, and where they exist results.csv, metrics.json (its `verdict`) and every PNG below the folder.
    """
    manifest = read_manifest(study_dir)
    stages = manifest["stages"]
    page = Environment(autoescape=True).from_string(PAGE.read_text(encoding="utf-8"))
    html = page.render(
        study=study_dir.name,
        verdict=_verdict(study_dir / "metrics.json"),
        results=_results(study_dir / "results.csv"),
        stages=[
            [name, *(stage.get(key, "") for key in ("status", "seconds", "peak_memory_mb", "started"))]
            for name, stage in sorted(stages.items())
        ],
        pages=write_pages(study_dir, sorted(stages)),
        figures=_figures(study_dir),
        parameters=[[name, json.dumps(value, ensure_ascii=False)] for name, value in manifest["parameters"].items()],
        environment=_environment(stages),
    )
    atomic_write_text(study_dir / "report.html", html)
    return study_dir / "report.html"


def _verdict(path: Path) -> str:
    return str(json.loads(path.read_text(encoding="utf-8")).get("verdict", "")) if path.is_file() else ""


def _results(path: Path) -> dict | None:
    """R@1 over the whole splits, a row per trained system: test-time controls and bags stay in the file."""
    if not path.is_file():
        return None
    table = pd.read_csv(path, keep_default_na=False)
    whole = table["candidates"] == table.groupby("split")["candidates"].transform("max")
    table = table[whole & ~table["variant"].str.contains("@")]
    table = table.assign(column=table["split"] + " " + table["direction"])
    columns = list(table["column"].unique())
    rows = []
    for (system, variant), group in table.groupby(["system", "variant"], sort=False):
        recall = dict(zip(group["column"], group["recall_1"], strict=True))
        rows.append([system, variant, *(f"{recall[name]:.3f}" if name in recall else "" for name in columns)])
    return {"head": ["system", "variant", *columns], "rows": rows}


def _environment(stages: dict) -> list[list[str]]:
    """Each fact about where the stages ran; where it is not the same for all, with their numbers."""
    facts: dict[str, dict[str, list[str]]] = {}
    for stage, record in sorted(stages.items()):
        where = record["environment"]
        flat = {key: value for key, value in where.items() if key not in ("packages", "git")}
        if where["git"]:
            flat["git commit"] = where["git"]["commit"] + (" with local changes" if where["git"]["dirty"] else "")
        for name, value in (flat | where["packages"]).items():
            facts.setdefault(name, {}).setdefault(str(value), []).append(stage[:2])
    return [
        [name, "; ".join(f"{v} ({', '.join(s)})" for v, s in values.items()) if len(values) > 1 else next(iter(values))]
        for name, values in facts.items()
    ]


def _figures(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """(name, base64) of the figures of each stage, the last stage first; of no stage: under the study's name, last."""
    figures: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(folder.rglob("*.png")):
        parts = path.relative_to(folder).parts
        if parts[0] == ASIDE:
            continue
        title = path.stem.replace("_", " ").replace("-", " ")
        data = base64.b64encode(path.read_bytes()).decode()
        figures.setdefault(parts[0] if len(parts) > 1 else "", []).append((title, data))
    return {stage or folder.name: figures[stage] for stage in sorted(figures, reverse=True)}


def write_pages(folder: Path, stages: list[str]) -> list[str]:
    """Names of the executed notebooks' HTML pages; a page older than its notebook is made again."""
    # No scripts from elsewhere: a page opens without a network and calls none (so formulas show as TeX).
    elsewhere = ("require_js_url", "jquery_url", "mathjax_url", "mermaid_js_url")
    exporter = HTMLExporter(template_name="classic", **dict.fromkeys(elsewhere, ""))
    pages = []
    for stage in stages:
        notebook, page = folder / f"{stage}.ipynb", folder / f"{stage}.html"
        if notebook.is_file():
            if not page.is_file() or page.stat().st_mtime_ns < notebook.stat().st_mtime_ns:
                atomic_write_text(page, exporter.from_notebook_node(nbformat.read(notebook, as_version=4))[0])
            pages.append(page.name)
    return pages
