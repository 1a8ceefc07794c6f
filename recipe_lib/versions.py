"""Versions of the packages that a study's numbers and figures rest on."""

from __future__ import annotations

import platform
from importlib import metadata

import pandas as pd

# A new version of one of these can change a stage's numbers or figures.
PACKAGES = (
    *("torch", "torchvision", "lightning", "timm", "tokenizers", "scikit-learn", "faiss-cpu"),
    *("open_clip_torch", "transformers", "scikit-image", "scipy"),
    *("numpy", "pandas", "pyarrow", "pillow", "matplotlib", "seaborn"),
)


def installed() -> dict[str, str]:
    """Version of each of PACKAGES that is installed."""
    return {name: metadata.version(name) for name in PACKAGES if next(iter(metadata.distributions(name=name)), None)}


def versions() -> pd.DataFrame:
    """Python and `installed` as the table that every notebook ends with, a row each."""
    return pd.DataFrame([{"python": platform.python_version()} | installed()], index=["version"]).T
