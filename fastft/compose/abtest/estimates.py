"""Retention, engagement and the four figures of Blended (arXiv 2401.02994), arm against control, with intervals over users.

    R(k)   share of an arm's users who are active on day k after joining, of those whose k-th day has passed
    E(k)   amount of use of the users who are active on day k, summed, over their number
    q(k) = R(k) / R(k) of the control        log q(k) = dzeta  + dbeta  log k
    r(k) = E(k) / E(k) of the control        log r(k) = dalpha + dgamma log k

The lines are least squares over the days from 1 on. Larger is better: dzeta and dalpha say how an arm begins, dbeta and dgamma
whether it falls more slowly.

Every figure is a sum over days of coefficient times log mean, so a user's influence on it is known, and its variance in an arm
is the sum of the squared influences: the delta method, with users as the unit, however many days a user has. The influence is
the exact one, the figure minus the figure without the user (Tukey's jackknife), not the usual linear approximation. The
two agree for many users. On late days few are active, and one of them may have a tenth of the day's use: there the linear
one makes intervals too narrow. In A/A splits with 100 users an arm, its intervals hold dgamma in 87 %, the exact one's in 95 %
(benchmarks/abtest.py). Both take one pass over the rows.

The logs of small counts say little, and that of 0 nothing. Days with fewer than five active users in an arm are on no line:
there, the shares of the two arms are compared as they are (`fastft.compose.abtest.shares`).
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from fastft.compose.abtest.activity import IN_TWO, Activity
from fastft.compose.abtest.shares import Shares, Z, compare_shares
from fastft.compose.abtest.significance import holm
from fastft.compose.abtest.winsor import Capped, totals, winsorised
from fastft.errors import UserError

FEW_ACTIVE = 5
"""Active users of an arm below which a day is on no line."""
ROUNDING = 1e-9
"""A difference of logs that is none: sums of floats come out as near as this to equal ones."""
LARGEST_LOG = 700.0
"""Of which exp is still a number."""
FIGURES = ("engagement_ratio", "dzeta", "dbeta", "dalpha", "dgamma")
"""What is tested, with Holm's correction over all of them and all arms."""


@dataclass(frozen=True)
class Effect:
    """A difference of logs between an arm and the control, with its standard error."""

    value: float
    error: float
    p_holm: float = math.nan

    @property
    def low(self) -> float:
        return self.value - Z * self.error

    @property
    def high(self) -> float:
        return self.value + Z * self.error

    @property
    def p(self) -> float:
        """The two-sided p value."""
        if abs(self.value) <= ROUNDING:
            return 1.0
        return math.erfc(abs(self.value) / self.error / math.sqrt(2)) if self.error else 0.0

    @property
    def ratio(self) -> tuple[float, float, float]:
        """(value, low, high) as ratios."""
        value, low, high = (math.exp(min(each, LARGEST_LOG)) for each in (self.value, self.low, self.high))
        return value, low, high


@dataclass(frozen=True)
class PowerLaw:
    """R(k) = scale k^exponent, fitted to the logs. `r2` is the share of their variance that the line explains."""

    scale: float
    exponent: float
    r2: float
    days: int


@dataclass
class Days:
    """The counts of one arm on each of K days; U users, E entries."""

    users: int
    observed_K: np.ndarray
    """Users whose k-th day has passed."""
    active_K: np.ndarray
    amount_K: np.ndarray
    observed_U: np.ndarray
    """How many of the K days have passed for a user: the first ones."""
    user_E: np.ndarray
    k_E: np.ndarray
    amount_E: np.ndarray

    @property
    def retention_K(self) -> np.ndarray:
        return self.active_K / np.maximum(self.observed_K, 1)

    @property
    def engagement_K(self) -> np.ndarray:
        return self.amount_K / np.maximum(self.active_K, 1)


