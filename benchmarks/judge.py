"""Do the judge's intervals hold what they promise? Simulated evaluations whose truth is known.

    python benchmarks/judge.py [--runs 4000]

A question is answered better by one model or the other, by chance and by skill; a judge looks in both orders, with noise, and
prefers the first place a little. So both looks at a question agree more often than chance. Printed: how often the 95 % interval
holds the true win rate: of `fastft.judge.intervals.bootstrap_share` (as fastft does it), of questions resampled as they are, and
of single judgments resampled.
"""

import argparse

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastft.judge.intervals import bootstrap_mean, bootstrap_share

SETTINGS = {  # questions, skill, spread over questions, the first place's worth, the judge's noise
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
    """Outcomes of one evaluation, 1, 0.5 or 0 for the second model [Q, 2 orders]."""
    skill, spread, place, noise = setting
    better_Q = rng.normal(skill, spread, questions)
    seen_Q2 = better_Q[:, None] + np.array([-place, place]) + rng.normal(0, noise, (questions, 2))
    return np.where(np.abs(seen_Q2) < TIE, 0.5, seen_Q2 > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=4000)
    arguments = parser.parse_args()
    rng, console = np.random.default_rng(0), Console(width=130)
    table = Table("", "true win rate", "fastft", "questions as they are", "judgments", "half width", "repeated")
    for name, (questions, *setting) in SETTINGS.items():
        truth = simulate(rng, 4_000_000, setting).mean()
        held, widths, same = [0, 0, 0], [], []
        for _ in track(range(arguments.runs), name, transient=True, console=console):
            outcomes_Q2 = simulate(rng, questions, setting)
            outcomes_Q = outcomes_Q2.mean(1)
            share = bootstrap_share(outcomes_Q, np.ones(questions))
            widths.append((share.high - share.low) / 2)
            for i, interval in enumerate((share, bootstrap_mean(outcomes_Q), bootstrap_mean(outcomes_Q2.ravel()))):
                held[i] += interval.low <= truth <= interval.high
            same.append((outcomes_Q2[:, 0] == outcomes_Q2[:, 1]).mean())
        shares = [f"{each / arguments.runs:.1%}" for each in held]
        table.add_row(name, f"{truth:.1%}", *shares, f"{100 * np.mean(widths):.1f} points", f"{np.mean(same):.0%}")
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
