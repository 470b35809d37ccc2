"""Turns logits into probabilities that mean what they say: a slope and a shift (Platt, 1999), the same for all models.

    scale = fit_scale(logits, happened)
    sigmoid(scale(logits))

One scale for all leaves the order of the models as it was learned.
"""

from dataclasses import dataclass

import numpy as np

from fastft.compose.router.training.fit import Head, sigmoid

PRIOR = 4.0  # how strongly few observations are drawn to slope 1 and shift 0
STEPS = 30
LEAST_SLOPE = 0.05  # a slope of 0 or less would take away the order, or turn it around


@dataclass(frozen=True)
class Scale:
    slope: float
    shift: float

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        return logits * self.slope + self.shift

    def applied_to(self, head: Head) -> Head:
        """The head whose logits are the scaled ones."""
        return Head((head.weights * self.slope).astype(np.float32), self(head.bias).astype(np.float32))


def fit_scale(logits: np.ndarray, happened: np.ndarray) -> Scale:
    """Fit by Newton's method. `logits`: [N, M]; `happened`: [N, M] in [0, 1], NaN where nothing is known."""
    known = ~np.isnan(happened)
    inputs, happened = np.column_stack([logits[known], np.ones(known.sum())]), happened[known]
    at = start = np.array([1.0, 0.0])
    for _ in range(STEPS):
        expected = sigmoid(inputs @ at)
        gradient = inputs.T @ (expected - happened) + PRIOR * (at - start)
        curvature = (inputs * (expected * (1 - expected))[:, None]).T @ inputs + PRIOR * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        at = at - step
        if np.abs(step).max() < 1e-9:
            break
    return Scale(max(float(at[0]), LEAST_SLOPE), float(at[1]))


def brier(expected: np.ndarray, happened: np.ndarray) -> float:
    """The mean squared difference, over what is known."""
    return float(np.nanmean((expected - happened) ** 2))
