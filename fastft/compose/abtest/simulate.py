"""Try an experiment many times on real activity: `fastft abtest simulate FILE [--users N] [--days D] [--dzeta .05 …]`.

Each time, the users of the file fall into two arms at random, and the effect is put into one of them. The table says how often
an experiment of this size would call a figure significant, and how often its 95 % interval holds the true effect. Without an
effect (A/A), 5 % and 95 % are right.

Retention changes by q(k) = exp(dzeta + dbeta log k): visits are dropped at random, or added on days without one, with the
amount of another user's visit on that day. Amounts are multiplied by r(k) = exp(dalpha + dgamma log k).

A user has one arm for good, so a record says nothing of a user under another arm, and serving the arms in other shares gives
the mean of the arms' figures in these shares. Policies that choose turn by turn are replayed by `fastft router simulate`.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastft.common.command_line import option, parse, run_module
from fastft.compose.abtest.activity import Activity, ColumnsConfig, read_activity
from fastft.compose.abtest.estimates import ROUNDING, Effect, compare_arms
from fastft.compose.abtest.report import MEANING
from fastft.compose.abtest.shares import Shares
from fastft.compose.abtest.verdict import ALPHA
from fastft.compose.abtest.winsor import require_quantile, winsorised
from fastft.errors import UsageError, UserError

WIDTH = 120
LARGEST = 5
"""Of an effect, in logs."""
CONTROL, TEST = 0, 1


@dataclass
class TrialsConfig:
    """The experiment to try."""

    file: str = option(positional=True)
    """Real activity, CSV or JSON Lines: who was active when. A column of arms is ignored."""
    users: int | None = None
    """Users in each arm, drawn with replacement. Default: the file's users, split into two halves."""
    days: int | None = None
    """The horizon in days after joining. Default: 30, or as far as the file goes."""
    dzeta: float = 0.0
    """The effect on retention at the start: .05 is 5 % more."""
    dbeta: float = 0.0
    """The effect on how retention lasts."""
    dalpha: float = 0.0
    """The effect on use per visitor at the start."""
    dgamma: float = 0.0
    """The effect on how use per visitor lasts."""
    experiments: int = 1000
    """How often the experiment is tried."""
    seed: int = 0
    winsor: float = 0.999
    """As for fastft abtest figures."""


@dataclass
class Trials:
    """What the experiments showed of one figure; T experiments, those in which it could be computed."""

    true: float
    value_T: np.ndarray
    covered_T: np.ndarray
    significant_T: np.ndarray
    """By p alone."""
    sure_T: np.ndarray
    """After Holm's correction."""


def main(argv: list[str]) -> int:
    """`fastft abtest simulate`."""
    description = "Try an experiment many times on real activity: how often would it show what?"
    config, columns = parse(argv, "fastft abtest simulate", description, TrialsConfig, ColumnsConfig)
    if config.users is not None and config.users < 2:
        raise UsageError(f"--users is {config.users}; it must be 2 or more")
    if config.experiments < 1:
        raise UsageError(f"--experiments is {config.experiments}; it must be 1 or more")
    if config.days is not None and config.days < 1:
        raise UsageError(f"--days is {config.days}; it must be 1 or more")
    for name in ("dzeta", "dbeta", "dalpha", "dgamma"):
        if not abs(value := getattr(config, name)) <= LARGEST:
            raise UsageError(f"--{name} is {value:g}; it must be from -{LARGEST} to {LARGEST} (.05 is about 5 %)")
    require_quantile(config.winsor)
    activity = read_activity(Path(config.file), columns, arms=False)
    horizon = _horizon(activity, config)
    trials, false_alarms = simulate(activity, horizon, config)
    if not trials:
        raise UserError(
            f"{activity.source}: nobody comes back or uses anything up to day {horizon}, so there is nothing to try"
        )
    _show(trials, false_alarms, horizon, len(activity.users), config)
    return 0


