"""The coverage of rating intervals from few votes.

    python benchmarks/votes.py [REPEATS]

Models with true ratings (normal, with the spread given as standard deviation) fight random battles, up to a fifth of them ties.
How often does the 95 % interval hold the truth? Compared: fastft.judge.statistics.bradley_terry (people's votes), and
fastft.judge.statistics.stats.ratings, which is for evaluations in which all pairs meet on all questions.
"""

import sys
from dataclasses import dataclass

import numpy as np

from fastft.common.command_line import option, parse, run
from fastft.judge.judgment import Judgment
from fastft.judge.statistics.bradley_terry import Game, bradley_terry
from fastft.judge.statistics.stats import ratings


@dataclass
class VotesBenchmark:
    """Options of this benchmark."""

    repeats: int = option(100, positional=True)
    """Simulated sets of battles for each row of the table."""


def battles(rng: np.random.Generator, true_M: np.ndarray, count: int) -> list[Game]:
    found = []
    for question in range(count):
        one, other = rng.choice(len(true_M), 2, replace=False)
        rate = 1 / (1 + 10 ** ((true_M[other] - true_M[one]) / 400))
        ties = min(0.2, rate, 1 - rate)  # half of them from wins, half from losses: the mean score stays `rate`
        drawn = rng.random()
        score = 1.0 if drawn < rate - ties / 2 else 0.5 if drawn < rate + ties / 2 else 0.0
        found.append(Game(f"m{one}", f"m{other}", score, f"q{question}"))
    return found


def judgments(those: list[Game]) -> list[Judgment]:
    return [Judgment(b.question, "", "pairwise", "p", b.first, b.second, b.score, 1 - b.score, True, "") for b in those]


def main() -> None:
    [options] = parse(sys.argv[1:], "benchmarks/votes.py", __doc__.splitlines()[0], VotesBenchmark)
    print(
        "| models | spread | battles | bradley_terry | half-width | stats.ratings | half-width |\n|---|---|---|---|---|---|---|"
    )
    for models, spread, count in ((2, 150, 5), (2, 150, 50), (4, 150, 30), (4, 150, 200), (6, 300, 60), (6, 300, 400)):
        rng, held, widths, seen = np.random.default_rng(0), [0, 0], [0.0, 0.0], 0
        for _ in range(options.repeats):
            true_M = rng.normal(0, spread, models)
            true_M -= true_M.mean()
            those = battles(rng, true_M, count)
            if len({name for b in those for name in (b.first, b.second)}) < models:
                continue
            for i, found in enumerate((bradley_terry(those), ratings(judgments(those)))):
                for model, true in enumerate(true_M):
                    interval = found[f"m{model}"]
                    held[i] += interval.low <= 1000 + true <= interval.high
                    widths[i] += (interval.high - interval.low) / 2
            seen += models
        cells = [f"{100 * held[i] / seen:.0f} % | {widths[i] / seen:.0f}" for i in (0, 1)]
        print(f"| {models} | {spread} | {count} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
