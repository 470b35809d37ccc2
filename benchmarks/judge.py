"""Check whether the judge's intervals hold what they promise, on simulated evaluations whose truth is known.

    python benchmarks/judge.py [--runs 4000]

One of two models answers a question better, by chance and by skill. A judge compares the answers in both orders, with
noise, and prefers the answer shown first a little; so its two verdicts on a question agree more often than chance. The
table shows how often the 95 % interval contains the true win rate: the interval of
`fastft.judge.statistics.intervals.bootstrap_share`, which fastft uses, that of questions resampled as they are, and that of
single judgments resampled.
"""

import sys
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastft.common.command_line import parse, run
from fastft.judge.statistics.intervals import bootstrap_mean, bootstrap_share

SETTINGS = {  # questions, skill, spread over questions, the worth of being shown first, the judge's noise
    "equal models": (80, 0.0, 1.0, 0.3, 0.6),
    "60 : 40": (80, 0.3, 1.0, 0.3, 0.6),
    "80 : 20": (80, 1.0, 1.0, 0.3, 0.6),
    "90 : 10": (80, 1.57, 1.0, 0.3, 0.6),
    "96 : 4": (80, 2.15, 1.0, 0.3, 0.6),
    "99 : 1": (80, 2.8, 1.0, 0.3, 0.6),
    "a judge that loves the first place": (80, 0.3, 1.0, 1.0, 0.6),
    "a noisy judge": (80, 0.3, 1.0, 0.3, 2.0),
    "10 questions, 60 : 40": (10, 0.3, 1.0, 0.3, 0.6),
    "10 questions, 90 : 10": (10, 1.57, 1.0, 0.3, 0.6),
}
TIE = 0.25  # differences below this are ties


def simulate(rng: np.random.Generator, questions: int, setting: list[float]) -> np.ndarray:
    """Return the outcomes of one evaluation for the second model: 1, 0.5 or 0 [Q, 2 orders]."""
    skill, spread, place, noise = setting
    better_Q = rng.normal(skill, spread, questions)
    seen_Q2 = better_Q[:, None] + np.array([-place, place]) + rng.normal(0, noise, (questions, 2))
    return np.where(np.abs(seen_Q2) < TIE, 0.5, seen_Q2 > 0)


@dataclass
class BenchmarkConfig:
    """How much is simulated."""

    runs: int = 4000
    """Simulated evaluations for each line of the table."""


def main() -> int:
    [config] = parse(sys.argv[1:], "benchmarks/judge.py", "Check the judge's intervals by simulation.", BenchmarkConfig)
    rng, console = np.random.default_rng(0), Console(width=130)
    table = Table("", "true win rate", "fastft", "questions as they are", "judgments", "half width", "repeated")
    for name, (questions, *setting) in SETTINGS.items():
        truth = simulate(rng, 4_000_000, setting).mean()
        held, widths, same = [0, 0, 0], [], []
        for _ in track(range(config.runs), name, transient=True, console=console):
            outcomes_Q2 = simulate(rng, questions, setting)
            outcomes_Q = outcomes_Q2.mean(1)
            share = bootstrap_share(outcomes_Q, np.ones(questions))
            widths.append((share.high - share.low) / 2)
            for i, interval in enumerate((share, bootstrap_mean(outcomes_Q), bootstrap_mean(outcomes_Q2.ravel()))):
                held[i] += interval.low <= truth <= interval.high
            same.append((outcomes_Q2[:, 0] == outcomes_Q2[:, 1]).mean())
        shares = [f"{each / config.runs:.1%}" for each in held]
        table.add_row(name, f"{truth:.1%}", *shares, f"{100 * np.mean(widths):.1f} points", f"{np.mean(same):.0%}")
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
