"""Makes the amounts of the heaviest users smaller, so that no user decides an experiment alone."""

import math
from dataclasses import dataclass

import numpy as np

from fastft.compose.abtest.activity import Activity
from fastft.errors import UsageError


def require_quantile(winsor: float) -> None:
    """Raise UsageError for a --winsor that is no quantile of large amounts."""
    if not 0.5 <= winsor <= 1:
        raise UsageError(f"--winsor is {winsor:g}; it must be from 0.5 to 1, which changes no amount")


@dataclass
class Capped:
    """Amounts above a quantile of all arms' together, set to it."""

    cap: float
    values: np.ndarray
    raw: np.ndarray
    above: np.ndarray
    """Indices of the values above it, the largest first."""
    cap_over_days: float = math.inf
    """Of amounts by day: the cap of a user's sum over them."""


def winsorise(values: np.ndarray, quantile: float) -> Capped:
    """Set values above the quantile to it; zeros and NaN are no part of the sample. A quantile of 1 changes nothing.

    The quantile is a value of the sample, rounded down. So among fewer than 1,000 values the largest is set to the next one;
    between the two, a cap would still be the largest one's doing.
    """
    sample = values[values > 0]
    if quantile >= 1 or not len(sample):
        return Capped(math.inf, values, values, np.array([], int))
    cap = float(np.quantile(sample, quantile, method="lower"))
    above = np.flatnonzero(values > cap)
    return Capped(cap, np.minimum(values, cap), values, above[np.argsort(-values[above], kind="stable")])


def winsorised(activity: Activity, horizon: int, quantile: float) -> tuple[Capped, Capped]:
    """The amounts by entry, of the days from 1 to the horizon that have passed, and by user's total; each with its own cap.

    The quantiles are those over users, so that no user decides on the cap of the own amounts.
    """
    passed_E = (activity.day_E > 0) & (activity.day_E <= np.minimum(horizon, activity.followed_U[activity.user_E]))
    raw_E, users = np.where(passed_E, activity.amount_E, 0.0), len(activity.users)
    # Who has much on many days is above no quantile of single days: they are all this user's. So the user's sum is capped,
    # which makes all of the days smaller, and then the largest day of each user.
    in_all = winsorise(np.bincount(activity.user_E, raw_E, minlength=users), quantile)
    scaled_E = raw_E * (in_all.values / np.maximum(in_all.raw, 1e-300))[activity.user_E] if len(in_all.above) else raw_E
    largest_U = np.zeros(users)
    np.maximum.at(largest_U, activity.user_E, scaled_E)
    cap = winsorise(largest_U, quantile).cap
    values_E = np.minimum(scaled_E, cap)
    above = np.flatnonzero(values_E < raw_E)
    by_entry = Capped(cap, values_E, raw_E, above[np.argsort(-raw_E[above], kind="stable")], in_all.cap)
    return by_entry, winsorise(totals(activity, horizon), quantile)


def totals(activity: Activity, horizon: int) -> np.ndarray:
    """Each user's amount over the test, up to `horizon` days after joining, or the file's in all; NaN for users for whom
    these days have not passed, and where a file has no amounts."""
    if activity.total_U is not None:
        return np.where(activity.followed_U >= horizon, activity.total_U, np.nan)
    if not activity.by_day:
        return np.full(len(activity.users), np.nan)
    in_time_E = activity.day_E <= horizon
    users = len(activity.users)
    total_U = np.bincount(activity.user_E[in_time_E], activity.amount_E[in_time_E], minlength=users)
    return np.where(activity.followed_U >= horizon, total_U, np.nan)
