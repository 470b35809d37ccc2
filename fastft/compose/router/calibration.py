"""Turns logits into probabilities that mean what they say: a slope and a shift for each model (Platt, 1999).

scales = fit_scales(logits, happened)        # Scales of M models
sigmoid(scales(logits))
"""

from dataclasses import dataclass

import numpy as np

from fastft.compose.router.fit import Head, sigmoid

PRIOR = 4.0  # how strongly few observations are drawn to slope 1 and shift 0
STEPS = 30


@dataclass(frozen=True)
class Scales:
    slope: np.ndarray
    shift: np.ndarray

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        return logits * self.slope + self.shift

    def applied_to(self, head: Head) -> Head:
        """The head whose logits are the scaled ones."""
        weights, bias = head.weights * self.slope, head.bias * self.slope + self.shift
        return Head(weights.astype(np.float32), bias.astype(np.float32))


def fit_scales(logits: np.ndarray, happened: np.ndarray) -> Scales:
    """Fit by Newton's method. `logits`: [N, M]; `happened`: [N, M] in [0, 1], NaN where nothing is known."""
    pairs = [_fit_one(logits[known, m], happened[known, m]) for m, known in enumerate(~np.isnan(happened.T))]
    return Scales(*np.array(pairs).T)


def _fit_one(logits: np.ndarray, happened: np.ndarray) -> np.ndarray:
    """(slope, shift) of one model."""
    inputs = np.column_stack([logits, np.ones(len(logits))])
    at = start = np.array([1.0, 0.0])
    for _ in range(STEPS):
        expected = sigmoid(inputs @ at)
        gradient = inputs.T @ (expected - happened) + PRIOR * (at - start)
        curvature = (inputs * (expected * (1 - expected))[:, None]).T @ inputs + PRIOR * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        at = at - step
        if np.abs(step).max() < 1e-9:
            break
    return np.array([max(at[0], 0.0), at[1]])  # a negative slope would turn the model's order around


def brier(expected: np.ndarray, happened: np.ndarray) -> float:
    """The mean squared difference, over what is known."""
    return float(np.nanmean((expected - happened) ** 2))
