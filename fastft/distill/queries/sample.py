"""Which queries of a collection are asked: all, some per task, or as many as Orca's Algorithm 1 draws.

Algorithm 1 (arXiv:2306.02707, section 3.1.2): until there are n, pick a task uniformly, and a query from it uniformly without
replacement; a task that is used up is no longer picked. So every task gives equally many until it is empty, whatever its size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastft.distill.draws import draw

PICKS = 1 << 16  # picks of tasks that are drawn at a time


def per_task_counts(sizes: Sequence[int], rule: Any, seed: int) -> np.ndarray:
    """How many queries of each task a rule of `sample` takes, int64[tasks]. `sizes` are the queries that the tasks have."""
    counts = np.asarray(sizes, np.int64)
    if rule == "all":
        return counts
    if rule == "none":
        return np.zeros_like(counts)
    if "per_task" in rule:
        counts = np.minimum(counts, rule["per_task"])
    return algorithm_1(counts, rule["total"], seed) if "total" in rule else counts


def algorithm_1(sizes: np.ndarray, total: int, seed: int) -> np.ndarray:
    """How many queries of each task Orca's Algorithm 1 takes for `total` in all, int64[tasks]."""
    sizes = np.asarray(sizes, np.int64)
    if total >= sizes.sum():
        return sizes.copy()
    random, taken = np.random.default_rng(seed), np.zeros_like(sizes)
    while (left := total - taken.sum()) > 0:
        # A pick of a task that has been used up in the meantime is drawn again, which is uniform over those that are left.
        open_tasks = np.flatnonzero(taken < sizes)
        picks = random.choice(open_tasks, min(PICKS, max(left, 1)))
        good = np.flatnonzero(taken[picks] + _times_before(picks) < sizes[picks])[:left]
        taken += np.bincount(picks[good], minlength=len(sizes))
    return taken


def _times_before(values: np.ndarray) -> np.ndarray:
    """For each value, how many of those before it are equal to it, int64[N]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    within = np.arange(len(values)) - np.repeat(starts, np.diff(np.append(starts, len(values))))
    before = np.empty(len(values), np.int64)
    before[order] = within
    return before


def chosen(ids: Sequence[str], tasks: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Which queries are taken, bool[N]: of each task as many as `counts` says, by the order of a hash of (seed, id).

    `tasks` is the number of each query's task, int64[N]. So a query's chance does not depend on where it stands in a file.
    """
    if (counts == np.bincount(tasks, minlength=len(counts))).all():
        return np.ones(len(ids), bool)
    places = np.fromiter((draw(seed, "sample", id) for id in ids), np.uint64, len(ids))
    order = np.lexsort((places, tasks))
    rank = np.empty(len(ids), np.int64)
    rank[order] = _times_before(tasks[order])
    return rank < counts[tasks]
