"""The results of an experiment: all figures of its arms, the checks that come before them, and what is to be said with them."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fastft.common.html import percent
from fastft.compose.abtest.activity import IN_TWO, Activity
from fastft.compose.abtest.estimates import (
    FEW_ACTIVE,
    FIGURES,
    ArmComparison,
    Days,
    Effect,
    PowerLaw,
    compare,
    count_days,
    power_law,
    require_users,
)
from fastft.compose.abtest.significance import sample_ratio_p
from fastft.compose.abtest.table import nearest
from fastft.compose.abtest.winsor import Capped, totals
from fastft.errors import UsageError, UserError

STOP, WARN = 0.001, 0.01
"""p values of the sample-ratio check: below the first nothing is read, below the second a warning comes first."""
PLANNED = 30
"""Days of an experiment, as in Blended."""
FEW = 100
"""Users in an arm below which intervals are less exact: A/A splits of 30 users an arm (benchmarks/abtest.py)."""
FEW_ON_A_DAY = 20
"""Active users of an arm on a day of a line, likewise: A/A splits in which 5 to 9 are active (`fastft abtest simulate`)."""
IN_TWO_ARMS = 0.01
"""The share of users in two arms above which something is wrong with the assignment."""
FAILED = 0.01
"""The share of an arm's turns that failed above which a warning comes first."""
NAMED = 10
"""Outliers that are named."""


@dataclass
class SampleRatio:
    """Whether users fell into the arms as planned."""

    users: dict[str, int]
    expected: dict[str, float]
    p: float

    @property
    def verdict(self) -> str:
        return "stop" if self.p < STOP else "warning" if self.p < WARN else "ok"


@dataclass
class ArmCurve:
    """An arm's own retention and engagement by day, of days with users."""

    users: int
    complete: int
    """Users for whom all days up to the horizon have passed."""
    retention: dict[int, float]
    engagement: dict[int, float]
    retention_law: PowerLaw | None
    engagement_law: PowerLaw | None


@dataclass
class Results:
    """All that is known of an experiment."""

    source: str
    control: str
    unit: str
    planned: int
    reached: int
    """The last day, up to the planned one, that has passed for a tenth of every arm's users."""
    days_given: bool
    """Whether somebody said how many days were planned."""
    sample_ratio: SampleRatio
    doubts: list[str] = field(default_factory=list)
    """What the verdict begins with."""
    comparisons: list[ArmComparison] = field(default_factory=list)
    curves: dict[str, ArmCurve] = field(default_factory=dict)
    outliers: dict[str, Any] = field(default_factory=dict)
    failed_turns: dict[str, dict[str, int]] = field(default_factory=dict)
    """The turns of each arm, and how many of them failed, of the gateway's events."""
    warnings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    verdict: str = ""

    def as_json(self) -> dict[str, Any]:
        """The content of figures.json. An effect or a difference is [value, low, high], a 95 % interval."""
        return {
            "verdict": self.verdict,
            "warnings": self.warnings,
            "source": self.source,
            "control": self.control,
            "unit": self.unit,
            "horizon": {"planned": self.planned, "reached": self.reached},
            "failed_turns": self.failed_turns,
            "sample_ratio": asdict(self.sample_ratio) | {"verdict": self.sample_ratio.verdict},
            "arms": {each.arm: _comparison_json(each) for each in self.comparisons},
            "curves": {arm: asdict(curve) for arm, curve in self.curves.items()},
            "outliers": self.outliers,
            "remarks": self.remarks,
        }


