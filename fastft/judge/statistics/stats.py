"""Compute the figures of a judging run, each with its uncertainty: totals, win rates, ratings, and the judges' biases.

    figures = compute(judgments, lengths)      # everything, for `fastft.judge.report`

Intervals resample whole questions; fastft.judge.statistics.intervals says why. Judgments that could not be read are left
out of every mean, and their number is given beside it.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastft.errors import UserError
from fastft.judge.judgment import Judgment
from fastft.judge.statistics.intervals import (
    SEED,
    Interval,
    bootstrap_mean,
    bootstrap_share,
    questions_needed,
    share_by_question,
    sign_flip_p,
)

RATING_RESAMPLES = 500
RIDGE = 0.1  # penalty of the length regression: a normal prior, mean 0, standard deviation 1 / sqrt(0.1) = 3.2
# The differences that `questions_needed` is to detect, in points of win rate and of score.
POINTS, SCORE_POINTS = 5.0, 0.5
Z = 1.96  # standard errors on each side of a 95 % interval
Lengths = dict[tuple[str, str], int]  # (question, model) -> characters of the answer


@dataclass(frozen=True)
class Total:
    """Sums of scores, and how often each model won. Judgments that could not be read are counted as `unparsed` alone.

    The sums are 0 where judges gave verdicts without scores.
    """

    first_total: float
    second_total: float
    wins: int  # of the second model
    ties: int
    losses: int
    unparsed: int
    percent: float  # the second model's total in percent of the first's, as in Vicuna's table


@dataclass(frozen=True)
class LengthControl:
    """The second model's win rate if all answers were of equal length and shown in no order (Dubois et al., arXiv:2404.04475).

    From a logistic regression of its wins: log odds = quality + length x tanh(extra length of its answer / standard deviation)
    + first x (+1 if it is shown first, else -1). Standard errors are clustered by question. A ridge penalty keeps the
    coefficients finite if length decides everything.
    """

    win_rate: Interval
    quality: tuple[float, float]  # coefficient, standard error
    length: tuple[float, float]
    first: tuple[float, float] | None  # None if only one order was judged


@dataclass(frozen=True)
class Pair:
    """The comparison of two models. Rates are the second model's; a tie is half a win."""

    first: str
    second: str
    total: Total
    by_category: dict[str, Total]
    questions: int
    better_or_equal: int  # questions on which the second model has won at least half
    win_rate: Interval
    per_game: Interval  # computed as if judgments were independent, so too narrow
    p_value: float  # of the hypothesis that both are equally good, by flipping signs of questions
    controlled: LengthControl | None
    questions_needed: int  # to tell 50 % plus `Figures.to_see` points from 50 %, with a power of 80 %


@dataclass(frozen=True)
class Position:
    """Whether one judge's verdicts depend on the order of the answers, and how often the answer shown first wins."""

    one_order: bool  # whether no pair of models was shown in both orders
    both_orders: int  # pairs of answers that were judged in both
    consistent: int  # pairs of answers with the same verdict in both orders
    half_flips: int  # pairs of answers with a win in one order and a tie in the other
    flips: int  # pairs of answers with a different winner in each order
    flip_rate: Interval | None  # share of `both_orders`
    first_wins: Interval | None  # share of decisive judgments won by the answer shown first


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the same answers in the same order, of which there are `looks` cases.

    `agreed` is the share of equal verdicts, `kappa` Cohen's kappa of win, tie and loss, `flips` the number of opposite winners.
    """

    judges: tuple[str, str]
    looks: int
    agreed: float
    kappa: float
    flips: int


@dataclass(frozen=True)
class ScoreAgreement:
    """Agreement of two judges on answers judged alone: Pearson's correlation, and how much higher the second scores on
    average."""

    judges: tuple[str, str]
    looks: int
    correlation: float
    difference: float


@dataclass(frozen=True)
class Single:
    """A model's mean score, of answers judged alone."""

    model: str
    score: Interval | None
    by_category: dict[str, float]
    unparsed: int


