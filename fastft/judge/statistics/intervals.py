"""Uncertainty: confidence intervals over questions, a paired test, and the number of questions needed to see a difference.

The sampling unit is the question, not the judgment. The judgments of one question (both orders, all turns, all judges)
depend on each other, so intervals resample whole questions (a cluster bootstrap; 95 %, by percentiles). Resampling single
judgments, as is common, makes intervals too narrow: 80 questions in both orders are not 160 independent ones. For shares,
one won and one lost question are added, because intervals near 100 % would otherwise be too narrow (benchmarks/judge.py
shows the coverage of all three).
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000
SIGN_FLIPS = 10_000
SEED = 0


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_mean(values_N: np.ndarray, outside: float = 5.0, resamples: int = RESAMPLES) -> Interval:
    """Return the mean with its percentile interval over resampled values: over questions, if there is one value for each.

    `outside` is what the interval leaves out, in percent; far below 5 it needs more `resamples`, because its ends are rare.
    """
    if not len(values_N):
        return Interval(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(SEED)
    means_B = values_N[rng.integers(0, len(values_N), (resamples, len(values_N)))].mean(1)
    low, high = np.percentile(means_B, [outside / 2, 100 - outside / 2])
    return Interval(float(values_N.mean()), float(low), float(high))


def bootstrap_share(won_Q: np.ndarray, of_Q: np.ndarray) -> Interval:
    """Return sum(`won_Q`) / sum(`of_Q`) with its percentile interval over resampled questions.

    One question wholly won and one wholly lost are resampled with the others (Agresti and Coull, 1998, add two of each to
    single trials). Without them, the interval for 80 questions of which 97 % are won holds the true share in 90 of 100
    evaluations instead of 95.
    """
    if not len(won_Q):
        return Interval(math.nan, math.nan, math.nan)
    size, rng = of_Q.mean(), np.random.default_rng(SEED)
    drawn_BQ = rng.integers(0, len(won_Q) + 2, (RESAMPLES // 2, len(won_Q) + 2))
    of_B = np.append(of_Q, [size, size])[drawn_BQ].sum(1)
    # Each draw is used twice, with the two added questions exchanged: so the other model's interval is the mirror image.
    ends = ([0.0, size], [size, 0.0])
    shares_B = np.concatenate([np.append(won_Q, two)[drawn_BQ].sum(1) / of_B for two in ends])
    low, high = np.percentile(shares_B, [2.5, 97.5])
    return Interval(float(won_Q.sum() / of_Q.sum()), float(low), float(high))


def share_by_question(looks: Iterable[tuple[str, bool]]) -> Interval | None:
    """Return the share of `looks`, pairs of a question and a truth value, that are true; None if there are none."""
    counts = defaultdict(lambda: [0, 0])
    for question, holds in looks:
        counts[question][0] += holds
        counts[question][1] += 1
    return bootstrap_share(*np.array(list(counts.values()), float).T) if counts else None


def sign_flip_p(differences_Q: np.ndarray) -> float:
    """Return the two-sided p value of the mean of paired differences, by random sign flips (Fisher's permutation test)."""
    if not len(differences_Q):
        return math.nan
    rng = np.random.default_rng(SEED)
    signs_BQ = rng.integers(0, 2, (SIGN_FLIPS, len(differences_Q))) * 2 - 1
    means_B = np.abs((signs_BQ * differences_Q).mean(1))
    return float((1 + (means_B >= abs(differences_Q.mean()) - 1e-12).sum()) / (1 + SIGN_FLIPS))


def questions_needed(difference: float, spread: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Return how many questions a two-sided paired test needs to detect a true mean difference with this power.

    `spread` is the standard deviation over questions. n = ((z(1 - alpha / 2) + z(power)) spread / difference)^2, or 0 if the
    spread is not known.
    """
    if not math.isfinite(spread):
        return 0
    z = NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(power)
    return math.ceil((z * spread / difference) ** 2)
