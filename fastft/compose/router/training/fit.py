"""Fits linear heads on the features of queries: ZOOTER's distribution over models, and each model's success, in one run.

    heads = fit_heads(matrix, {"distribution": labels}, success, c)

ZOOTER (arXiv 2311.08692): a router Z(q) learns s(q) = softmax(rewards / temperature) by KL(s || Z), in which only the
cross-entropy depends on Z. The success head learns each model's own reward, scaled to [0, 1], by logistic regression.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

TOLERANCE = 3e-6  # change of the mean loss of a query, in nats
STEPS = 100  # at most; about 40 are enough
MEMORY = 8  # steps that L-BFGS remembers


@dataclass(frozen=True)
class Head:
    """A linear map from D columns to the logits of M models: weights [D, M] and bias [M], float32."""

    weights: np.ndarray
    bias: np.ndarray

    def logits(self, matrix: Any) -> np.ndarray:
        """[N, D] -> [N, M]"""
        return matrix @ self.weights + self.bias


def soft_labels(rewards: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(rewards / temperature) of each row, [N, M], over its scores that are not NaN; NaN stays NaN."""
    known = ~np.isnan(rewards)
    return np.where(known, softmax(np.where(known, rewards / temperature, -np.inf)), np.nan)


def hard_labels(rewards: np.ndarray) -> np.ndarray:
    """Return 1 for the best model of each row, the first of equal ones, and 0 for the others. NaN stays NaN."""
    known = ~np.isnan(rewards)
    best = np.where(known, rewards, -np.inf).argmax(1)
    return np.where(known, np.arange(rewards.shape[1]) == best[:, None], np.nan)


def softmax(logits: np.ndarray) -> np.ndarray:
    """The softmax of each row; -inf becomes 0, and a row of -inf alone stays 0."""
    highest = logits.max(1, keepdims=True)
    raised = np.exp(logits - np.where(np.isfinite(highest), highest, 0))
    return raised / np.maximum(raised.sum(1, keepdims=True), 1e-300)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * logits))


def logit(shares: np.ndarray) -> np.ndarray:
    """The inverse of the sigmoid, for shares in [0, 1] moved a little away from its ends."""
    inside = np.clip(shares, 1e-4, 1 - 1e-4)
    return np.log(inside / (1 - inside))


def fit_heads(matrix: Any, distributions: dict[str, np.ndarray], success: np.ndarray, c: float) -> dict[str, Head]:
    """Fit a head for each of `distributions`, and the head "success", by L-BFGS on the sum of their losses.

    `matrix`: [N, D], dense or CSR. `distributions`: labels by name, [N, M]. `success`: [N, M] in [0, 1]. All are NaN where a
    score is missing: a distribution is learned within the models that have one. Weights are shrunk as in scikit-learn:
    c x the sum of losses + |weights|² / 2; the bias is free.

    Columns are centred, because otherwise the bias and what all queries share hold each other up (200 steps instead of 40).
    Columns that only one query has are left out: they say nothing about another.
    """
    count, width = matrix.shape
    used = np.flatnonzero(_queries_a_column(matrix) > 1)
    x = matrix[:, used].astype(np.float32)
    xt = x.T.tocsr() if hasattr(x, "tocsr") else np.ascontiguousarray(x.T)
    mean = np.asarray(x.mean(0), dtype=np.float32).ravel()
    losses = [_CrossEntropy(labels) for labels in distributions.values()] + [_Logistic(success)]
    models = success.shape[1]
    start = np.concatenate([loss.start for loss in losses]).astype(np.float32)
    shape, bias_step = (len(used) + 1, len(start)), np.float32(1 / np.sqrt(c * count))  # as curved as the weights

    def biased(parameters: np.ndarray) -> np.ndarray:
        return start + bias_step * parameters[-1] - mean @ parameters[:-1]

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss of a query, and its gradient."""
        weights = parameters[:-1]
        logits = (x @ weights + biased(parameters)).astype(float)
        found = [loss(part) for loss, part in zip(losses, np.split(logits, len(losses), 1))]
        slope = np.hstack([slope for _, slope in found]).astype(np.float32)
        down = slope.sum(0)
        gradient = np.vstack([xt @ slope - np.outer(mean, down) + weights / c, bias_step * down]) / count
        penalty = float(np.vdot(weights, weights)) / (2 * c)
        return (sum(value for value, _ in found) + penalty) / count, gradient

    parameters = _minimum(objective, shape)
    bias = biased(parameters)
    heads = {}
    for i, name in enumerate([*distributions, "success"]):
        own = slice(i * models, (i + 1) * models)
        weights = np.zeros((width, models), dtype=np.float32)
        weights[used] = parameters[:-1, own]
        heads[name] = Head(weights, bias[own].astype(np.float32))
    return heads


class _CrossEntropy:
    """The loss of a distribution, KL(labels || softmax(logits)) but for a constant, and its slope by the logits."""

    def __init__(self, labels: np.ndarray):
        known = ~np.isnan(labels)
        self.outside = np.where(known, 0.0, -np.inf)
        labels = np.where(known, labels, 0.0)
        self.labels = labels / np.maximum(labels.sum(1, keepdims=True), 1e-300)
        self.any = labels.sum(1, keepdims=True) > 0  # rows without a label teach nothing
        self.start = np.log(np.maximum(self.labels.mean(0), 1e-6))

    def __call__(self, logits: np.ndarray) -> tuple[float, np.ndarray]:
        chosen = softmax(logits + self.outside)
        return -float(np.sum(self.labels * np.log(np.maximum(chosen, 1e-300)))), chosen * self.any - self.labels


class _Logistic:
    """The loss of each model's success, and its slope by the logits."""

    def __init__(self, success: np.ndarray):
        self.known = ~np.isnan(success)
        self.target = np.where(self.known, success, 0.0)
        self.start = logit(self.target.sum(0) / np.maximum(self.known.sum(0), 1))

    def __call__(self, logits: np.ndarray) -> tuple[float, np.ndarray]:
        value = float(np.sum(self.known * np.logaddexp(0, logits) - self.target * logits))
        return value, self.known * sigmoid(logits) - self.target


