"""Bradley-Terry ratings from few and scattered battles, such as people's votes, with intervals that are wide if votes are
few.

    bradley_terry([Game("a", "b", 1.0, "q1"), ...])      # {"a": Interval(1120, 890, 1350), ...}

fastft.judge.statistics.stats.ratings is for a judge's evaluation, where every pair has met on every question. There,
resampling questions is right. Here it is not: if a pair has met three times and one model won all three, every resample is
the same, and the interval would have no width. Adding a tie to each of many pairs would pull ratings together. Here, ratings
have a weak prior, a normal one around the mean with a standard deviation of 400 points, and intervals come from the
curvature of the posterior, or from the spread of questions' scores (the clustered sandwich) where that is wider.
benchmarks/votes.py shows the coverage of both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastft.judge.statistics.intervals import Interval

POINTS = 400 / math.log(10)
"""Points of the Elo scale in one unit of log odds."""
PRIOR_POINTS = 400.0
Z = 1.96


@dataclass(frozen=True)
class Game:
    first: str
    second: str
    score: float
    """1 if the first won, 0 if it lost, 0.5 for a tie."""
    question: str
    """Battles on the same question depend on each other."""


def bradley_terry(battles: Sequence[Game]) -> dict[str, Interval]:
    """Return ratings on the Elo scale with mean 1000 and 95 % intervals, the best first.

    Battles must connect all models, because between two groups that never met, the prior alone would decide.
    """
    if not battles:
        return {}
    names = sorted({name for battle in battles for name in (battle.first, battle.second)})
    place = {name: i for i, name in enumerate(names)}
    games = np.arange(len(battles))
    design_GM = np.zeros((len(battles), len(names)))
    design_GM[games, [place[battle.first] for battle in battles]] = 1
    design_GM[games, [place[battle.second] for battle in battles]] = -1
    scores_G = np.array([battle.score for battle in battles])
    question_G = np.unique([battle.question for battle in battles], return_inverse=True)[1]
    values_M, errors_M = _fit(design_GM, scores_G, question_G)
    found = {
        name: Interval(*(1000 + POINTS * (value + z * error) for z in (0, -Z, Z)))
        for name, value, error in zip(names, values_M.tolist(), errors_M.tolist())
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].value))


def _fit(design_GM: np.ndarray, scores_G: np.ndarray, question_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mode of the posterior [M], with mean 0, and its standard errors [M], by Newton's method."""
    models = design_GM.shape[1]
    precision = (POINTS / PRIOR_POINTS) ** 2
    values_M = np.zeros(models)
    for _ in range(100):
        rates_G = 1 / (1 + np.exp(-design_GM @ values_M))
        hessian_MM = (design_GM * (rates_G * (1 - rates_G))[:, None]).T @ design_GM + precision * np.eye(models)
        step_M = np.linalg.solve(hessian_MM, design_GM.T @ (scores_G - rates_G) - precision * values_M)
        values_M += step_M
        if abs(step_M).max() < 1e-9:
            break
    # The mean of all ratings is fixed, so the errors are those of the distances from the mean.
    centre_MM = np.eye(models) - 1 / models
    bread_MM = centre_MM @ np.linalg.inv(hessian_MM)
    gradients_QM = np.zeros((question_G.max() + 1, models))
    np.add.at(gradients_QM, question_G, design_GM * (scores_G - rates_G)[:, None])
    by_curvature_M = np.diag(bread_MM @ centre_MM)
    by_questions_M = np.diag(bread_MM @ (gradients_QM.T @ gradients_QM) @ bread_MM.T)
    return values_M, np.sqrt(np.maximum(by_curvature_M, by_questions_M))
