"""Rate models by the votes of a record: python -m fastft.serve.arena.leaderboard DIR prints what the page shows, as JSON.

Bradley-Terry ratings with 95 % intervals, from fastft.judge.statistics.bradley_terry. Models that no chain of battles
connects cannot be compared; only the largest group that is connected is rated.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from fastft.common.command_line import run
from fastft.judge.judgment import Judgment
from fastft.serve.arena.votes import counted, judgment_of
from fastft.serve.gateway.events import read_votes

FEW = 20
"""Number of battles. The page marks the rating of a model with fewer as uncertain."""


def leaderboard(votes: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """{"at", "votes", "left_out", "models": [...], "pairs": [...]}: the best model first, those without a rating last."""
    those, left_out = counted(votes)
    games = [judgment_of(vote) for vote in those]
    ratings = rate(games)
    tallies = {name: Counter() for each in games for name in (each.model_a, each.model_b)}
    pairs: dict[tuple[str, str], Counter] = {}
    for game, vote in zip(games, those):
        for own, other, won in ((game.model_a, game.model_b, "a"), (game.model_b, game.model_a, "b")):
            how = (
                vote["winner"] if vote["winner"] in ("tie", "both_bad") else "won" if vote["winner"] == won else "lost"
            )
            tallies[own][how] += 1
            pairs.setdefault((own, other), Counter())[how] += 1
    rows = []
    for name in sorted(tallies, key=lambda name: -ratings[name].value if name in ratings else float("inf")):
        tally = {how: tallies[name][how] for how in ("won", "lost", "tie", "both_bad")}
        battles = sum(tally.values())
        rated = name in ratings
        # The number of models that are better at 95 % confidence.
        rank = 1 + sum(other.low > ratings[name].high for other in ratings.values()) if rated else None
        rating = asdict(ratings[name]) if rated else None
        rows.append({"model": name, "rank": rank, "rating": rating, "battles": battles, "few": battles < FEW, **tally})
    return {
        "at": time.time(),
        "votes": len(games),
        "left_out": dict(left_out),
        "models": rows,
        "pairs": [{"model": own, "other": other, **tally} for (own, other), tally in pairs.items()],
    }


def rate(games: list[Judgment]) -> dict[str, Any]:
    """Ratings with intervals, by model, of the largest group that battles connect."""
    from fastft.judge.statistics.bradley_terry import Game, bradley_terry

    group = largest_group((game.model_a, game.model_b) for game in games)
    return bradley_terry(
        [
            Game(
                game.model_a,
                game.model_b,
                0.5 if game.winner == "tie" else float(game.winner == game.model_a),
                game.question_id,
            )
            for game in games
            if game.model_a in group
        ]
    )


def largest_group(pairs: Iterable[tuple[str, str]]) -> set[str]:
    """The largest set of models that are connected by pairs."""
    group_of: dict[str, set[str]] = {}
    for one, other in pairs:
        joined = group_of.setdefault(one, {one}) | group_of.setdefault(other, {other})
        for name in joined:
            group_of[name] = joined
    return max(group_of.values(), key=len, default=set())


def main() -> int:
    sys.stdout.buffer.write(orjson.dumps(leaderboard(read_votes(Path(sys.argv[1])))))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
