"""Ratings from few battles: they are where the battles put them, and say how little is known."""

import math

import pytest

from fastft.judge.statistics.bradley_terry import POINTS, Game, bradley_terry


def games(*counts: tuple[str, str, int, int]) -> list[Game]:
    """(first, second, battles won by the first, by the second)."""
    found = []
    for first, second, won, lost in counts:
        for score in [1.0] * won + [0.0] * lost:
            found.append(Game(first, second, score, f"q{len(found)}"))
    return found


def width(interval) -> float:
    return interval.high - interval.low


def test_many_battles_give_the_odds_that_were_seen():
    found = bradley_terry(games(("a", "b", 7500, 2500)))
    assert found["a"].value - found["b"].value == pytest.approx(POINTS * math.log(3), rel=0.01)
    assert found["a"].value + found["b"].value == pytest.approx(2000)
    # The standard error of the log odds is 1 / sqrt(n p q); each model is half of it away from the mean.
    assert width(found["a"]) == pytest.approx(2 * 1.96 * POINTS / math.sqrt(10_000 * 0.75 * 0.25) / 2, rel=0.01)


def test_ratings_are_transitive_and_agree_with_another_implementation():
    from evalica import Winner
    from evalica import bradley_terry as other

    battles = games(("a", "b", 600, 400), ("b", "c", 700, 300), ("a", "c", 800, 200))
    found = bradley_terry(battles)
    winners = [Winner.X if each.score else Winner.Y for each in battles]
    scores = other([each.first for each in battles], [each.second for each in battles], winners).scores
    logs = {name: POINTS * math.log(scores[name]) for name in "abc"}
    mean = sum(logs.values()) / 3
    assert list(found) == ["a", "b", "c"]
    for name in "abc":
        assert found[name].value == pytest.approx(1000 + logs[name] - mean, abs=3)


def test_three_wins_of_three_say_little_and_thirty_say_more():
    few, more = bradley_terry(games(("a", "b", 3, 0))), bradley_terry(games(("a", "b", 30, 0)))
    assert few["a"].low < 1000 < few["a"].value, "chance alone would do so once in eight times"
    assert more["a"].low > 1000 and width(few["a"]) > 400


def test_ties_are_half_a_win_for_each():
    [a, b] = bradley_terry([Game("a", "b", 0.5, str(i)) for i in range(10)]).values()
    assert a.value == b.value == pytest.approx(1000)


def test_battles_on_one_question_count_as_fewer():
    alike = [Game("a", "b", 1.0, f"q{i % 4}") if i % 4 else Game("a", "b", 0.0, "q0") for i in range(80)]
    apart = [Game("a", "b", each.score, f"q{i}") for i, each in enumerate(alike)]
    assert width(bradley_terry(alike)["a"]) > 1.5 * width(bradley_terry(apart)["a"])


def test_no_battles_are_no_ratings():
    assert bradley_terry([]) == {}
