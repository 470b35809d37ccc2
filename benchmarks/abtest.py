"""Check how often the intervals of `fastft abtest figures` hold the truth, in A/A splits of real or made activity.

    python benchmarks/abtest.py [FILE] [--splits 1000]

The users of FILE (user, timestamp; such as SNAP's CollegeMsg) fall into two arms at random, so every true effect is 0. The table
has the share of the splits whose 95 % interval holds it: with the exact influence of each user, which fastft uses, and with
the linear one of the usual delta method. Without a FILE, visits are made with amounts as uneven as real ones (log-normal).
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastft.common.command_line import option, parse, run
from fastft.compose.abtest import estimates
from fastft.compose.abtest.activity import Activity, ColumnsConfig, read_activity
from fastft.compose.abtest.estimates import FIGURES, compare_arms, winsorised

SIZES = (30, 100, 300, None)
"""Users in each arm; None for all of the file."""


@dataclass
class BenchmarkConfig:
    file: str | None = option(None, positional=True)
    """Real activity."""
    splits: int = 1000
    """Splits of each size."""
    days: int = 30
    """The horizon."""


def made(users: int = 1400, days: int = 32, seed: int = 0) -> Activity:
    """Activity by R(k) = .47 k^-.37 with amounts that are log-normal over users and over days."""
    rng = np.random.default_rng(seed)
    day = np.arange(1, days + 1)
    active = rng.random((users, days)) < 0.47 * day**-0.37
    user_E, k_E = np.nonzero(active)
    heavy = rng.normal(0, 0.8, users)
    amount_E = np.ceil(np.exp(heavy[user_E] + rng.normal(0.8, 0.9, len(user_E))))
    names = [str(user) for user in range(users)]
    return Activity(
        "made", names, ["all"], np.zeros(users, int), np.full(users, days), user_E, day[k_E], amount_E, day, "turns"
    )


def main(argv: list[str]) -> int:
    [config] = parse(argv, "python benchmarks/abtest.py", "Coverage of the intervals of A/B figures.", BenchmarkConfig)
    activity = read_activity(Path(config.file), ColumnsConfig(), arms=False) if config.file else made()
    table = Table("users an arm", "influence", *FIGURES)
    for users in SIZES:
        held = {"exact": [], "linear": []}
        for seed in track(range(config.splits), f"{users or len(activity.users) // 2} users"):
            order = np.random.default_rng(seed).permutation(len(activity.users))
            drawn = activity.of(order[: 2 * users] if users else order)
            split = replace(drawn, arms=["a", "b"], arm_U=np.arange(len(drawn.users)) % 2)
            for kind in held:
                held[kind].append(holds(split, config.days, kind))
        for kind, values in held.items():
            shares = (f"{100 * share:.1f}" for share in np.nanmean(values, axis=0))
            table.add_row(str(users or len(activity.users) // 2), kind, *shares)
    Console(width=110).print(table)
    return 0


def holds(split: Activity, days: int, kind: str) -> list[float]:
    """Whether each figure's interval holds 0; NaN for a figure that cannot be computed."""
    exact = estimates._without
    estimates._without = exact if kind == "exact" else np.asarray
    try:
        by_entry, by_user = winsorised(split, days, 0.999)
        [found] = compare_arms(split, 0, days, by_entry.values, by_user.values)
    finally:
        estimates._without = exact
    known = (found.figures.get(name) for name in FIGURES)
    return [float(each.low <= 0 <= each.high) if each else math.nan for each in known]


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
