"""Say, before an experiment starts, which effects it would find: `fastft abtest power [FILE] [--users N] [--effect E]`.

The baseline is a file of past activity, without arms, or a retention and a mean with its spread. An effect is found if it is
2.8 standard errors large, at 5 % and with 80 % power: two arms of N users, the same variance in both.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from fastft.common.command_line import option, parse, run_module
from fastft.compose.abtest.activity import Activity, ColumnsConfig, read_activity
from fastft.compose.abtest.estimates import (
    FEW_ACTIVE,
    ROUNDING,
    Days,
    count_days,
    engagement_variance,
    line_weights,
    mean_variance,
    power_law,
    retention_variance,
)
from fastft.compose.abtest.report import MEANING
from fastft.compose.abtest.verdict import size
from fastft.compose.abtest.winsor import require_quantile, winsorised
from fastft.errors import UsageError, UserError

USERS = (300, 1_000, 3_000, 10_000, 30_000, 100_000)
HORIZONS = (7, 14, 30)
WIDTH = 150
SMALLEST = 1e-6
"""Of an effect, or a share."""
RATIOS = ("engagement_ratio", "dzeta", "dalpha")
"""Figures that are logs of ratios, so that an effect is a change in percent."""


@dataclass
class PowerConfig:
    """The experiment to come."""

    file: str | None = option(None, positional=True)
    """Past activity, CSV or JSON Lines, for the baseline: who was active when."""
    retention: float | None = None
    """Without a file: the share of users who come back, such as .4."""
    engagement: float | None = None
    """Without a file: the mean use per user; needs --spread."""
    spread: float | None = None
    """Without a file: the standard deviation of the use over users."""
    users: int | None = None
    """Users in each arm: which effect would be found? Default: a table of sizes."""
    effect: float | None = None
    """A relative change, such as .05 for 5 %: how many users does it need? (For dbeta and dgamma, their values.)"""
    days: int | None = None
    """The horizon in days after joining. Default: 7, 14 and 30, as far as the file goes."""
    power: float = 0.8
    """The chance that the effect is found."""
    alpha: float = 0.05
    """The chance to find an effect where there is none."""
    winsor: float = 0.999
    """As for fastft abtest figures."""


@dataclass
class Baseline:
    """The variance of the log of a figure, times the users it was computed from: that of N users is `variance / N`."""

    what: str
    figure: str
    """One of FIGURES, or q for the retention of one day."""
    days: int | None
    variance: float

    def detectable(self, users: float, z: float) -> float:
        """The smallest difference of two arms with so many users each that is found."""
        return z * math.sqrt(2 * self.variance / users)

    def needed(self, difference: float, z: float) -> int:
        """Users in each arm to find a difference."""
        return math.ceil(2 * self.variance * (z / difference) ** 2)

    @property
    def relative(self) -> bool:
        return self.figure == "q" or self.figure in RATIOS


def main(argv: list[str]) -> int:
    """`fastft abtest power`."""
    description = "Say which effects an experiment would find, or how many users an effect needs."
    config, columns = parse(argv, "fastft abtest power", description, PowerConfig, ColumnsConfig)
    _check(config)
    described = ""
    if config.file:
        activity = read_activity(Path(config.file), columns, arms=False)
        baselines = [each for each in from_activity(activity, config) if each.variance > ROUNDING]
        if not baselines:
            raise UserError(
                f"{config.file}: fewer than {FEW_ACTIVE} users come back, or all do the same, so there is no baseline"
            )
        described = describe(activity, baselines[-1].days or 1)
    else:
        baselines = list(from_options(config))
    _show(baselines, described, config, z_of(config.alpha, config.power))
    return 0


def _check(config: PowerConfig) -> None:
    given = config.retention is not None or config.engagement is not None
    if bool(config.file) == given:
        raise UsageError("give a FILE of past activity, or --retention, or --engagement with --spread")
    if config.retention is not None and not SMALLEST <= config.retention <= 1 - SMALLEST:
        raise UsageError(f"--retention is {config.retention:g}; it must be between 0 and 1, by {SMALLEST:g} or more")
    if (config.engagement is None) != (config.spread is None):
        raise UsageError("--engagement and --spread need each other")
    if config.engagement is not None and config.spread is not None and not (config.engagement > 0 < config.spread):
        raise UsageError("--engagement and --spread must be above 0")
    if config.engagement and config.spread and not SMALLEST <= config.spread / config.engagement <= 1 / SMALLEST:
        raise UsageError("--spread must be from a millionth to a million times --engagement")
    if config.users is not None and config.users < 2:
        raise UsageError(f"--users is {config.users}; it must be 2 or more")
    if config.effect is not None and not (-1 < config.effect <= -SMALLEST or SMALLEST <= config.effect <= 1e6):
        raise UsageError(f"--effect is {config.effect:g}; it must be above -1, and {SMALLEST:g} or more away from 0")
    if config.effect and config.retention and config.retention * (1 + config.effect) > 1:
        raise UsageError(
            f"--retention of {config.retention:g} cannot rise by {100 * config.effect:,.10g} %: that is above 1"
        )
    if not (0 < config.alpha < 1 and 0 < config.power < 1):
        raise UsageError("--alpha and --power must be between 0 and 1")
    if config.days is not None and config.days < 1:
        raise UsageError(f"--days is {config.days}; it must be 1 or more")
    require_quantile(config.winsor)


def z_of(alpha: float, power: float) -> float:
    """Standard errors of an effect that is found with this power by a two-sided test at alpha: 2.80 for .05 and .8."""
    return NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(power)


def from_options(config: PowerConfig) -> Iterable[Baseline]:
    """The variances of the logs of a share and of a mean."""
    if config.retention is not None:
        yield Baseline(f"retention of {config.retention:g}", "q", None, (1 - config.retention) / config.retention)
    if config.engagement is not None and config.spread is not None:
        variance = (config.spread / config.engagement) ** 2
        yield Baseline(f"use per user of {config.engagement:g}", "engagement_ratio", None, variance)


def from_activity(activity: Activity, config: PowerConfig) -> Iterable[Baseline]:
    """The variances of all figures in past activity, for each horizon, over the users for whom all its days have passed.

    Raises UserError for a file that is too short.
    """
    last = int(np.sort(activity.followed_U)[-2]) if len(activity.users) > 1 else 0
    if len(activity.users) < 2 or last < 1:
        raise UserError(f"{activity.source}: a baseline needs two users for whom day 1 has passed")
    asked = [config.days] if config.days else [days for days in HORIZONS if days <= last] or [last]
    if asked[-1] > last:
        raise UserError(f"{activity.source}: --days {asked[-1]} is more than the {last} days in the file")
    for horizon in asked:
        days = activity.days[activity.days <= horizon]
        if not len(days):
            raise UserError(f"{activity.source}: its first day is {activity.days[0]}, after day {horizon}")
        complete = _complete(activity, horizon)
        by_entry, by_user = winsorised(complete, horizon, config.winsor)
        counted = count_days(complete, 0, days, by_entry.values)
        yield from _of_days(counted, days, activity.by_day, horizon)
        total_U = by_user.values[~np.isnan(by_user.values)]
        if len(total_U) > 1 and total_U.sum() > 0:
            name = MEANING["engagement_ratio"].removesuffix(", ratio")
            yield Baseline(name, "engagement_ratio", horizon, len(total_U) * mean_variance(total_U))


def _complete(activity: Activity, horizon: int) -> Activity:
    return activity.of(np.flatnonzero(activity.followed_U >= horizon))


def describe(activity: Activity, horizon: int) -> str:
    """The baseline in a sentence: users, retention and engagement, and their power laws."""
    complete, days = _complete(activity, horizon), activity.days[activity.days <= horizon]
    counted = count_days(complete, 0, days, complete.amount_E)
    shown = [f"{100 * counted.retention_K[k]:.1f} % come back on day {days[k]}" for k in sorted({0, len(days) - 1})]
    laws = [("R(k)", counted.retention_K)] + [("E(k)", counted.engagement_K)] * activity.by_day
    for name, value_K in laws:
        law = power_law(days, value_K)
        if law and law.days > 2:
            shown.append(f"{name} = {law.scale:.3g} k^{law.exponent:.3f} (R2 {law.r2:.2f})")
    return f"Baseline: {counted.users:,} users for whom day {horizon} has passed; {', '.join(shown)}."


def _of_days(counted: Days, days: np.ndarray, by_day: bool, horizon: int) -> Iterable[Baseline]:
    on_K = counted.active_K >= FEW_ACTIVE
    if on_K.any():
        last = int(np.flatnonzero(on_K)[-1])
        weight_FK = np.zeros((1, len(days)))
        weight_FK[0, last] = 1
        variance = counted.users * float(retention_variance(counted, weight_FK)[0])
        yield Baseline(f"retention on day {days[last]}", "q", horizon, variance)
    if on_K.sum() < 2:
        return
    weight_FK = np.zeros((2, len(days)))
    weight_FK[:, on_K] = line_weights(days[on_K])
    lines = [(("dzeta", "dbeta"), retention_variance)] + [(("dalpha", "dgamma"), engagement_variance)] * by_day
    for names, variance_of in lines:
        for name, variance in zip(names, variance_of(counted, weight_FK)):
            yield Baseline(MEANING[name], name, horizon, counted.users * float(variance))


def _change(baseline: Baseline, difference: float) -> str:
    return size(difference) if baseline.relative else f"{difference:.3g}"


def _show(baselines: list[Baseline], described: str, config: PowerConfig, z: float) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(sentence(baselines, config, z), markup=False, highlight=False, style="bold")
    sizes = (config.users,) if config.users else USERS
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    heads = [
        "days",
        "figure",
        "what it says",
        *([f"{users:,} users" for users in sizes] if not config.effect else ["users"]),
    ]
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place > 2 else "left", no_wrap=True)
    for each in baselines:
        if config.effect:
            cells = [f"{each.needed(_difference(each, config.effect), z):,}"]
        else:
            cells = [_change(each, each.detectable(users, z)) for users in sizes]
        table.add_row(str(each.days or "–"), each.figure.replace("_", " "), each.what, *cells)
    console.print(table)
    if described:
        console.print(described, markup=False, highlight=False)
    holm = z_of(config.alpha / 5, config.power) / z
    console.print(
        f"Effects are those that {100 * config.power:g} of 100 experiments find at {100 * config.alpha:g} %, with two arms of "
        "that many users each. fastft abtest figures corrects for testing five figures (Holm): an effect in one figure alone "
        f"has to be {holm:.2f} times as large, or needs {holm**2:.2f} times the users.",
        markup=False, highlight=False,
    )  # fmt: skip


def _difference(baseline: Baseline, effect: float) -> float:
    return math.log1p(effect) if baseline.relative else effect


def sentence(baselines: list[Baseline], config: PowerConfig, z: float) -> str:
    """What the table says, for the longest horizon and the figures that can be read as a change."""
    last = max(each.days or 0 for each in baselines)
    named = [
        each for each in baselines if (each.days or 0) == last and each.figure in ("q", "dzeta", "engagement_ratio")
    ]
    over = f" over {last} days" if last else ""
    chance = f"with {100 * config.power:g} % probability"
    if config.effect:
        needs = ", ".join(
            f"{each.needed(_difference(each, config.effect), z):,} users for {each.what}" for each in named
        )
        return f"To find a change of {100 * config.effect:g} % {chance}{over}, each arm needs {needs}."
    users = config.users or 10_000
    found = " or ".join(f"{_change(each, each.detectable(users, z))} in {each.what}" for each in named)
    return (
        f"With {users:,} users in each arm{over}, a change of {found} is found {chance}; a smaller one may be missed."
    )


if __name__ == "__main__":
    run_module(main)
