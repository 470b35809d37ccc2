"""A small trained router: sums go to one model, poems to the other."""

from pathlib import Path

SUMS = [f"What is {a} plus {b}? Add the numbers." for a in range(2, 12) for b in (3, 5, 7)]
POEMS = [
    f"Write a {kind} poem about the {what}."
    for kind in ("sad", "short", "funny")
    for what in "sea sun moon rain tree owl snow wind rose hill".split()
]


def train(path: Path, sums: str = "a", poems: str = "b", usd: dict[str, float] | None = None) -> Path:
    """Save a router under whose candidates `sums` is right about sums and `poems` about poems, and `sums` is the default."""
    import numpy as np

    from fastft.compose.router.outcomes import Outcomes
    from fastft.compose.router.training.train import TrainSettings, train_router

    rewards = [[1.0, 0.0]] * len(SUMS) + [[0.1, 1.0]] * len(POEMS)
    queries, models = SUMS + POEMS, [sums, poems]
    outcomes = Outcomes(
        ids=[f"q{n}" for n in range(len(queries))],
        queries=queries,
        tags=[["sum"]] * len(SUMS) + [["poem"]] * len(POEMS),
        models=models,
        rewards=np.array(rewards),
        usd=None if usd is None else np.array([[usd[name] for name in models]] * len(queries)),
    )
    router = train_router(outcomes, TrainSettings(), with_baselines=False)
    router.default = sums
    router.save(path)
    return path
