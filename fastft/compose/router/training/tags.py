"""Tag-based label enhancement: a query's noisy label is mixed with the means of the queries that share its tags (ZOOTER)."""

import re

import numpy as np

from fastft.errors import UsageError, UserError


def enhance(labels: np.ndarray, tags: list[list[str]], beta: float) -> np.ndarray:
    """Return beta x labels + (1 - beta) x the mean over a query's tags of the tag's mean label; [N, M].

    NaN is a missing score: a tag's mean is taken over the scores that there are, and NaN stays NaN. A query without a tag
    keeps its label.
    """
    members: dict[str, list[int]] = {}
    for i, own in enumerate(tags):
        for tag in own:
            members.setdefault(tag, []).append(i)
    means = {tag: known_mean(labels[rows]) for tag, rows in members.items()}
    enhanced = labels.copy()
    for i, own in enumerate(tags):
        if own:
            shared = known_mean(np.array([means[tag] for tag in own]))
            enhanced[i] = beta * labels[i] + (1 - beta) * shared
    return enhanced


def known_mean(rows: np.ndarray) -> np.ndarray:
    """The mean of each column over what is not NaN; NaN for a column without anything."""
    known = ~np.isnan(rows)
    total, count = np.where(known, rows, 0).sum(0), known.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def clusters_wanted(tags: str) -> int | None:
    """The N of "clusters:N"; None for "tags" and "none". Raises UsageError for anything else."""
    if tags in ("tags", "none"):
        return None
    found = re.fullmatch(r"clusters:(\d+)", tags)
    if not found or int(found[1]) < 2:
        raise UsageError(f"--tags {tags}: must be tags, none or clusters:N with N of at least 2, such as clusters:25")
    return int(found[1])


def cluster_tags(dense: np.ndarray, count: int, seed: int) -> list[list[str]]:
    """Group queries by k-means on their centred vectors of length 1, and return a tag for each.

    Raises UserError if there are fewer queries than groups.
    """
    from sklearn.cluster import KMeans

    if len(dense) < count:
        raise UserError(f"--tags clusters:{count}: there are only {len(dense):,} queries")
    moved = dense - dense.mean(0)
    moved /= np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
    found = KMeans(count, n_init=3, random_state=seed).fit_predict(moved)
    return [[f"cluster {number}"] for number in found]


def first_tags(tags: list[list[str]]) -> list[str]:
    """The set of each query: its first tag, "" without one."""
    return [own[0] if own else "" for own in tags]