@dataclass
class ArmComparison:
    """An arm beside the control."""

    arm: str
    retention: dict[int, Effect]
    """log q(k) by day, of days on which both have active users."""
    engagement: dict[int, Effect]
    """log r(k) by day, of the days on the lines; empty if amounts are not known by day."""
    figures: dict[str, Effect]
    """By name, those of FIGURES that can be computed."""
    raw: dict[str, Effect]
    """The figures of engagement without winsorising."""
    shares: dict[int, Shares] = field(default_factory=dict)
    """The shares of active users on the days without a line: all of its days, if there is no line."""
    left_out: dict[str, list[int]] = field(default_factory=dict)
    """Days with too few active users in one of the two for a line."""

    @property
    def p_shares(self) -> float:
        """The p value of the largest difference of shares, for having looked for it on every day."""
        return min((each.p for each in self.shares.values()), default=math.nan)


def count_days(activity: Activity, arm: int, days: np.ndarray, amount_E: np.ndarray) -> Days:
    """Count the active users of an arm and their use on each of `days`.

    `amount_E`: the activity's amounts, or these winsorised.
    """
    mine_U = activity.arm_U == arm
    place_U = np.cumsum(mine_U) - 1
    k_E = np.searchsorted(days, activity.day_E)
    on_E = mine_U[activity.user_E] & (k_E < len(days)) & (activity.day_E <= activity.followed_U[activity.user_E])
    on_E &= days[np.minimum(k_E, len(days) - 1)] == activity.day_E
    user_E, k_E, amount_E = place_U[activity.user_E[on_E]], k_E[on_E], amount_E[on_E]
    observed_U = np.searchsorted(days, activity.followed_U[mine_U], side="right")
    passed_K = np.bincount(observed_U, minlength=len(days) + 1)[::-1].cumsum()[::-1][1:]
    return Days(
        int(mine_U.sum()),
        passed_K,
        np.bincount(k_E, minlength=len(days)),
        np.bincount(k_E, amount_E, minlength=len(days)),
        observed_U,
        user_E,
        k_E,
        amount_E,
    )


def _without(share: np.ndarray) -> np.ndarray:
    """How much the log of a sum is above the log of the sum without an item that is this share of it.

    An item that is all of the sum has its linear influence, 1.
    """
    return np.where(share < 1, -np.log1p(-np.minimum(share, 1 - 1e-12)), share)


def _variance(influence_UF: np.ndarray) -> np.ndarray:
    """The jackknife's variance of each figure."""
    users = len(influence_UF)
    return (users - 1) / users * ((influence_UF - influence_UF.mean(0)) ** 2).sum(0)


def retention_variance(arm: Days, weight_FK: np.ndarray) -> np.ndarray:
    """The variance of `weight_FK @ log R` of one arm, each figure F. Days with weight have active users."""
    on_K, off_K = _without(1 / np.maximum(arm.active_K, 1)), -_without(1 / np.maximum(arm.observed_K, 1))
    columns = []
    for weight_K in weight_FK:
        passed = np.concatenate([[0.0], np.cumsum(weight_K * off_K)])
        active_U = np.bincount(arm.user_E, (weight_K * on_K)[arm.k_E], minlength=arm.users)
        columns.append(active_U + passed[arm.observed_U])
    return _variance(np.stack(columns, axis=1))


def engagement_variance(arm: Days, weight_FK: np.ndarray) -> np.ndarray:
    """The variance of `weight_FK @ log E` of one arm, each figure F."""
    share_E = arm.amount_E / arm.amount_K[arm.k_E]
    influence_E = _without(share_E) - _without(1 / np.maximum(arm.active_K, 1))[arm.k_E]
    columns = [np.bincount(arm.user_E, w_K[arm.k_E] * influence_E, minlength=arm.users) for w_K in weight_FK]
    return _variance(np.stack(columns, axis=1))


