"""The measures of a router, from arrays alone: means over sets with intervals, ranks, areas, and who was chosen.

    means = SetMeans(scores_NK, sets, queries)      # K systems on N queries
    means.difference(0, 1)                          # Interval of system 0 minus system 1

Scores are what a system's chosen model scored on each query. Every set of queries counts the same, however many queries it
has, as in the tables of ZOOTER (arXiv 2311.08692) and RouterDC (arXiv 2409.19886).
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from fastft.judge.statistics.intervals import RESAMPLES, SEED, Interval

BLOCK = 1 << 22
"""Drawn queries that are in memory at a time."""
LEAST = 20
"""Different queries that a set needs to count as one."""
POOL = "small sets"


def pooled(sets: Sequence[str], queries: Sequence[str], least: int = LEAST) -> list[str]:
    """Return the set of each query after sets of fewer than `least` different queries have become one.

    If that one is small, too, its queries count with the largest set. Otherwise a set of one query, which has no variance,
    would have as much weight as one of thousands, and an interval would not know it.
    """
    sizes = set_sizes(sets, queries)
    small = {name for name, size in sizes.items() if size < least}
    if len(small) == len(sizes):
        return [POOL if len(small) > 1 else name for name in sets]
    size = len({query for name, query in zip(sets, queries) if name in small})
    home = POOL if size >= least else max((name for name in sizes if name not in small), key=sizes.__getitem__)
    return [home if name in small else name for name in sets]


def set_sizes(sets: Iterable[str], queries: Iterable[str]) -> Counter[str]:
    """How many different queries each set has."""
    return Counter(name for name, _ in dict.fromkeys(zip(sets, queries)))


class SetMeans:
    """Mean scores of K systems over S sets, and what they would have been on other draws of queries.

    The intervals are percentiles of a paired bootstrap: in every set, queries are drawn with replacement, as many as there
    are, the same for all systems. Rows with the same text are one query and are drawn together.
    """

    def __init__(self, scores_NK: np.ndarray, sets: Sequence[str], queries: Sequence[str]):
        self.sets = list(dict.fromkeys(sets))
        rows_of_set = _groups(sets)
        self.counts = np.array([len(rows) for rows in rows_of_set])
        self.by_set_SK = np.array([scores_NK[rows].mean(0) for rows in rows_of_set])
        self.interval_by_set: list[list[Interval]] = []
        self.mean_K = self.by_set_SK.mean(0)
        self.mean_BK = np.zeros((RESAMPLES, scores_NK.shape[1]))
        rng = np.random.default_rng(SEED)
        for rows, mean_K in zip(rows_of_set, self.by_set_SK):
            drawn_BK = _resampled_means(scores_NK[rows], [queries[row] for row in rows], rng)
            self.mean_BK += drawn_BK / len(self.sets)
            self.interval_by_set.append([_interval(*each) for each in zip(mean_K, drawn_BK.T)])

    def mean(self, system: int) -> Interval:
        return _interval(self.mean_K[system], self.mean_BK[:, system])

    def difference(self, first: int, second: int) -> Interval:
        """The mean of the first system minus that of the second."""
        return _interval(self.mean_K[first] - self.mean_K[second], self.mean_BK[:, first] - self.mean_BK[:, second])

    def ratio(self, first: int, second: int) -> Interval | None:
        """The mean of the first over that of the second; None if the second's is not clearly above 0."""
        return _ratio(self.mean_K[first], self.mean_BK[:, first], self.mean_K[second], self.mean_BK[:, second])

    def share(self, system: int, low: int, high: int) -> Interval | None:
        """How much of the way from the system `low` to `high` a system goes: 0 is `low`, 1 is `high`, below 0 is worse.

        None if `high` is not clearly better than `low`.
        """
        (done, way), drawn = self.mean_K[[system, high]] - self.mean_K[low], self.mean_BK - self.mean_BK[:, [low]]
        return _ratio(done, drawn[:, system], way, drawn[:, high])


def _ratio(value: float, value_B: np.ndarray, of: float, of_B: np.ndarray) -> Interval | None:
    above = of_B > 0
    if of <= 0 or above.mean() < 0.975:
        return None
    return _interval(value / of, value_B[above] / of_B[above])


def _groups(labels: Sequence[str]) -> list[np.ndarray]:
    """The places of every label, in the order in which the labels first appear."""
    place = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    numbers = np.array([place[label] for label in labels])
    return [np.flatnonzero(numbers == number) for number in range(len(place))]