def _comparison_json(found: ArmComparison) -> dict[str, Any]:
    figures: dict[str, Any] = dict.fromkeys(FIGURES)
    figures |= {name: _shown(name, effect) for name, effect in found.figures.items()}
    return {
        "retention_ratio": {day: effect.ratio[0] for day, effect in found.retention.items()},
        "retention_ratio_interval": {day: effect.ratio[1:] for day, effect in found.retention.items()},
        "engagement_ratio_by_day": {day: effect.ratio[0] for day, effect in found.engagement.items()},
        "engagement_ratio_by_day_interval": {day: effect.ratio[1:] for day, effect in found.engagement.items()},
        **figures,
        "raw": {name: _shown(name, effect) for name, effect in found.raw.items()},
        "p": {name: effect.p for name, effect in found.figures.items()},
        "p_holm": {name: effect.p_holm for name, effect in found.figures.items()},
        "retention_difference": {
            day: asdict(each) | {"difference": (each.value, each.low, each.high)} for day, each in found.shares.items()
        },
        "days_left_out": found.left_out,
    }


def _shown(name: str, effect: Effect) -> tuple[float, float, float]:
    return effect.ratio if name.endswith("ratio") else (effect.value, effect.low, effect.high)


def compute(
    activity: Activity,
    control_name: str,
    days: int | None = None,
    share_words: Sequence[str] = (),
    winsor: float = 1.0,
    complete: bool = False,
) -> Results:
    """Compute everything of an experiment but its verdict; the arguments are those of `fastft abtest figures`.

    If users did not fall into the arms as planned (the sample-ratio check), nothing else is computed. Raises UserError for
    arms that cannot be compared.
    """
    shares = _shares(share_words, activity)
    if control_name not in activity.arms:
        raise UserError(f"{activity.source}: there is no arm {control_name!r}{nearest(control_name, activity.arms)}")
    control = activity.arms.index(control_name)
    require_users(activity, control)
    users = np.bincount(activity.arm_U, minlength=len(activity.arms))
    ratio = SampleRatio(
        dict(zip(activity.arms, users.tolist())),
        {arm: float(users.sum() * share / sum(shares.values())) for arm, share in shares.items()},
        sample_ratio_p(users, (shares[arm] for arm in activity.arms)),
    )
    planned = days or (PLANNED if activity.by_day else int(activity.days[-1]))
    results = Results(activity.source, control_name, activity.unit, planned, 0, days is not None, ratio)
    results.failed_turns = activity.failed_turns
    results.remarks = [f"Left out: {what}: {count:,}." for what, count in activity.left_out.items()] + activity.remarks
    _doubt_assignment(results, activity)
    _warn_of_failures(results)
    if ratio.verdict == "stop":
        results.verdict = _stopped(ratio)
        return results
    if ratio.verdict == "warning":
        results.warnings.append(_uneven(ratio) + ", so something may assign or lose users by arm: look for it first.")
        results.doubts.append("the sizes of the arms are off")
    results.reached = _reached(activity, planned)
    if results.reached < planned:
        results.warnings.append(_too_early(results, activity))
    if complete:
        activity = activity.of(np.flatnonzero(activity.followed_U >= results.reached))
        require_users(activity, control)
    _fill(results, activity, control, winsor)
    return results


def _doubt_assignment(results: Results, activity: Activity) -> None:
    """Say first that many users were in two arms: who is left is no fair sample."""
    in_two = activity.left_out[IN_TWO]
    if in_two and (share := in_two / (in_two + len(activity.users))) > IN_TWO_ARMS:
        results.warnings.append(
            f"{in_two:,} users ({percent(share)}) have rows in two arms and are left out: users do not keep their arm, or the "
            "column of users is not one. Who is left came less often than all users did."
        )
        results.doubts.append(f"{percent(share)} of the users were in two arms")


def _warn_of_failures(results: Results) -> None:
    """Say how many turns of each arm failed; as a warning, if many."""
    turns = results.failed_turns
    if not any(each["failed"] for each in turns.values()):
        return
    shares = {arm: each["failed"] / max(1, each["turns"]) for arm, each in turns.items()}
    said = ", ".join(f"{arm} {turns[arm]['failed']:,} ({percent(share)})" for arm, share in shares.items())
    line = f"Turns that failed show a user to be in the arm, but are no use of it: {said}."
    if max(shares.values()) < FAILED:
        results.remarks.append(line)
    else:
        results.warnings.append(f"{line} A difference may come from the failures rather than from the models.")