@dataclass(frozen=True)
class Difference:
    """Mean score of `second` minus that of `first` over the questions that both have, with its permutation test."""

    first: str
    second: str
    difference: Interval
    p_value: float
    questions_needed: int


@dataclass(frozen=True)
class Figures:
    """All figures of a run.

    `to_see` is the difference to be detected by `questions_needed` questions, in points of win rate, or of score in mode
    "single". `by_judge` has the figures of each judge alone, if there are several.
    """

    models: list[str]
    judges: list[str]
    judgments: int
    unparsed: int
    flags: dict[str, int]
    to_see: float
    pairs: list[Pair] = field(default_factory=list)
    position: dict[str, Position] = field(default_factory=dict)  # by judge
    ratings: dict[str, Interval] = field(default_factory=dict)  # on the Elo scale, with mean 1000
    agreement: list[Agreement] = field(default_factory=list)
    score_agreement: list[ScoreAgreement] = field(default_factory=list)
    singles: list[Single] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    by_judge: dict[str, "Figures"] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    """How often each reason was given for which there is no reply, in the endpoint's words; the most frequent first."""


def compute(judgments: Sequence[Judgment], lengths: Lengths | None = None, to_see: float | None = None) -> Figures:
    """Return all figures of a run. Length-controlled win rates need `lengths`. Raises UserError without judgments."""
    if not judgments:
        raise UserError("there are no judgments")
    pairwise = [j for j in judgments if j.mode == "pairwise"]
    single = [j for j in judgments if j.mode == "single"]
    names = list(dict.fromkeys(name for j in judgments for name in (j.model_a, j.model_b) if name))
    judges = list(dict.fromkeys(j.judge for j in judgments))
    pairs = _first_orders(pairwise)
    to_see = to_see or (POINTS if pairwise else SCORE_POINTS)
    both = list(itertools.combinations(judges, 2))
    return Figures(
        models=names,
        judges=judges,
        judgments=len(judgments),
        unparsed=sum(not j.parsed for j in judgments),
        flags=dict(Counter(flag for judgment in judgments for flag in judgment.flags)),
        failures=dict(Counter(judgment.failure for judgment in judgments if judgment.failure).most_common()),
        to_see=to_see,
        pairs=[compare_pair(pairwise, first, second, lengths, to_see) for first, second in pairs],
        position={judge: position([j for j in pairwise if j.judge == judge]) for judge in judges} if pairwise else {},
        ratings=ratings(pairwise) if pairs else {},
        agreement=[agreement(pairwise, *judges) for judges in both if pairwise],
        score_agreement=[score_agreement(single, *judges) for judges in both if single],
        singles=[grade(single, name) for name in names] if single else [],
        differences=[difference(single, *models, to_see) for models in itertools.combinations(names, 2) if single],
        by_judge={j: compute([each for each in judgments if each.judge == j], lengths, to_see) for j in judges if both},
    )


def _first_orders(pairwise: list[Judgment]) -> list[tuple[str, str]]:
    """Return each pair of models once, in the order in which it was shown first."""
    orders: dict[frozenset[str | None], tuple] = {}
    for judgment in pairwise:
        orders.setdefault(frozenset((judgment.model_a, judgment.model_b)), (judgment.model_a, judgment.model_b))
    return list(orders.values())


def compare_pair(
    judgments: Iterable[Judgment], first: str, second: str, lengths: Lengths | None = None, to_see: float = POINTS
) -> Pair:
    """Compare two models by the judgments about them, in whichever order they were shown."""
    own = [j for j in judgments if {j.model_a, j.model_b} == {first, second}]
    by_category = defaultdict(list)
    for judgment in own:
        by_category[judgment.category].append(judgment)
    parsed = [j for j in own if j.parsed]
    outcomes_G = np.array([outcome(j, second) for j in parsed])
    outcomes_Q = by_question(parsed, lambda j: outcome(j, second))
    spread = float(np.std(outcomes_Q, ddof=1)) if len(outcomes_Q) > 1 else math.nan
    return Pair(
        first=first,
        second=second,
        total=total(own, first),
        by_category={category: total(those, first) for category, those in by_category.items()},
        questions=len(outcomes_Q),
        better_or_equal=int((outcomes_Q >= 0.5).sum()),
        win_rate=bootstrap_share(outcomes_Q, np.ones(len(outcomes_Q))),
        per_game=bootstrap_mean(outcomes_G),
        p_value=sign_flip_p(outcomes_Q - 0.5),
        controlled=length_control(parsed, first, second, lengths) if lengths else None,
        questions_needed=questions_needed(to_see / 100, spread),
    )


