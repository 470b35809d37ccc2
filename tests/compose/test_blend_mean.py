"""On single questions, a blend scores the mean of its models: shown on real scores of seven models to 5,884 questions."""

import gzip
import json
import math
import os
from pathlib import Path

import pytest

from fastft.compose.blend import BlendPolicy
from fastft.data.conversation import Conversation

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "router"


@pytest.mark.skipif(not DATA.is_dir(), reason="NOT CHECKED HERE: FASTFT_DATA has no router/")
@pytest.mark.parametrize(("name", "mean"), [("mmlu", 60.54), ("gsm8k", 50.05), ("arc", 50.08)])
def test_a_uniform_blend_scores_the_mean_of_its_models_within_chance(name, mean):
    """Given the scores, a blend's score is a sum of independent draws, whose variance is known: that is the error allowed."""
    with gzip.open(DATA / f"test_{name}.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    scores = [row["correct"] for row in rows]
    models = sorted(scores[0])
    means = [sum(each.values()) / len(each) for each in scores]
    assert 100 * sum(means) / len(rows) == pytest.approx(mean, abs=0.005)
    variance = [sum((each[m] - average) ** 2 for m in models) / len(models) for each, average in zip(scores, means)]
    error = math.sqrt(sum(variance)) / len(rows)
    z = []
    for seed in range(5):
        policy = BlendPolicy("blend", dict.fromkeys(models, 1), seed=str(seed))
        drawn = [policy.choose(Conversation(row["id"], []), 1, models).model for row in rows]
        blend = sum(each[model] for each, model in zip(scores, drawn)) / len(rows)
        z.append((blend - sum(means) / len(rows)) / error)
    assert max(map(abs, z)) < 3.5 and abs(sum(z)) / math.sqrt(len(z)) < 3
    best = max(sum(each[model] for each in scores) / len(rows) for model in models)
    assert best > sum(means) / len(rows) + 3 * error, "the best single model is better, and no draw of these reaches it"
