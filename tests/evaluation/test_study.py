from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from recipe_lib.causal.debiasing import VARIANTS
from recipe_lib.evaluation.scores import COLUMNS, encode
from recipe_lib.evaluation.study import evaluate_study, study_comparisons, verdict
from recipe_lib.retrieval.metrics import cross_modal_ranks
from recipe_lib.systems.attach import attach
from tests.evaluation.test_comparisons import frame


@pytest.fixture
def scored(tiny_config, tiny_store, tmp_path):
    from recipe_lib.systems.registry import build

    torch.manual_seed(0)
    baseline = build(tiny_config)
    oracle = attach(baseline, VARIANTS["oracle"], torch.randn(20, 16))
    systems = {"baseline": lambda: baseline, "oracle": lambda: oracle}
    run = partial(evaluate_study, systems, tiny_store, tmp_path, system="H-T", seed=1, crop=48)
    return baseline, run(candidates=[10], bags=2)


def test_every_variant_on_every_split(scored, tiny_store):
    baseline, study = scored
    assert list(study.results.columns) == COLUMNS and set(study.results["system"]) == {"H-T"}
    variants = {"baseline", "oracle", "oracle@no_z", "oracle@permuted_labels"}
    assert variants <= set(study.results["variant"]) and set(study.results["split"]) == set(tiny_store.test_splits)
    assert set(study.results["candidates"]) == {10, 30} and set(study.encoded) == {
        (name, split) for name in ("baseline", "oracle") for split in tiny_store.test_splits
    }
    own = encode(baseline, tiny_store.split("iid"), crop=48)
    rows = study.ranks.query("variant == 'baseline' and split == 'iid'")
    for way, ranks in zip(("i2r", "r2i"), cross_modal_ranks(own.embedding, own.recipes), strict=True):
        assert rows[rows["direction"] == way]["rank"].tolist() == ranks.tolist()


def test_queries_of_a_near_duplicate_pair_are_one_cluster(scored, tiny_store):
    _, study = scored
    split = tiny_store.split("iid")
    rows = study.ranks.query("variant == 'baseline' and split == 'iid'")
    clusters = rows[rows["direction"] == "r2i"].set_index("query")["cluster"]
    row = {id_: i for i, id_ in enumerate(split.ids)}
    paired = 0
    for i, truth in enumerate(split.truth):
        other = row.get(truth["twin"], i)
        assert clusters[i] == min(i, other)
        paired += other != i
    assert paired >= 4 and set(study.near_duplicates["variant"]) == {"baseline", "oracle"}
    assert set(study.near_duplicates["direction"]) == {"i2r", "r2i"} and len(study.near_duplicates) == 12
    assert study.ranks.groupby("split")["test_set"].nunique().eq(1).all() and study.ranks["test_set"].nunique() == 3


def test_comparisons_and_verdict_name_the_control():
    rng = np.random.default_rng(0)
    parts = []
    for variant, p in (("baseline", 0.2), ("equal_compute", 0.3), ("debiased", 0.6), ("debiased+", 0.6)):
        for split, fall in (("iid", 0), ("do_context", 0.15)):
            parts.append(frame(variant, split, rng.random(300) < p - fall))
    ranks = pd.concat(parts)
    comparisons = study_comparisons(ranks, ["iid", "do_context"])
    compared = {(row["a"], row["b"]) for row in comparisons if row["split"] == row["against_split"] == "iid"}
    assert compared == {("equal_compute", "baseline"), ("debiased", "equal_compute"), ("debiased+", "debiased")}
    assert {row["direction"] for row in comparisons} == {"i2r", "r2i"}
    assert len(comparisons) == 3 * 2 * 2 + 2 * (3 + 1), "and what three variants lose, and one difference of that"
    said = verdict(comparisons)
    lines = said.splitlines()
    assert len(lines) == 4 and lines[0].startswith("debiased above equal_compute: i2r recall_1 +0.")
    assert ": r2i" in lines[1] and lines[2].endswith("on do_context, 1 seed: another seed could differ.")
    assert "change from iid to do_context" in lines[3]
    assert "nothing is claimed" in verdict(study_comparisons(frame("baseline", "iid", rng.random(9) < 0.5), ["iid"]))
