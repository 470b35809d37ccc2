"""Train a router on outcomes: `fastft router train OUTCOMES… -o DIR`."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastft.common.command_line import option, parse, run_module
from fastft.compose.router.features import HashedFeatures
from fastft.compose.router.fit import fit_heads, soft_labels
from fastft.compose.router.leaks import fingerprints
from fastft.compose.router.outcomes import Outcomes, read_outcomes
from fastft.compose.router.router import Router
from fastft.compose.router.tags import enhance


@dataclass
class TrainSettings:
    reward: Literal["rewards", "correct"] = "rewards"
    """What the router learns: the rewards, or whether the answers are correct."""
    temperature: float = 1.0
    """Divides the rewards, scaled to [0, 1], before the softmax. Below 1, the best model of a query counts for more."""
    beta: float = 0.3
    """The weight of a query's own label; the rest is the mean of its tags. 1: no enhancement; 0: tags only."""
    tags: str = "tags"
    """tags: those of the outcomes; clusters:N: N groups of similar queries; none."""
    encoder: str | None = None
    """A directory with a sentence encoder, which stays as it is."""
    c: float = 10.0
    """The inverse strength of the shrinkage of weights."""
    seed: int = 0


@dataclass
class RouterTrainConfig(TrainSettings):
    outcomes: list[str] = option(positional=True, several=True)
    """Files of outcomes."""
    output: str = option("router", short="-o")
    """The directory to write."""


def main(argv: list[str]) -> int:
    """`fastft router train`."""
    [config] = parse(
        argv, "fastft router train", "Train a router on outcomes, beside its baselines.", RouterTrainConfig
    )
    router = train_router(read_outcomes(config.outcomes), config)
    router.save(config.output)
    print(config.output)
    return 0


def train_router(outcomes: Outcomes, settings: TrainSettings) -> Router:
    rewards = outcomes.rewards if settings.reward == "rewards" else outcomes.correct
    features = HashedFeatures().fit(outcomes.queries)
    labels = enhance(soft_labels(rewards, settings.temperature), outcomes.tags, settings.beta)
    success = enhance(rewards, outcomes.tags, settings.beta)
    heads = fit_heads(features.transform(outcomes.queries), labels, success, settings.c)
    mean = np.nanmean(outcomes.measure, 0)
    usd = None if outcomes.usd is None else dict(zip(outcomes.models, np.nanmean(outcomes.usd, 0).tolist()))
    default = outcomes.models[int(mean.argmax())]
    return Router(outcomes.models, features, heads, default, usd=usd, runs=fingerprints(outcomes.queries))


if __name__ == "__main__":
    run_module(main)