def _shares(words: Sequence[str], activity: Activity) -> dict[str, float]:
    """The planned share of each arm. Raises UserError for an arm without users, or one without a share."""
    if not words and activity.shares == {}:
        raise UserError(
            f"{activity.source}: the shares of the arms changed during the experiment, so the arms hold users of different "
            "times, who differ by more than the arm (Simpson's paradox): read each period alone, or give --shares"
        )
    if not words:
        return activity.shares or dict.fromkeys(activity.arms, 1.0)
    shares = {}
    for word in words:
        arm, _, share = word.rpartition("=")
        if arm in shares:
            raise UsageError(f"--shares names the arm {arm!r} twice; name every arm once")
        try:
            shares[arm] = float(share)
        except ValueError:
            shares[arm] = 0.0
        if not arm or not 0 < shares[arm] < math.inf:
            raise UsageError(f"--shares {word!r}: write ARM=SHARE, such as control=0.5, with a share above 0")
        if arm not in activity.arms:
            raise UserError(f"{activity.source}: the arm {arm!r} has no users{nearest(arm, activity.arms)}")
    if missing := [arm for arm in activity.arms if arm not in shares]:
        raise UsageError(f"--shares: the arm {missing[0]!r} is in the file, but has no share; name every arm")
    return shares


def _uneven(ratio: SampleRatio) -> str:
    found = ", ".join(f"{arm} {count:,}" for arm, count in ratio.users.items())
    planned = ", ".join(f"{arm} {count:,.0f}" for arm, count in ratio.expected.items())
    return f"The arms have {found} users where the plan gives {planned} (sample-ratio check, p = {ratio.p:.2g})"


def _stopped(ratio: SampleRatio) -> str:
    return (
        f"{_uneven(ratio)}: no figure of this experiment can be trusted, and none is computed. Find out what assigns or "
        "loses users by arm; if they were not meant to be equal, say so with --shares ARM=SHARE …"
    )


def _reached(activity: Activity, planned: int) -> int:
    """The last day, up to the planned one, that has passed for a tenth of every arm's users, and for two.

    On later days few users say little, and the lines weigh every day alike. Raises UserError if there is no such day.
    """
    last = []
    for arm in range(len(activity.arms)):
        followed_U = np.sort(activity.followed_U[activity.arm_U == arm])
        last.append(followed_U[-max(2, math.ceil(len(followed_U) / 10))])
    days = activity.days[(activity.days <= planned) & (activity.days <= min(last))]
    if not len(days):
        first = int(activity.days[0]) if len(activity.days) else 1
        least = activity.arms[int(np.argmin(last))]
        why = (
            f"day {first} has not passed for two users, and a tenth, of {least!r}"
            if first <= planned
            else f"its first day is {first}"
        )
        raise UserError(f"{activity.source}: no day up to day {planned} can be compared: {why}")
    return int(days[-1])


def _too_early(results: Results, activity: Activity) -> str:
    has = f"the file has {results.reached} of the {results.planned} days that were planned"
    if activity.planned_only or not activity.by_day:
        return f"{has[0].upper()}{has[1:]} (--days): the figures are over these only."
    return (
        f"{has[0].upper()}{has[1:]} (--days). Reading an experiment before its end, and again later, finds differences "
        "that are none more often than 5 % of the time."
    )