def _horizon(activity: Activity, config: TrialsConfig) -> int:
    if len(activity.users) < 4:
        raise UserError(f"{activity.source}: two arms of two users need four, and the file has {len(activity.users)}")
    if (config.dalpha or config.dgamma) and not activity.by_day:
        raise UsageError("--dalpha and --dgamma need amounts by day, which a file of retention columns does not have")
    last = int(np.sort(activity.followed_U)[-4])
    days = activity.days[activity.days <= min(config.days or 30, last)]
    if not len(days):
        raise UserError(f"{activity.source}: no day up to day {config.days or 30} has passed for four users")
    if config.days and config.days > last:
        raise UserError(f"{activity.source}: --days {config.days} is more than the {last} days in the file")
    return int(days[-1])


def simulate(activity: Activity, horizon: int, config: TrialsConfig) -> tuple[dict[str, Trials], float]:
    """Try the experiment. Returns each figure's trials, and the share of experiments with any figure sure after Holm."""
    rng = np.random.default_rng(config.seed)
    effect = Effects(activity, horizon, config)
    seen: dict[str, list[tuple[float, bool, bool, bool]]] = defaultdict(list)
    any_sure = 0
    for _ in range(config.experiments):
        drawn = effect.put_into(_two_arms(activity, config.users, rng), rng)
        by_entry, by_user = winsorised(drawn, horizon, config.winsor)
        [found] = compare_arms(drawn, CONTROL, horizon, by_entry.values, by_user.values)
        tested: dict[str, Effect | Shares] = dict(found.figures)
        if len(effect.days) == 1:
            for each in found.shares.values():
                tested["retention"] = each
        for name, each in tested.items():
            covered = each.low - ROUNDING <= effect.true[name] <= each.high + ROUNDING
            seen[name].append((each.value, covered, each.p < ALPHA, each.p_holm < ALPHA))
        any_sure += any(each.p_holm < ALPHA for each in (*found.figures.values(), *found.shares.values()))
    made = {name: Trials(effect.true[name], *np.array(seen[name], float).T) for name in MEANING if name in seen}
    return made, any_sure / config.experiments


def _two_arms(activity: Activity, users: int | None, rng: np.random.Generator) -> Activity:
    """Users in random order, every second one in the test arm."""
    count = len(activity.users)
    drawn = activity.of(rng.integers(0, count, 2 * users) if users else rng.permutation(count))
    drawn.arms, drawn.arm_U = ["control", "test"], np.arange(len(drawn.users)) % 2
    return drawn