def total(judgments: Iterable[Judgment], first: str) -> Total:
    """Return sums of scores and counts of wins over judgments of two models, of which `first` is one."""
    sums, wins, ties, losses, unparsed = [0.0, 0.0], 0, 0, 0, 0
    for judgment in judgments:
        if not judgment.parsed:
            unparsed += 1
            continue
        if not judgment.verdict:
            scores = (judgment.score_a, judgment.score_b)
            own, other = scores if judgment.model_a == first else scores[::-1]
            sums[0], sums[1] = sums[0] + own, sums[1] + other
        tied, lost = judgment.winner == "tie", judgment.winner == first
        wins, ties, losses = wins + (not tied and not lost), ties + tied, losses + lost
    return Total(*sums, wins, ties, losses, unparsed, 100 * sums[1] / sums[0] if sums[0] else math.nan)


def outcome(judgment: Judgment, model: str) -> float:
    """Return 1 if `model` won, 0 if it lost, 0.5 for a tie."""
    return 0.5 if judgment.winner == "tie" else float(judgment.winner == model)


def by_question(judgments: Iterable[Judgment], value: Callable[[Judgment], float]) -> np.ndarray:
    """Return the mean `value` of each question's judgments [Q]."""
    values = defaultdict(list)
    for judgment in judgments:
        values[judgment.question_id].append(value(judgment))
    return np.array([np.mean(those) for those in values.values()])


def length_control(judgments: list[Judgment], first: str, second: str, lengths: Lengths) -> LengthControl | None:
    """Fit the regression of `LengthControl` to the judgments of two models.

    Returns None with fewer than ten judgments of answers whose lengths are known, or if all differences of length are the
    same. One question won and one lost at equal length are added, as in `bootstrap_share`, so that a model that wins
    everything has a finite rate, too.
    """
    own = [j for j in judgments if (j.question_id, first) in lengths and (j.question_id, second) in lengths]
    extra_G = np.array([lengths[j.question_id, second] - lengths[j.question_id, first] for j in own], float)
    places_G = np.array([1.0 if j.model_a == second else -1.0 for j in own])
    if len(own) < 10 or not extra_G.std():
        return None
    both = abs(places_G.mean()) < 1
    added = [(won, place) for won in (1.0, 0.0) for place in (sorted({*places_G}) if both else [0.0])]
    outcomes_G = np.array([*(outcome(j, second) for j in own), *(won for won, _ in added)])
    columns_GC = [np.ones(len(outcomes_G)), np.append(np.tanh(extra_G / extra_G.std()), np.zeros(len(added)))]
    if both:
        columns_GC.append(np.append(places_G, [place for _, place in added]))
    design_GC = np.stack(columns_GC, 1)
    if np.linalg.matrix_rank(design_GC) < len(columns_GC):
        return None
    groups_G = np.unique(
        [*(f"q{j.question_id}" for j in own), *(f"added {won}" for won, _ in added)], return_inverse=True
    )[1]
    values_C, errors_C = ridge_logistic(design_GC, outcomes_G, groups_G)
    found = list(zip(values_C.tolist(), errors_C.tolist()))
    quality, error = found[0]
    rate = [1 / (1 + math.exp(-each)) for each in (quality, quality - Z * error, quality + Z * error)]
    return LengthControl(Interval(*rate), found[0], found[1], found[2] if both else None)


