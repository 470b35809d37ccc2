"""The figures: small cases by hand, laws that are true of any judgments, and intervals that cover what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.errors import UserError
from fastft.judge.judgment import Judgment
from fastft.judge.statistics import intervals
from fastft.judge.statistics.intervals import bootstrap_mean, bootstrap_share, questions_needed, sign_flip_p
from fastft.judge.statistics.stats import compare_pair, compute


def look(question, first, second, scores, judge="judge", category="x") -> Judgment:
    a, b = scores or (None, None)
    return Judgment(str(question), category, "pairwise", judge, first, second, a, b, scores is not None, "")


def both_orders(results: dict) -> list[Judgment]:
    """Return judgments of models a and b from {question: (a's and b's score with a shown first, the same with b shown first)}."""
    found = []
    for question, (one, other) in results.items():
        found += [look(question, "a", "b", one), look(question, "b", "a", other[::-1] if other else None)]
    return found


BY_HAND = {1: ((8, 6), (8, 6)), 2: ((8, 6), (6, 8)), 3: ((7, 7), (6, 8)), 4: ((5, 9), None)}


def test_totals_and_order_by_hand():
    found = compute(both_orders(BY_HAND))
    (pair,) = found.pairs
    assert (pair.first, pair.second) == ("a", "b")
    assert (pair.total.first_total, pair.total.second_total) == (48.0, 50.0)
    assert pair.total.percent == pytest.approx(100 * 50 / 48)
    assert (pair.total.wins, pair.total.ties, pair.total.losses, pair.total.unparsed) == (3, 1, 3, 1)
    assert pair.win_rate.value == pytest.approx((0 + 0.5 + 0.75 + 1) / 4)
    assert (pair.better_or_equal, pair.questions) == (3, 4)
    position = found.position["judge"]
    assert (position.both_orders, position.consistent, position.half_flips, position.flips) == (3, 1, 1, 1)
    assert position.first_wins.value == pytest.approx(4 / 6)
    assert position.flip_rate.value == pytest.approx(1 / 3) and not position.one_order
    assert found.unparsed == 1 and found.judgments == 8


def test_kappa_is_what_is_computed_by_hand():
    """20 looks: 8 + 7 agreed, 5 not; p_o = .75, p_e = .5 * .55 + .5 * .45 = .5, kappa = .5."""
    verdicts = [("a", "a")] * 8 + [("b", "b")] * 7 + [("a", "b")] * 2 + [("b", "a")] * 3
    looks = []
    for question, pair in enumerate(verdicts):
        for judge, winner in zip(("one", "two"), pair):
            looks.append(look(question, "a", "b", (9, 1) if winner == "a" else (1, 9), judge))
    (found,) = compute(looks).agreement
    assert (found.looks, found.agreed, found.flips) == (20, 0.75, 5)
    expected = (10 / 20) * (11 / 20) + (10 / 20) * (9 / 20)
    assert found.kappa == pytest.approx((0.75 - expected) / (1 - expected))


scores = st.integers(2, 20).map(lambda half: half / 2)
tables = st.dictionaries(
    st.integers(0, 30),
    st.tuples(st.tuples(scores, scores), st.none() | st.tuples(scores, scores)),
    min_size=2,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(tables)
def test_other_names_mirror_the_figures(table):
    own = both_orders(table)
    forth, back = compare_pair(own, "a", "b"), compare_pair(own, "b", "a")
    assert forth.win_rate.value == pytest.approx(1 - back.win_rate.value)
    assert forth.win_rate.low == pytest.approx(1 - back.win_rate.high, abs=1e-9)
    assert forth.p_value == pytest.approx(back.p_value)
    assert (forth.total.wins, forth.total.ties) == (back.total.losses, back.total.ties)
    parts = forth.by_category["x"]
    assert parts == forth.total
    games = forth.total.wins + forth.total.ties + forth.total.losses + forth.total.unparsed
    assert games == len(own)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30).map(np.array))
def test_an_interval_holds_its_mean(values):
    found = bootstrap_mean(values)
    assert (
        values.min() - 1e-9 <= found.low <= found.value + 1e-9
        and found.value - 1e-9 <= found.high <= values.max() + 1e-9
    )


def test_judging_twice_makes_nothing_surer():
    """Judging each pair a second time with the same result leaves the clustered interval as it is; the naive one shrinks."""
    rng = np.random.default_rng(1)
    table = {i: ((x, 11 - x), (x, 11 - x)) for i, x in enumerate(rng.integers(1, 11, 60))}
    once = [judgment for judgment in both_orders(table) if judgment.model_a == "a"]
    twice = compare_pair(both_orders(table), "a", "b")
    alone = compare_pair(once, "a", "b")
    assert twice.win_rate == alone.win_rate
    width = lambda estimate: estimate.high - estimate.low  # noqa: E731
    assert width(twice.per_game) < 0.85 * width(twice.win_rate)


def test_the_paired_test_against_all_sign_flips():
    differences = np.array([0.3, -0.1, 0.4, 0.2, 0.5, -0.2, 0.1, 0.6])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T
    exact = (np.abs((signs * differences).mean(1)) >= abs(differences.mean()) - 1e-12).mean()
    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(np.zeros(5)) == 1.0


def test_the_number_of_questions_needed_is_that_of_the_formula():
    assert questions_needed(0.5, 1.0) == 32  # (1.96 + 0.8416)^2 / 0.25 = 31.4
    assert questions_needed(0.05, 0.35) == 385
    assert questions_needed(0.05, math.nan) == 0


def test_ratings_find_the_truth_and_stay_finite():
    """Three models 200 points apart, 500 questions; and one that wins everything."""
    rng, strength, games = np.random.default_rng(0), {"a": 1200, "b": 1000, "c": 800}, []
    for question in range(500):
        for first, second in (("a", "b"), ("b", "c"), ("c", "a")):
            wins = rng.random() < 1 / (1 + 10 ** ((strength[second] - strength[first]) / 400))
            games.append(look(question, first, second, (9, 1) if wins else (1, 9)))
    found = compute(games).ratings
    assert list(found) == ["a", "b", "c"]
    assert all(estimate.low <= strength[name] <= estimate.high for name, estimate in found.items())
    swept = compute([look(i, "a", "b", (9, 1)) for i in range(40)]).ratings
    assert swept["a"].value > 1200 and all(math.isfinite(value) for value in (swept["a"].low, swept["a"].high))


def test_length_control_takes_length_out():
    """A judge prefers longer answers and the first place; of two equally good models, one is wordier."""
    rng, looks, lengths = np.random.default_rng(0), [], {}
    for question in range(400):
        lengths[str(question), "a"], lengths[str(question), "b"] = map(int, rng.normal((800, 1100), 250))
        for first, second in (("a", "b"), ("b", "a")):
            extra = (lengths[str(question), second] - lengths[str(question), first]) / 400
            wins = rng.random() < 1 / (1 + math.exp(-(1.5 * math.tanh(extra) - 0.4)))
            looks.append(look(question, first, second, (1, 9) if wins else (9, 1)))
    (pair,) = compute(looks, lengths).pairs
    assert pair.win_rate.low > 0.55
    assert pair.controlled.win_rate.value == pytest.approx(0.5, abs=0.06)
    assert pair.controlled.length[0] > 5 * pair.controlled.length[1]
    assert pair.controlled.first[0] == pytest.approx(0.4, abs=3 * pair.controlled.first[1])
    assert pair.controlled.win_rate.low < 0.5 < pair.controlled.win_rate.high
    same = dict.fromkeys(lengths, 100)
    assert compute(looks, same).pairs[0].controlled is None


@pytest.mark.parametrize("skill, questions", [(0, 80), (1, 80), (1.6, 80), (2.2, 80), (0.3, 10), (1, 10)])
def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch, skill, questions):
    """600 simulated evaluations in both orders, from 50 : 50 to 96 : 4; benchmarks/judge.py simulates thousands."""
    monkeypatch.setattr(intervals, "RESAMPLES", 500)
    rng = np.random.default_rng(0)
    simulate = lambda n: (  # noqa: E731
        rng.normal(skill, 1, (n, 1)) + rng.normal(0, 0.6, (n, 2)) + np.array([-0.3, 0.3]) > 0
    )
    truth, held, held_per_game = simulate(1_000_000).mean(), 0, 0
    for _ in range(600):
        outcomes_Q2 = simulate(questions)
        shares, games = bootstrap_share(outcomes_Q2.mean(1), np.ones(questions)), bootstrap_mean(outcomes_Q2.ravel())
        held += shares.low <= truth <= shares.high
        held_per_game += games.low <= truth <= games.high
    assert 0.93 <= held / 600 <= 0.985
    assert held_per_game / 600 < 0.92 < held / 600


def test_without_judgments_there_are_no_figures():
    with pytest.raises(UserError, match="no judgments"):
        compute([])


def test_length_that_decides_all_is_seen():
    """Where the longer answer always wins, a fit is finite only with a penalty; and the bias must be shown, not left out."""
    looks, lengths = [], {}
    for question in range(40):
        lengths[str(question), "a"], lengths[str(question), "b"] = (
            800,
            800 + (50 + question) * (1 if question % 2 else -1),
        )
        looks += both_orders({question: (((1, 9), (1, 9)) if question % 2 else ((9, 1), (9, 1)))})
    (pair,) = compute(looks, lengths).pairs
    assert pair.controlled.length[0] > 3 and pair.controlled.win_rate.value == pytest.approx(0.5, abs=0.1)
    swept = compute(both_orders(dict.fromkeys(range(40), ((1, 9), (1, 9)))), lengths).pairs[0]
    assert 0.8 < swept.controlled.win_rate.low < swept.controlled.win_rate.value < 1


def test_judges_that_grade_alone():
    """The second judge gives every answer one point more: perfectly correlated, never equal; each has figures of its own."""
    grades = [
        Judgment(str(q), "x", "single", judge, model, None, q % 5 + more + 2 * (model == "b"), None, True, "")
        for q in range(10)
        for model in "ab"
        for judge, more in (("one", 1), ("two", 2))
    ]
    found = compute(grades)
    (agreement,) = found.score_agreement
    assert (agreement.looks, agreement.difference) == (20, 1.0) and agreement.correlation == pytest.approx(1)
    assert [each.singles[0].score.value for each in found.by_judge.values()] == [3.0, 4.0]
    assert compute(grades, to_see=1).differences[0].questions_needed == 0, "all differ by two: no spread"
