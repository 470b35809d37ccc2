"""ZOOTER on the real outcomes of seven models: the figures of docs/compose.md, whole test sets."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastft.compose.router.figures.measures import SetMeans
from fastft.compose.router.outcomes import read_outcomes
from fastft.compose.router.training.fit import fit_heads, hard_labels, soft_labels
from fastft.compose.router.training.tags import enhance
from fastft.compose.router.vectors.features import HashedFeatures

DATA = Path(os.environ.get("FASTFT_DATA") or "nowhere") / "router"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="NOT CHECKED HERE: FASTFT_DATA has no router/"),
]
TRAINED = 1000  # queries of each set
BEST_SINGLE = "dolphin-2.9-llama3-8b"


def training():
    outcomes = read_outcomes(
        [DATA / f"train_{name}.jsonl.gz" for name in ("mmlu", "gsm8k", "arc", "cmmlu", "humaneval")]
    )
    seen, kept = Counter(), []
    for row, (tag,) in enumerate(outcomes.tags):
        kept += [row] if seen[tag] < TRAINED else []
        seen[tag] += 1
    return outcomes.select(kept)


@pytest.fixture(scope="module")
def measured():
    """{way to choose: points of 100 on every test query}, as a SetMeans with its names; success decides, without margin."""
    outcomes = training()
    test = read_outcomes([DATA / f"test_{name}.jsonl.gz" for name in ("mmlu", "gsm8k", "arc")])
    features = HashedFeatures().fit(outcomes.queries)
    matrix, test_matrix = features.transform(outcomes.queries), features.transform(test.queries)
    columns = {"best single": 100 * test.correct[:, test.models.index(BEST_SINGLE)]}
    for beta in (0.3, 1.0):
        labels = enhance(soft_labels(outcomes.rewards, 1.0), outcomes.tags, beta)
        distributions = {"distribution": labels} | ({"hard": hard_labels(outcomes.rewards)} if beta == 1 else {})
        heads = fit_heads(matrix, distributions, enhance(outcomes.rewards, outcomes.tags, beta), c=10.0)
        for name, head in heads.items():
            chosen = head.logits(test_matrix).argmax(1)
            columns[f"{name} {beta:g}"] = 100 * test.correct[np.arange(len(test)), chosen]
    return SetMeans(np.column_stack(list(columns.values())), [tag for (tag,) in test.tags], test.queries), list(columns)


def test_both_heads_score_what_the_reference_does(measured):
    """61.97 by TF-IDF and scikit-learn; the best single model 59.57."""
    means, names = measured
    score = dict(zip(names, means.mean_K))
    assert score["best single"] == pytest.approx(59.57, abs=0.01)
    assert score["distribution 0.3"] == pytest.approx(61.97, abs=1) and score["success 0.3"] == pytest.approx(
        61.97, abs=1
    )


@pytest.mark.parametrize("other, about", [("best single", 2.41), ("success 1", 1.43), ("hard 1", 1.56)])
def test_it_beats_the_best_single_model_and_labels_that_are_not_smoothed(measured, other, about):
    means, names = measured
    gain = means.difference(names.index("success 0.3"), names.index(other))
    assert gain.low > 0 and gain.value == pytest.approx(about, abs=0.8)
