"""Simpler ways to choose a model, which every router is measured beside. They are trained on the same queries.

    baselines = fit_baselines(dense, labels, success, hard_head, tags, seed)
    baselines.choose(matrix, dense, tags)        # {name: index of the chosen model [N]}

hard label     a linear head that learned which model is the best one, as a class
kNN 40         the best mean reward over the 40 nearest training queries
MLP            one hidden layer on the same vectors, trained on ZOOTER's labels
best per tag   the best model of the query's tags; it is told the tags, which a router is not
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastft.compose.router.training.fit import Head
from fastft.compose.router.training.tags import known_mean
from fastft.compose.router.vectors.neighbours import Neighbours

NEIGHBOURS = 40
HIDDEN = 64
SAYS = {
    "hard label": "a linear head on the best model as a class, the first of equal ones",
    "kNN 40": "by the 40 nearest training queries",
    "MLP": f"a hidden layer of {HIDDEN} on ZOOTER's labels",
    "best per tag": "told the query's tags, which a router is not",
}


@dataclass
class Baselines:
    hard: Head
    near: Neighbours
    rewards: np.ndarray
    """[R, M]: what the neighbours' models scored; float32, NaN where a score is missing."""
    mlp: list[np.ndarray]
    """Weights and biases, in turn."""
    tag_names: list[str]
    tag_means: np.ndarray
    """[T + 1, M]: the mean success by tag, and last over all queries."""

    def choose(self, matrix: Any, dense: np.ndarray, tags: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        """The index of the model that each baseline chooses. Without any known tag there is no best per tag."""
        found = {
            "hard label": self.hard.logits(matrix).argmax(1),
            "kNN 40": self._by_neighbours(dense),
            "MLP": self._by_mlp(dense).argmax(1),
        }
        places = {name: place for place, name in enumerate(self.tag_names)}
        known = [[places[tag] for tag in own if tag in places] for own in tags]
        if any(known):
            rows = [known_mean(self.tag_means[own or [-1]]) for own in known]
            found["best per tag"] = np.nan_to_num(np.array(rows), nan=-np.inf).argmax(1)
        return found

    def _by_neighbours(self, dense: np.ndarray) -> np.ndarray:
        nearest, _ = self.near.nearest(dense, NEIGHBOURS)
        means = np.array([known_mean(self.rewards[own]) for own in nearest])
        return np.nan_to_num(means, nan=-np.inf).argmax(1)

    def _by_mlp(self, dense: np.ndarray) -> np.ndarray:
        first, first_bias, second, second_bias = self.mlp
        return np.maximum(dense @ first + first_bias, 0) @ second + second_bias

    def tensors(self) -> dict[str, np.ndarray]:
        names = np.frombuffer("\0".join(self.tag_names).encode() or b"\0", np.uint8)
        return {
            "hard.weights": self.hard.weights.astype(np.float16), "hard.bias": self.hard.bias,
            "near.vectors": self.near.vectors.astype(np.float16), "near.mean": self.near.mean, "near.rewards": self.rewards,
            "tags.names": names, "tags.means": self.tag_means, **{f"mlp.{i}": each for i, each in enumerate(self.mlp)},
        }  # fmt: skip

    @classmethod
    def from_tensors(cls, held: dict[str, np.ndarray]) -> "Baselines":
        names = held["tags.names"].tobytes().decode().split("\0")
        return cls(
            Head(held["hard.weights"].astype(np.float32), held["hard.bias"]),
            Neighbours(held["near.vectors"].astype(np.float32), held["near.mean"]),
            held["near.rewards"],
            [held[f"mlp.{i}"] for i in range(4)],
            [name for name in names if name],
            held["tags.means"],
        )


def fit_baselines(
    dense: np.ndarray,
    labels: np.ndarray,
    success: np.ndarray,
    hard: Head,
    tags: Sequence[Sequence[str]],
    seed: int,
) -> Baselines:
    """`dense`: [N, d]; `labels` and `success`: [N, M], NaN where a score is missing; `hard`: the head of the hard labels."""
    members: dict[str, list[int]] = {}
    for row, own in enumerate(tags):
        for tag in own:
            members.setdefault(tag, []).append(row)
    means = [known_mean(success[rows]) for rows in members.values()] + [known_mean(success)]
    near = Neighbours.fit(dense, seed, kept=len(dense))
    return Baselines(
        hard,
        near,
        success.astype(np.float32),
        _fit_mlp(dense, labels, seed),
        list(members),
        np.array(means, np.float32),
    )


def _fit_mlp(dense: np.ndarray, labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """A network of one hidden layer that predicts the labels; a missing one counts as its model's mean."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor

    filled = np.where(np.isnan(labels), known_mean(labels), labels)
    network = MLPRegressor(
        hidden_layer_sizes=HIDDEN, alpha=1e-3, learning_rate_init=2e-3, max_iter=30, tol=1e-5, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it stops early on purpose
        network.fit(dense.astype(np.float32), filled.astype(np.float32))
    pairs = zip(network.coefs_, network.intercepts_)
    return [np.ascontiguousarray(each, dtype=np.float32) for pair in pairs for each in pair]
