"""Tag-based label enhancement: a query's noisy label is mixed with the means of the queries that share its tags (ZOOTER)."""

import numpy as np


def enhance(labels: np.ndarray, tags: list[list[str]], beta: float) -> np.ndarray:
    """Return beta x labels + (1 - beta) x the mean over a query's tags of the tag's mean label; [N, M].

    NaN is a missing score: a tag's mean is taken over the scores that there are, and NaN stays NaN. A query without a tag
    keeps its label.
    """
    members: dict[str, list[int]] = {}
    for i, own in enumerate(tags):
        for tag in own:
            members.setdefault(tag, []).append(i)
    with np.errstate(invalid="ignore"):
        means = {tag: _nanmean(labels[rows]) for tag, rows in members.items()}
    enhanced = labels.copy()
    for i, own in enumerate(tags):
        if own:
            shared = _nanmean(np.array([means[tag] for tag in own]))
            enhanced[i] = beta * labels[i] + (1 - beta) * shared
    return enhanced


def _nanmean(rows: np.ndarray) -> np.ndarray:
    known = ~np.isnan(rows)
    total, count = np.where(known, rows, 0).sum(0), known.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