class Effects:
    """Puts an effect into the test arm of an experiment. K days up to the horizon."""

    def __init__(self, activity: Activity, horizon: int, config: TrialsConfig):
        self.days = activity.days[activity.days <= horizon]
        log_day_K = np.log(self.days)
        self.q_K = np.exp(config.dzeta + config.dbeta * log_day_K)
        self.r_K = np.exp(config.dalpha + config.dgamma * log_day_K)
        passed = activity.followed_U[:, None] >= self.days
        place_E = np.searchsorted(self.days, activity.day_E)
        on_E = np.isin(activity.day_E, self.days) & (activity.day_E <= activity.followed_U[activity.user_E])
        self.amounts = [activity.amount_E[on_E & (place_E == k)] for k in range(len(self.days))]
        retention_K = np.array([len(each) for each in self.amounts]) / passed.sum(0)
        if (most := float((self.q_K * retention_K).max())) > 1:
            raise UserError(
                f"{activity.source}: with this effect, {100 * most:.0f} % of the users would come back on a day"
            )
        # An idle user becomes active with this probability, so that R(k) becomes q(k) R(k).
        self.added_K = np.maximum(0, retention_K * (self.q_K - 1) / np.maximum(1 - retention_K, 1e-12))
        self.true = {key: getattr(config, key) for key in ("dzeta", "dbeta", "dalpha", "dgamma")}
        self.true["retention"] = float((retention_K * (self.q_K - 1))[0])
        self.true["engagement_ratio"] = self._in_all(activity, horizon)

    def _in_all(self, activity: Activity, horizon: int) -> float:
        """The log of the ratio of the use per user that the effect brings, of users for whom the horizon has passed."""
        if not activity.by_day:  # the amount is one number a user, which the effect does not touch
            return 0.0
        entries = (activity.day_E <= horizon) & (activity.followed_U[activity.user_E] >= horizon)
        day_E, amount_E = activity.day_E[entries], activity.amount_E[entries]
        by_day = np.bincount(day_E, amount_E, minlength=horizon + 1)
        change = np.ones(horizon + 1)
        change[self.days] = self.q_K * self.r_K
        return math.log((by_day * change).sum() / by_day.sum()) if by_day.sum() else 0.0

    def put_into(self, drawn: Activity, rng: np.random.Generator) -> Activity:
        """Change the test arm of `drawn`."""
        if (self.q_K == 1).all() and (self.r_K == 1).all():
            return drawn
        place_E = np.minimum(np.searchsorted(self.days, drawn.day_E), len(self.days) - 1)
        touched_E = (drawn.arm_U[drawn.user_E] == TEST) & (self.days[place_E] == drawn.day_E)
        kept_E = ~touched_E | (rng.random(len(place_E)) < self.q_K[place_E])
        active = np.zeros((len(drawn.users), len(self.days)), bool)
        active[drawn.user_E[touched_E], place_E[touched_E]] = True
        idle = (drawn.arm_U[:, None] == TEST) & (drawn.followed_U[:, None] >= self.days) & ~active
        new_user, new_k = np.nonzero(idle & (rng.random(idle.shape) < self.added_K))
        new_amount = np.zeros(len(new_k))
        for k in np.unique(new_k):
            new_amount[new_k == k] = rng.choice(self.amounts[k], int((new_k == k).sum()))
        drawn.user_E = np.concatenate([drawn.user_E[kept_E], new_user])
        drawn.day_E = np.concatenate([drawn.day_E[kept_E], self.days[new_k]])
        amount_E = np.where(touched_E, drawn.amount_E * self.r_K[place_E], drawn.amount_E)
        drawn.amount_E = np.concatenate([amount_E[kept_E], new_amount * self.r_K[new_k]])
        return drawn


def _show(trials: dict[str, Trials], any_sure: float, horizon: int, users: int, config: TrialsConfig) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(sentence(trials, any_sure, horizon, users, config), markup=False, highlight=False, style="bold")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for place, head in enumerate(("figure", "what it says", "true", "mean", "sd", "covered", "p < .05", "Holm < .05")):
        table.add_column(head, justify="right" if place > 1 else "left", no_wrap=True)
    for name, each in trials.items():
        table.add_row(
            name.replace("_", " ").replace("engagement ratio", "log engagement ratio"), MEANING[name], f"{each.true:.4f}",
            f"{each.value_T.mean():.4f}", f"{each.value_T.std():.4f}",
            *(f"{100 * of.mean():.1f} %" for of in (each.covered_T, each.significant_T, each.sure_T)),
        )  # fmt: skip
    console.print(table)
    error = 100 * math.sqrt(0.95 * 0.05 / config.experiments)
    console.print(
        f"A share of 95 % over {config.experiments:,} experiments is known to {error:.1f} points (one standard error).",
        markup=False, highlight=False,
    )  # fmt: skip


def sentence(trials: dict[str, Trials], any_sure: float, horizon: int, users: int, config: TrialsConfig) -> str:
    """What the experiments showed, in one sentence."""
    size = f"two arms of {config.users:,} users" if config.users else f"the file's {users:,} users in two halves"
    covered = [100 * each.covered_T.mean() for each in trials.values()]
    least, most = f"{min(covered):.1f}", f"{max(covered):.1f}"
    holds = f"the 95 % intervals hold the truth in {least if least == most else f'{least} to {most}'} %"
    begin = f"Of {config.experiments:,} experiments with {size} over {horizon} days"
    if not any((config.dzeta, config.dbeta, config.dalpha, config.dgamma)):
        return f"{begin} and no effect, {100 * any_sure:.1f} % show one after Holm's correction (at most 5 % is right); {holds}."
    found = ", ".join(
        f"{100 * each.sure_T.mean():.0f} % {name.replace('_', ' ')}" for name, each in trials.items() if each.true
    )
    return f"{begin} and this effect, so many find it after Holm's correction: {found}; {holds}."


if __name__ == "__main__":
    run_module(main)