def _daily_variances(arm: Days) -> tuple[np.ndarray, np.ndarray]:
    """The variances of log R(k) and of log E(k) for each day, by the same influences, one day at a time."""
    n_K, a_K = np.maximum(arm.observed_K, 1), np.maximum(arm.active_K, 1)
    retention_K = (n_K - 1) / n_K * _without(1 / a_K) ** 2 * a_K * (1 - a_K / n_K)
    influence_E = _without(arm.amount_E / arm.amount_K[arm.k_E])
    sum_K = np.bincount(arm.k_E, influence_E, minlength=len(a_K))
    squares_K = np.bincount(arm.k_E, influence_E**2, minlength=len(a_K))
    return retention_K, (a_K - 1) / a_K * np.maximum(squares_K - sum_K**2 / a_K, 0)


def line_weights(days: np.ndarray) -> np.ndarray:
    """[2, K]: the intercept and the slope of the least-squares line of values over log k are these weights times the values."""
    return np.linalg.pinv(np.stack([np.ones(len(days)), np.log(days)], axis=1))


def power_law(days: np.ndarray, value_K: np.ndarray) -> PowerLaw | None:
    """Fit a power law to the days with a value above 0; None if there are fewer than two."""
    days, log_K = days[value_K > 0], np.log(value_K[value_K > 0])
    if len(days) < 2:
        return None
    scale, exponent = line_weights(days) @ log_K
    spread = ((log_K - log_K.mean()) ** 2).sum()
    rest = ((log_K - scale - exponent * np.log(days)) ** 2).sum()
    return PowerLaw(math.exp(scale), float(exponent), 1 - float(rest / spread) if spread > 1e-20 else 1.0, len(days))


def _line(
    names: tuple[str, str], days: np.ndarray, log_K: np.ndarray, variance, arm: Days, control: Days, on_K: np.ndarray
) -> dict[str, Effect]:
    """The two figures of a line through `log_K`, the log ratios on the days `on_K`; none if there are fewer than two."""
    if on_K.sum() < 2:
        return {}
    weight_FK = np.zeros((2, len(days)))
    weight_FK[:, on_K] = line_weights(days[on_K])
    value_F = weight_FK[:, on_K] @ log_K[on_K]
    error_F = np.sqrt(variance(arm, weight_FK) + variance(control, weight_FK))
    return {name: Effect(float(value), float(error)) for name, value, error in zip(names, value_F, error_F)}


def compare_days(name: str, arm: Days, control: Days, days: np.ndarray, by_day: bool) -> ArmComparison:
    """Compare an arm with the control on each day, and by lines over the days."""
    found = ArmComparison(name, {}, {}, {}, {})
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q_K = np.log(arm.retention_K) - np.log(control.retention_K)
        log_r_K = np.log(arm.engagement_K) - np.log(control.engagement_K)
    error_q_K, error_r_K = (np.sqrt(a + c) for a, c in zip(_daily_variances(arm), _daily_variances(control)))
    active_K = np.minimum(arm.active_K, control.active_K)
    on_K = active_K >= FEW_ACTIVE
    found.left_out = {"retention": days[~on_K].tolist()}
    found.retention = _by_day(days, log_q_K, error_q_K, active_K > 0)
    found.figures |= _line(("dzeta", "dbeta"), days, log_q_K, retention_variance, arm, control, on_K)
    found.shares = _compare_shares(arm, control, days, ~on_K if found.figures else np.ones(len(days), bool))
    if by_day:
        found.engagement = _by_day(days, log_r_K, error_r_K, on_K)
        found.figures |= _line(("dalpha", "dgamma"), days, log_r_K, engagement_variance, arm, control, on_K)
    return found


def _compare_shares(arm: Days, control: Days, days: np.ndarray, which_K: np.ndarray) -> dict[int, Shares]:
    """The shares of active users on some days. Which ones they are, the data decide, so p is corrected for all days."""
    passed_K = (arm.observed_K > 0) & (control.observed_K > 0)
    found = {}
    for k in np.flatnonzero(which_K & passed_K & (arm.active_K + control.active_K > 0)):
        counts = (arm.active_K[k], arm.observed_K[k], control.active_K[k], control.observed_K[k])
        found[int(days[k])] = compare_shares(*map(int, counts), tests=int(passed_K.sum()))
    return found