def _resampled_means(scores_NK: np.ndarray, queries: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """The means of RESAMPLES draws of the queries, with replacement [B, K]."""
    place = {query: number for number, query in enumerate(dict.fromkeys(queries))}
    of_N = np.array([place[query] for query in queries])
    sums_QK = np.zeros((len(place), scores_NK.shape[1] + 1))
    np.add.at(sums_QK, of_N, np.column_stack([scores_NK, np.ones(len(scores_NK))]))
    made, block = [], max(1, BLOCK // len(place))
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        drawn = rng.integers(0, len(place), (size, len(place))) + len(place) * np.arange(size)[:, None]
        times_BQ = np.bincount(drawn.ravel(), minlength=size * len(place)).reshape(size, len(place))
        made.append(times_BQ @ sums_QK)
    totals_BK = np.concatenate(made)
    return totals_BK[:, :-1] / totals_BK[:, -1:]


def _interval(value: float, drawn_B: np.ndarray) -> Interval:
    low, high = np.percentile(drawn_B, [2.5, 97.5])
    # The median of skewed draws may lie far from the value: an interval that does not hold it would be read as an error.
    return Interval(float(value), min(float(low), float(value)), max(float(high), float(value)))


def weights_of(sets: Sequence[str]) -> np.ndarray:
    """The weight of every query [N] with which a sum is the mean over sets; they sum to 1."""
    groups = _groups(sets)
    weights_N = np.empty(len(sets))
    for rows in groups:
        weights_N[rows] = 1 / len(groups) / len(rows)
    return weights_N


# --- Ranks ------------------------------------------------------------------------------------------------------------


def rank_and_uplift(system_S: np.ndarray, models_SM: np.ndarray) -> tuple[float, float]:
    """(mean task rank, uplift) of a system beside the candidate models, each alone.

    Mean task rank: in each set, the system and the models are ranked by their mean score, 1 is the best, equal ones share
    the mean of their ranks; the unweighted mean over sets. Uplift: the share of sets in which no model is better than the
    system. Both are of the system and the models alone, so that they do not change with the baselines beside them.
    """
    better_S = (models_SM > system_S[:, None] + 1e-12).sum(1)
    equal_S = (np.abs(models_SM - system_S[:, None]) <= 1e-12).sum(1)
    return float((1 + better_S + equal_S / 2).mean()), float((better_S == 0).mean())


def rank_and_uplift_of_model(model: int, models_SM: np.ndarray) -> tuple[float, float]:
    """The same of one of the models, beside the others."""
    return rank_and_uplift(models_SM[:, model], np.delete(models_SM, model, 1))


# --- Curves -----------------------------------------------------------------------------------------------------------


def area_under(x: Sequence[float]) -> np.ndarray:
    """The weights with which values at rising places `x` sum to the area under them from 0 to 1.

    Between two places, the line between their values counts: who draws one of two settings at random gets there. Before the
    first place and after the last, their values count.
    """
    grid = np.linspace(0, 1, 4001)
    shares = np.array([np.interp(grid, x, each) for each in np.eye(len(x))])
    return (shares[:, 1:] + shares[:, :-1]).mean(1) / 2


def strong_calls(preference_N: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """For each query, over which share of all thresholds it is sent to the strong model [N], for RouteLLM's APGR.

    Queries are sent to the strong model in the order of `preference_N`, the largest first. Equal ones are sent in random
    order, so each gets the mean of their shares.
    """
    order = np.argsort(-preference_N, kind="stable")
    _, group_N = np.unique(-preference_N[order], return_inverse=True)
    total_G = np.bincount(group_N, weights_N[order])
    before_G = np.cumsum(total_G) - total_G
    shares = np.empty(len(order))
    shares[order] = 1 - (before_G + total_G / 2)[group_N]
    return shares


def calls_for_half(preference_N: np.ndarray, gain_N: np.ndarray, weights_N: np.ndarray) -> float | None:
    """The smallest share of calls to the strong model with which half of the gap is gained (RouteLLM's CPT(50 %)).

    `gain_N` is how much better the strong model does. None if it is not better on the whole.
    """
    if (whole := float(gain_N @ weights_N)) <= 0:
        return None
    order = np.argsort(-preference_N, kind="stable")
    gained = np.cumsum((gain_N * weights_N)[order]) / whole
    return float(np.cumsum(weights_N[order])[np.argmax(gained >= 0.5 - 1e-12)])


# --- Who was chosen, who was best -------------------------------------------------------------------------------------


def confusion(chosen_N: np.ndarray, scores_NM: np.ndarray) -> np.ndarray:
    """Rows: the model that was chosen; columns: the model that was best, and last "all alike" [M, M + 1].

    A query on which k models share the best score counts 1 / k for each of them.
    """
    models = scores_NM.shape[1]
    best_NM = np.abs(scores_NM - scores_NM.max(1, keepdims=True)) <= 1e-12
    alike_N = best_NM.all(1)
    shares_NM = np.where(alike_N[:, None], 0, best_NM / best_NM.sum(1, keepdims=True))
    table = np.zeros((models, models + 1))
    np.add.at(table, chosen_N, np.column_stack([shares_NM, alike_N]))
    return table


def calibration_error(predicted_N: np.ndarray, happened_N: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: the mean distance between predicted and real success over bins of equal width."""
    if not len(predicted_N):
        return math.nan
    bin_N = np.minimum((predicted_N * bins).astype(int), bins - 1)
    distance_B = np.abs(np.bincount(bin_N, predicted_N - happened_N, bins))
    return float(distance_B.sum() / len(predicted_N))
