"""Finds the training queries that a query resembles most, and says whether it resembles none.

    neighbours = Neighbours.fit(dense, seed=0)
    nearest, similarity = neighbours.nearest(dense_of_new_queries, 5)
    neighbours.unlike(dense_of_new_queries)       # [N] bool

Similarity is the cosine after the mean of all training queries is taken away. A query is unlike the training queries if its
mean similarity to the 5 nearest is below that of 95 % of the training queries to their own 5 nearest.
"""

from dataclasses import dataclass

import numpy as np

NEAREST = 5
QUANTILE = 0.05
KEPT = 2048  # training queries, drawn at random: one more query costs their number x d multiplications


@dataclass
class Neighbours:
    vectors: np.ndarray
    """[R, d], float32, centred, of length 1."""
    mean: np.ndarray
    """[d]"""
    threshold: float = -1.0
    places: np.ndarray | None = None
    """[R]: which training queries these are."""

    @classmethod
    def fit(cls, dense: np.ndarray, seed: int, kept: int = KEPT) -> "Neighbours":
        places = np.sort(np.random.default_rng(seed).permutation(len(dense))[:kept])
        made = cls(np.zeros((0, dense.shape[1]), np.float32), dense.mean(0).astype(np.float32), -1.0, places)
        made.vectors = made._centred(dense[places])
        if len(places) > 2 * NEAREST:
            similarity = made.nearest(dense[places], NEAREST + 1)[1][:, 1:]  # the first is the query itself
            made.threshold = float(np.quantile(similarity.mean(1), QUANTILE))
        return made

    def nearest(self, dense: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(index into `vectors`, similarity) of the `count` nearest, the nearest first: [N, count] each."""
        count = min(count, len(self.vectors))
        found, similar = [], []
        for start in range(0, len(dense), 512):
            similarity = self._centred(dense[start : start + 512]) @ self.vectors.T
            top = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
            rows = np.arange(len(top))[:, None]
            order = np.argsort(-similarity[rows, top], axis=1, kind="stable")
            found.append(top[rows, order])
            similar.append(similarity[rows, found[-1]])
        return np.concatenate(found), np.concatenate(similar)

    def unlike(self, dense: np.ndarray) -> np.ndarray:
        """[N] bool; a query without any known word or character is unlike, too."""
        return (self.nearest(dense, NEAREST)[1].mean(1) < self.threshold) | ~dense.any(1)

    def _centred(self, dense: np.ndarray) -> np.ndarray:
        moved = dense.astype(np.float32) - self.mean
        return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