def _minimum(objective: Any, shape: tuple[int, int]) -> np.ndarray:
    """Minimise a convex objective from 0 by L-BFGS, halving a step that does not help enough.

    In float32, and without the bounds of scipy's and the second evaluation of most steps of torch's, which take 3 times as long.
    """
    at = np.zeros(shape, dtype=np.float32)
    value, gradient = objective(at)
    memory: deque[tuple[np.ndarray, np.ndarray, float]] = deque(maxlen=MEMORY)
    for _ in range(STEPS):
        direction = _direction(gradient, memory)
        slope, step = float(np.vdot(gradient, direction)), 1.0
        while True:
            there = at + np.float32(step) * direction
            next_value, next_gradient = objective(there)
            if next_value <= value + 1e-4 * step * slope or step < 1e-6:
                break
            step /= 2
        moved, turned = there - at, next_gradient - gradient
        if (curvature := float(np.vdot(moved, turned))) > 0:
            memory.append((moved, turned, curvature))
        gained, at, value, gradient = value - next_value, there, next_value, next_gradient
        if gained < TOLERANCE:
            break
    return at


def _direction(gradient: np.ndarray, memory: Iterable[tuple[np.ndarray, np.ndarray, float]]) -> np.ndarray:
    """The step of L-BFGS, by the two loops of Nocedal and Wright's algorithm 7.4; first a step of length 1 downhill."""
    memory = list(memory)
    direction = -gradient
    if not memory:
        return direction / max(float(np.linalg.norm(gradient)), 1e-30)
    shares = []
    for moved, turned, curvature in reversed(memory):
        shares.append(np.float32(np.vdot(moved, direction) / curvature))
        direction -= shares[-1] * turned
    moved, turned, curvature = memory[-1]
    direction *= np.float32(curvature / float(np.vdot(turned, turned)))
    for (moved, turned, curvature), share in zip(memory, reversed(shares)):
        direction += (share - np.float32(np.vdot(turned, direction) / curvature)) * moved
    return direction


def _queries_a_column(matrix: Any) -> np.ndarray:
    """In how many rows each column is not 0."""
    if hasattr(matrix, "tocsr"):
        return np.bincount(matrix.indices[matrix.data != 0], minlength=matrix.shape[1])
    return np.count_nonzero(matrix, axis=0)