def ridge_logistic(
    design_GC: np.ndarray, outcomes_G: np.ndarray, groups_G: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a logistic regression by Newton's method; the ridge penalty holds all coefficients but the first towards 0.

    Returns the coefficients [C] and their standard errors clustered by group [C].
    """
    penalty_CC = np.diag([0.0] + [RIDGE] * (design_GC.shape[1] - 1))
    values_C = np.zeros(design_GC.shape[1])
    for _ in range(100):
        rates_G = 1 / (1 + np.exp(-design_GC @ values_C))
        hessian_CC = (design_GC * (rates_G * (1 - rates_G))[:, None]).T @ design_GC + penalty_CC
        step_C = np.linalg.solve(hessian_CC, design_GC.T @ (outcomes_G - rates_G) - penalty_CC @ values_C)
        values_C += step_C
        if abs(step_C).max() < 1e-8:
            break
    scores_QC = np.zeros((groups_G.max() + 1, len(values_C)))
    np.add.at(scores_QC, groups_G, design_GC * (outcomes_G - rates_G)[:, None])
    bread_CC = np.linalg.inv(hessian_CC)
    return values_C, np.sqrt(np.diag(bread_CC @ (scores_QC.T @ scores_QC) @ bread_CC))


def position(judgments: Iterable[Judgment]) -> Position:
    """Compare one judge's verdicts on the same two answers in both orders, and count the wins of the answer shown first."""
    looks: dict[tuple, dict[str, str]] = defaultdict(dict)
    decisive: list[Judgment] = []
    shown = set()
    for judgment in judgments:
        shown.add((judgment.model_a, judgment.model_b))
        if judgment.parsed:
            key = judgment.question_id, judgment.turn, frozenset((judgment.model_a, judgment.model_b))
            looks[key][judgment.model_a] = judgment.winner
            if judgment.winner != "tie":
                decisive.append(judgment)
    both = [(key[0], *winners.values()) for key, winners in looks.items() if len(winners) == 2]
    consistent = sum(one == other for _, one, other in both)
    flips = [(question, one != other and "tie" not in (one, other)) for question, one, other in both]
    flipped = sum(flip for _, flip in flips)
    first = share_by_question((j.question_id, j.winner == j.model_a) for j in decisive)
    one_order = not any((second, first) in shown for first, second in shown)
    return Position(
        one_order=one_order,
        both_orders=len(both),
        consistent=consistent,
        half_flips=len(both) - consistent - flipped,
        flips=flipped,
        flip_rate=share_by_question(flips),
        first_wins=first,
    )


def agreement(judgments: Iterable[Judgment], one: str, other: str) -> Agreement:
    """Compare two judges on the same answers in the same order, if both judgments could be read."""
    verdicts: dict[str, dict[tuple, str]] = {one: {}, other: {}}
    for j in judgments:
        if j.parsed and j.model_b and j.judge in verdicts:
            place = "tie" if j.winner == "tie" else "first" if j.winner == j.model_a else "second"
            verdicts[j.judge][j.question_id, j.turn, j.model_a, j.model_b] = place
    shared = [(verdicts[one][key], verdicts[other][key]) for key in verdicts[one] if key in verdicts[other]]
    agreed = sum(a == b for a, b in shared) / len(shared) if shared else math.nan
    labels = ("first", "tie", "second")
    marginals = [[sum(pair[i] == label for pair in shared) / max(len(shared), 1) for label in labels] for i in (0, 1)]
    expected = sum(a * b for a, b in zip(*marginals))
    kappa = (agreed - expected) / (1 - expected) if expected < 1 else 1.0
    return Agreement((one, other), len(shared), agreed, kappa, sum({a, b} == {"first", "second"} for a, b in shared))


def score_agreement(judgments: Iterable[Judgment], one: str, other: str) -> ScoreAgreement:
    """Compare two judges on the answers that both have scored. The correlation is NaN if one always gives the same score."""
    scores: dict[str, dict[tuple, float]] = {one: {}, other: {}}
    for j in judgments:
        if j.parsed and j.judge in scores:
            scores[j.judge][j.question_id, j.turn, j.model_a] = j.score_a
    shared = [(scores[one][key], scores[other][key]) for key in scores[one] if key in scores[other]]
    ones, others = zip(*shared) if shared else ((), ())
    varied = len({*ones}) > 1 and len({*others}) > 1
    correlation = float(np.corrcoef(ones, others)[0, 1]) if varied else math.nan
    difference = float(np.mean(others) - np.mean(ones)) if shared else math.nan
    return ScoreAgreement((one, other), len(shared), correlation, difference)


def ratings(judgments: Iterable[Judgment]) -> dict[str, Interval]:
    """Return Bradley-Terry ratings over all pairs, on the Elo scale with mean 1000, the best model first.

    A tie is half a win for each; intervals resample questions. One tie is added to each pair that was compared, because a
    model that won everything would have no finite rating otherwise.
    """
    from evalica import Winner, bradley_terry

    games = [j for j in judgments if j.parsed]
    if not games:
        return {}
    names = sorted({name for j in games for name in (j.model_a, j.model_b)})
    question_G = np.unique([j.question_id for j in games], return_inverse=True)[1]
    winners = [Winner.Draw if j.winner == "tie" else Winner.X if j.winner == j.model_a else Winner.Y for j in games]
    firsts, seconds = [j.model_a for j in games], [j.model_b for j in games]
    ties = sorted({tuple(sorted((j.model_a, j.model_b))) for j in games})
    firsts, seconds = [*firsts, *(one for one, _ in ties)], [*seconds, *(other for _, other in ties)]
    winners += [Winner.Draw] * len(ties)

    def solve(weights_G: np.ndarray) -> np.ndarray:
        weights = [*weights_G.tolist(), *[1.0] * len(ties)]
        scores = bradley_terry(firsts, seconds, winners, weights=weights, limit=1000).scores
        logs_M = np.log10([scores[name] for name in names])
        return 1000 + 400 * (logs_M - logs_M.mean())

    questions, rng = question_G.max() + 1, np.random.default_rng(SEED)
    drawn_BQ = rng.multinomial(questions, np.full(questions, 1 / questions), RATING_RESAMPLES).astype(float)
    middle_M = solve(np.ones(len(games)))
    low_M, high_M = np.percentile([solve(drawn_Q[question_G]) for drawn_Q in drawn_BQ], [2.5, 97.5], axis=0)
    found = {name: Interval(*map(float, values)) for name, *values in zip(names, middle_M, low_M, high_M)}
    return dict(sorted(found.items(), key=lambda item: -item[1].value))


def grade(judgments: Iterable[Judgment], model: str) -> Single:
    """Return the mean scores of one model's answers, each judged alone."""
    own = [j for j in judgments if j.model_a == model]
    parsed, by_category = [j for j in own if j.parsed], defaultdict(list)
    for judgment in parsed:
        by_category[judgment.category].append(judgment.score_a)
    score = bootstrap_mean(by_question(parsed, lambda j: j.score_a)) if parsed else None
    return Single(model, score, {c: float(np.mean(s)) for c, s in by_category.items()}, len(own) - len(parsed))


def difference(judgments: Iterable[Judgment], first: str, second: str, to_see: float = SCORE_POINTS) -> Difference:
    """Compare the mean scores of two models on the questions that both have answered."""
    scores: dict[str, dict[str, list[float]]] = {first: defaultdict(list), second: defaultdict(list)}
    for j in judgments:
        if j.parsed and j.model_a in scores:
            scores[j.model_a][j.question_id].append(j.score_a)
    shared = [question for question in scores[first] if question in scores[second]]
    differences_Q = np.array([np.mean(scores[second][q]) - np.mean(scores[first][q]) for q in shared])
    spread = float(np.std(differences_Q, ddof=1)) if len(shared) > 1 else math.nan
    needed = questions_needed(to_see, spread)
    return Difference(first, second, bootstrap_mean(differences_Q), sign_flip_p(differences_Q), needed)