def _by_day(days: np.ndarray, log_K: np.ndarray, error_K: np.ndarray, on_K: np.ndarray) -> dict[int, Effect]:
    return {int(days[k]): Effect(float(log_K[k]), float(error_K[k])) for k in np.flatnonzero(on_K)}


def mean_variance(total_U: np.ndarray) -> float:
    """The variance of the log of a mean over users, which is above 0."""
    return float(_variance((_without(total_U / total_U.sum()) - _without(np.array(1 / len(total_U))))[:, None])[0])


def mean_ratio(arm_U: np.ndarray, control_U: np.ndarray) -> Effect | None:
    """The log of the ratio of two means over users; None if one of them is 0 or has no two users."""
    if len(arm_U) < 2 or len(control_U) < 2 or arm_U.sum() <= 0 or control_U.sum() <= 0:
        return None
    error = math.sqrt(mean_variance(arm_U) + mean_variance(control_U))
    return Effect(math.log(arm_U.mean()) - math.log(control_U.mean()), error)


def compare(
    activity: Activity, control: int, horizon: int, quantile: float
) -> tuple[list[ArmComparison], Capped, Capped]:
    """Compare every arm with the control over the days up to `horizon`.

    Returns the comparisons, with Holm's p values, and the winsorised amounts by entry and by user's total.
    """
    by_entry, by_user = winsorised(activity, horizon, quantile)
    found = compare_arms(activity, control, horizon, by_entry.values, by_user.values)
    raw = compare_arms(activity, control, horizon, activity.amount_E, totals(activity, horizon))
    for each, as_it_is in zip(found, raw):
        each.raw = {key: as_it_is.figures[key] for key in as_it_is.figures if key not in ("dzeta", "dbeta")}
    return found, by_entry, by_user


def compare_arms(
    activity: Activity, control: int, horizon: int, amount_E: np.ndarray, total_U: np.ndarray
) -> list[ArmComparison]:
    """Compare every arm with the control, with these amounts and totals in place of the activity's own."""
    days = activity.days[activity.days <= horizon]
    counts = [count_days(activity, arm, days, amount_E) for arm in range(len(activity.arms))]
    totals_A = [total_U[(activity.arm_U == arm) & ~np.isnan(total_U)] for arm in range(len(activity.arms))]
    found = []
    for arm, name in enumerate(activity.arms):
        if arm != control:
            comparison = compare_days(name, counts[arm], counts[control], days, activity.by_day)
            if in_all := mean_ratio(totals_A[arm], totals_A[control]):
                comparison.figures["engagement_ratio"] = in_all
            found.append(comparison)
    tests = {(each.arm, key): effect.p for each in found for key, effect in each.figures.items()}
    tests |= {(each.arm, "shares"): each.p_shares for each in found if each.shares}
    adjusted = holm(tests)
    for each in found:
        figures = each.figures
        each.figures = {key: replace(figures[key], p_holm=adjusted[each.arm, key]) for key in FIGURES if key in figures}
        for day, shares in each.shares.items():
            # The smallest p of the days stands for all of them, and the others are as many times larger as before.
            p_holm = min(1.0, shares.p * adjusted[each.arm, "shares"] / each.p_shares)
            each.shares[day] = replace(shares, p_holm=p_holm)
    return found


def require_users(activity: Activity, control: int) -> None:
    """Raise UserError if an arm has no two users, or if there is only one arm."""
    if len(activity.arms) < 2:
        raise UserError(f"{activity.source}: all users are in one arm ({activity.arms[0]}); a comparison needs two")
    for arm, count in zip(activity.arms, np.bincount(activity.arm_U, minlength=len(activity.arms))):
        if count < 2:
            said = "no user" if count == 0 else "one user only"
            why = " who is in no other arm" if activity.left_out[IN_TWO] else ""
            raise UserError(f"{activity.source}: the arm {arm!r} has {said}{why}; a comparison needs two in each arm")
