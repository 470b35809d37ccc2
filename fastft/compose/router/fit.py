"""Fits both linear heads of a router at once: ZOOTER's distribution over models, and each model's success.

    heads = fit_heads(matrix, labels, success, c)

ZOOTER (arXiv 2311.08692): a router Z(q) learns s(q) = softmax(rewards / temperature) by KL(s || Z), in which only the
cross-entropy depends on Z. The success head learns each model's own reward, scaled to [0, 1], by logistic regression.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Heads:
    """Linear heads over D columns for M models: `distribution` and `success` are logits, [D, M], with a bias [M] each."""

    distribution: np.ndarray
    distribution_bias: np.ndarray
    success: np.ndarray
    success_bias: np.ndarray


def soft_labels(rewards: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(rewards / temperature) of each row, [N, M], over its scores that are not NaN; 0 where one is."""
    known = ~np.isnan(rewards)
    logits = np.where(known, rewards / temperature, -np.inf)
    return softmax(logits)


def softmax(logits: np.ndarray) -> np.ndarray:
    """The softmax of each row; -inf becomes 0, and a row of -inf alone stays 0."""
    highest = logits.max(1, keepdims=True)
    raised = np.exp(logits - np.where(np.isfinite(highest), highest, 0))
    return raised / np.maximum(raised.sum(1, keepdims=True), 1e-300)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * logits))


def fit_heads(matrix: Any, labels: np.ndarray, success: np.ndarray, c: float) -> Heads:
    """Fit both heads by L-BFGS with weights shrunk as in scikit-learn: C x the sum of losses + |weights|² / 2.

    `matrix`: [N, D], dense or CSR. `labels`: [N, M], rows that sum to 1, 0 where a score is missing; the router's own
    distribution is compared within the models that have one. `success`: [N, M] in [0, 1], NaN where a score is missing.
    """
    from scipy.optimize import minimize

    (count, width), models = matrix.shape, labels.shape[1]
    known = ~np.isnan(success)
    outside = np.where(known, 0.0, -np.inf)
    target = np.where(known, success, 0.5)
    transposed = matrix.T.tocsr() if hasattr(matrix, "tocsr") else matrix.T

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(width + 1, 2 * models)
        logits = matrix @ weights[:-1] + weights[-1]
        first, second = logits[:, :models] + outside, logits[:, models:]
        chosen = softmax(first)
        value = -np.sum(labels * np.log(np.maximum(chosen, 1e-300)))
        value += np.sum(known * (np.logaddexp(0, second) - target * second))
        slope = np.hstack([chosen - labels, known * (sigmoid(second) - target)]) * c
        gradient = np.vstack([transposed @ slope + weights[:-1], slope.sum(0)])
        return c * value + 0.5 * np.sum(weights[:-1] ** 2), gradient.ravel()

    start = np.zeros((width + 1, 2 * models))
    found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 200, "gtol": 1e-3 * c})
    weights = found.x.reshape(width + 1, 2 * models)
    return Heads(
        weights[:-1, :models].astype(np.float32), weights[-1, :models].astype(np.float32),
        weights[:-1, models:].astype(np.float32), weights[-1, models:].astype(np.float32),
    )  # fmt: skip