def _fill(results: Results, activity: Activity, control: int, quantile: float) -> None:
    """Compute comparisons, curves and outliers, and what is to be said about them."""
    results.comparisons, by_entry, by_user = compare(activity, control, results.reached, quantile)
    days, few = activity.days[activity.days <= results.reached], False
    for arm, name in enumerate(activity.arms):
        counted = count_days(activity, arm, days, by_entry.values)
        complete = int(((activity.arm_U == arm) & (activity.followed_U >= results.reached)).sum())
        on_lines = counted.active_K[counted.active_K >= FEW_ACTIVE]
        few |= counted.users < FEW or on_lines.min(initial=FEW_ON_A_DAY) < FEW_ON_A_DAY
        results.curves[name] = _curve(counted, days, activity.by_day, complete)
    results.outliers = _outliers(activity, quantile, by_entry, by_user)
    results.warnings += _nothing_used(results, activity, control) + _poor_fits(results)
    if few:
        results.remarks.append(
            f"An arm has fewer than {FEW} users, or fewer than {FEW_ON_A_DAY} active ones on a day of a line: intervals hold the "
            "truth in 91 to 100 % instead of 95 %, in splits of real users without an effect."
        )


def _nothing_used(results: Results, activity: Activity, control: int) -> list[str]:
    """A warning if an arm's amounts are all 0, or unknown: there is no ratio of use per user then."""
    if not activity.unit or all("engagement_ratio" in each.figures for each in results.comparisons):
        return []
    total_U, lines = totals(activity, results.reached), []
    for arm, name in enumerate(activity.arms):
        known_U = total_U[(activity.arm_U == arm) & ~np.isnan(total_U)]
        if len(known_U) < 2:
            lines.append(
                f"{name}: day {results.reached} has not passed for two users, so use per user is not compared."
            )
        elif not known_U.any():
            lines.append(f"{name}: nobody has any {activity.unit}: all {len(known_U):,} users' amounts are 0.")
    return lines


def _curve(counted: Days, days: np.ndarray, by_day: bool, complete: int) -> ArmCurve:
    with_users, active = counted.observed_K > 0, counted.active_K > 0
    return ArmCurve(
        counted.users,
        complete,
        dict(zip(days[with_users].tolist(), counted.retention_K[with_users].tolist())),
        dict(zip(days[active].tolist(), counted.engagement_K[active].tolist())) if by_day else {},
        power_law(days, counted.retention_K),
        power_law(days, counted.engagement_K) if by_day else None,
    )


def _outliers(activity: Activity, quantile: float, by_entry: Capped, by_user: Capped) -> dict[str, Any]:
    """The caps, how many amounts are above them, and the largest ones by name."""
    if not activity.unit:
        return {}
    if len(by_entry.above) and activity.by_day:
        user, day, amount = activity.user_E, activity.day_E, activity.amount_E
        named = [(int(user[e]), int(day[e]), float(amount[e])) for e in by_entry.above[:NAMED]]
    else:
        named = [(int(user), None, float(by_user.raw[user])) for user in by_user.above[:NAMED]]
    return {
        "quantile": quantile,
        "cap_by_day": by_entry.cap if activity.by_day else None,
        "cap_over_days": by_entry.cap_over_days if activity.by_day else None,
        "above_by_day": len(by_entry.above) if activity.by_day else None,
        "cap_by_user": by_user.cap,
        "above_by_user": len(by_user.above),
        "largest": [
            {"user": activity.users[user], "arm": activity.arms[activity.arm_U[user]], "day": day, "amount": amount}
            for user, day, amount in named
        ],
    }


def _poor_fits(results: Results) -> list[str]:
    """A warning if a power law explains less than 80 % of an arm's curve: the lines over days then say little."""
    warnings = []
    for what, names, law in (
        ("retention", "dzeta and dbeta", "retention_law"),
        ("engagement", "dalpha and dgamma", "engagement_law"),
    ):
        laws = {arm: getattr(curve, law) for arm, curve in results.curves.items()}
        poor = [f"{arm} {each.r2:.2f}" for arm, each in laws.items() if each and each.days > 2 and each.r2 < 0.8]
        if poor:
            warnings.append(
                f"A power law explains little of how {what} runs over the days (R2 {', '.join(poor)}; below .8): read its ratios "
                f"by day rather than {names}."
            )
    return warnings
