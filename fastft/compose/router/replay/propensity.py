"""Estimate what another policy would have earned, from turns that were served with known probabilities.

    turns = LoggedTurns(rewards_N, chosen_N, logged_NM, wanted_NM, conversations)
    inverse_propensity(turns), self_normalised(turns), doubly_robust(turns, mean_rewards(turns))

A turn on which the logged policy chose the model a with probability p(a), and the other policy would with q(a), has the weight
w = q(a) / p(a). Inverse propensity scoring (IPS) is the mean of w r over turns with rewards r; self-normalised (SNIPS) divides
by the mean of w, with less variance and a small bias; doubly robust (Dudík, Langford and Li, arXiv 1103.4601) is the mean of
m(q) + w (r - m(a)) with a model m of rewards, and has no bias, however wrong m is, as long as the probabilities are right.

Intervals are 95 %, by Student's t over conversations: the turns of one conversation depend on each other, so their deviations
are summed before they are squared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastft.errors import UserError
from fastft.judge.statistics.intervals import Interval

FOLDS = 5


@dataclass(frozen=True)
class LoggedTurns:
    """N turns that were served, and M models."""

    rewards_N: np.ndarray
    chosen_N: np.ndarray
    """The index of the model that answered."""
    logged_NM: np.ndarray
    """With which probability the logged policy would have chosen each model; rows sum to 1."""
    wanted_NM: np.ndarray
    """The same of the policy to be judged."""
    conversations: Sequence[str]

    @property
    def weights_N(self) -> np.ndarray:
        rows = np.arange(len(self.chosen_N))
        return self.wanted_NM[rows, self.chosen_N] / self.logged_NM[rows, self.chosen_N]


def require_overlap(turns: LoggedTurns, models: Sequence[str]) -> None:
    """Raise UserError if the policy would choose a model to which the logged one gave no chance: nothing is known there."""
    without_NM = np.where(turns.logged_NM <= 0, turns.wanted_NM, 0)
    if not without_NM.any():
        return
    turns_M, count = (without_NM > 0).sum(0), int((without_NM > 0).any(1).sum())
    named = ", ".join(f"{model} on {n:,}" for model, n in zip(models, turns_M) if n)
    raise UserError(
        f"no overlap: on {count:,} of {len(without_NM):,} turns ({without_NM.sum() / len(without_NM):.1%} of its choices) this "
        f"policy would choose a model that had a probability of 0 ({named}), so nothing is known of its answers; serve a blend "
        "in which each of these models has a weight, or name turns that were served so (--name)"
    )


def inverse_propensity(turns: LoggedTurns) -> Interval:
    return clustered_mean(turns.weights_N * turns.rewards_N, turns.conversations)


def self_normalised(turns: LoggedTurns) -> Interval:
    weights_N = turns.weights_N
    if not weights_N.any():
        raise UserError("no turn was answered by a model that this policy would choose: more turns are needed")
    value = float(weights_N @ turns.rewards_N / weights_N.sum())
    deviations_N = weights_N * (turns.rewards_N - value) / weights_N.mean()
    return _with_error(value, deviations_N, turns.conversations)


def doubly_robust(turns: LoggedTurns, predicted_NM: np.ndarray) -> Interval:
    """`predicted_NM` is the model of rewards; it must not have seen the reward of the turn that it predicts."""
    return clustered_mean(robust_rewards(turns, predicted_NM), turns.conversations)


def robust_rewards(turns: LoggedTurns, predicted_NM: np.ndarray) -> np.ndarray:
    """For each turn what the policy would have earned there, without bias; their mean is the doubly robust estimate."""
    own_N = predicted_NM[np.arange(len(turns.chosen_N)), turns.chosen_N]
    return (turns.wanted_NM * predicted_NM).sum(1) + turns.weights_N * (turns.rewards_N - own_N)


def mean_rewards(turns: LoggedTurns) -> np.ndarray:
    """A model of rewards [N, M]: each model's mean reward on other conversations, one added reward being the mean of all.

    Conversations are in FOLDS groups; a turn is predicted from the other groups.
    """
    place = {name: number for number, name in enumerate(dict.fromkeys(turns.conversations))}
    order = np.random.default_rng(0).permutation(len(place))
    fold_N = order[[place[name] for name in turns.conversations]] % FOLDS
    models = turns.logged_NM.shape[1]
    predicted_NM = np.empty(turns.logged_NM.shape)
    for fold in range(FOLDS):
        others = fold_N != fold
        rewards = turns.rewards_N[others] if others.any() else np.zeros(1)
        sums_M = np.bincount(turns.chosen_N[others], turns.rewards_N[others], models)
        counts_M = np.bincount(turns.chosen_N[others], minlength=models)
        predicted_NM[~others] = (sums_M + rewards.mean()) / (counts_M + 1)
    return predicted_NM


def effective_turns(turns: LoggedTurns) -> float:
    """Kish's effective sample size: (sum of weights)^2 / sum of squared weights."""
    weights_N = turns.weights_N
    return float(weights_N.sum() ** 2 / np.maximum((weights_N**2).sum(), 1e-300))


def clustered_mean(values_N: np.ndarray, clusters: Sequence[str]) -> Interval:
    """The mean with its 95 % interval, in which the values of one cluster may depend on each other in any way."""
    value = float(values_N.mean())
    return _with_error(value, values_N - value, clusters)


def _with_error(value: float, deviations_N: np.ndarray, clusters: Sequence[str]) -> Interval:
    from scipy.stats import t

    place = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    sums_C = np.bincount([place[name] for name in clusters], deviations_N)
    count = len(sums_C)
    if count < 2:
        raise UserError("all turns are of one conversation: an interval needs at least two")
    error = np.sqrt(count / (count - 1) * (sums_C**2).sum()) / len(deviations_N)
    half = float(t.ppf(0.975, count - 1) * error)
    return Interval(value, value - half, value + half)
