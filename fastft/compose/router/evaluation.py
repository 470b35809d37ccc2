"""Compute all figures of a router on outcomes that it has not seen.

    outcomes, sets = read_with_sets(["test.jsonl"])
    made = evaluate(Router.load("routers/expert"), outcomes, sets)
    made.gain                                                   # Interval: the router minus the best single model

What counts is `correct` where the outcomes have it, else the rewards; between 0 and 1 it is written in points of 100. A set is
a query's first tag, or its file if it has no tag. The mean is that over sets, each set counting the same.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastft.common.records import repair_text
from fastft.compose.blend import BlendPolicy
from fastft.compose.router.leaks import shared_runs
from fastft.compose.router.measures import (
    Curve,
    SetMeans,
    area_under,
    calibration_error,
    calls_for_half,
    confusion,
    rank_and_uplift,
    rank_and_uplift_of_model,
    strong_calls,
    weights_of,
)
from fastft.compose.router.outcomes import Outcomes, read_outcomes
from fastft.compose.router.router import Router, Scores
from fastft.data.conversation import Conversation
from fastft.errors import UserError
from fastft.judge.statistics.intervals import Interval

logger = logging.getLogger(__name__)

SETTINGS = 40
"""Settings of usd_weight or margin that a curve tries; those that choose the same are drawn once."""
TAG_QUERIES, TAGS_SHOWN = 20, 50
"""A tag gets a row of its own from so many queries; the most frequent ones are shown."""
NAMED = 5
"""Missing scores, shared texts and unknown names that are named, at most."""


@dataclass
class System:
    """One way to choose a model for each query, and what it scored."""

    name: str
    says: str
    """What it is, in a few words."""
    mean: Interval
    by_set: dict[str, float]
    router_minus_it: Interval | None
    """None for the router itself."""
    share_of_gap: Interval | None
    """How far it goes from the best single model (0) to the oracle (1)."""
    mean_task_rank: float
    uplift: float
    usd: float | None = None
    """Dollars per 1,000 queries."""


@dataclass
class Tag:
    """How the router does on the queries with one tag, or of one set."""

    name: str
    queries: int
    router: float
    best_single: float
    gain: Interval
    best: str
    """The model that is best on these queries, in hindsight, and its score."""
    best_score: float
    chosen: dict[str, int]


@dataclass
class Pair:
    """RouteLLM's figures: queries are sent to a strong model instead of a weak one, in the order of the router's preference.

    APGR is the share of the gap between the two that is recovered, as the mean over all shares of calls to the strong model
    (arXiv 2406.18665); a random order has 0.5. `calls_for_half` is the smallest share of calls that recovers half.
    """

    weak: str
    strong: str
    apgr: Interval
    calls_for_half: float | None


@dataclass
class LeftOut:
    """A set on which a router was evaluated that was trained without it."""

    set: str
    trained_on: int
    queries: int
    router: float
    best_single: str
    best_single_score: float
    gain: Interval


@dataclass
class Example:
    set: str
    query: str
    chosen: str
    score: float
    default: str
    default_score: float
    best: str
    best_score: float
    values: dict[str, float]


@dataclass
class Evaluation:
    """All figures of an evaluation, in points (`unit`) except where a share is meant."""

    unit: str
    measure: str
    candidates: list[str]
    default: str
    queries: int
    sets: dict[str, int]
    systems: list[System]
    """The router first, then the baselines, the models alone, and the oracle last."""
    gain: Interval
    by_set: list[Tag]
    by_tag: list[Tag]
    curve: Curve
    pair: Pair | None
    confusion: list[list[float]]
    drawn_blend: dict[str, float]
    left_to_default: float
    """The share of queries that the default answers."""
    calibration_error: float | None
    cost_of_best_single: Interval | None
    leaks: dict[str, Any] | None
    without_leaks: dict[str, Any] | None
    remarks: list[str]
    examples: dict[str, list[Example]]
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def router(self) -> System:
        return self.systems[0]

    def system(self, name: str) -> System:
        return next(each for each in self.systems if each.name == name)


def read_with_sets(paths: Sequence[str]) -> tuple[Outcomes, list[str]]:
    """The outcomes of all files, and the set of each query: its first tag, or the name of its file if it has no tag."""
    outcomes = read_outcomes(paths)
    if all(outcomes.tags):
        return outcomes, [tags[0] for tags in outcomes.tags]
    files = [Path(path).name.split(".")[0] for path in paths for _ in range(len(read_outcomes([path])))]
    return outcomes, [tags[0] if tags else file for tags, file in zip(outcomes.tags, files)]


def evaluate(
    router: Router, outcomes: Outcomes, sets: Sequence[str], usd_weight: float = 0.0, margin: float | None = None
) -> Evaluation:
    """Compute all figures. Raises UserError if the outcomes lack a candidate, or every query lacks a score."""
    outcomes, remarks = of_candidates(outcomes, router.candidates)
    outcomes, sets, more = whole_rows(outcomes, sets)
    remarks += more
    values = router.scores(outcomes.queries)
    chosen_N = router.choose(values, usd_weight, margin)
    measure_NM = outcomes.measure
    points = 100.0 if measure_NM.min() >= 0 and measure_NM.max() <= 1 else 1.0
    scores_NM, default = points * measure_NM, router.candidates.index(router.default)
    weights_N = weights_of(sets)

    columns = _Columns(scores_NM, _usd_table(router, outcomes), router.candidates)
    columns.add_choice("router", f"by its {router.rule}", chosen_N)
    columns.add_choice("best single", f"{router.default}, chosen in training", np.full(len(sets), default))
    columns.add("uniform blend", "one of the models, drawn: the mean of all", scores_NM.mean(1), columns.mean_usd())
    for name, says, choice_N in _baselines(router, outcomes, sets):
        columns.add_choice(name, says, choice_N)
    for number, name in enumerate(router.candidates):
        columns.add_choice(alone(name), "", np.full(len(sets), number))
    columns.add_choice("oracle", "the best model of each query, which nobody knows before", _oracle(columns))
    extra = _Extra(columns, weights_N)
    curve_columns = _curve_columns(router, values, columns, margin, extra)
    pair_columns = _pair_columns(router, values, columns, extra)
    usd_columns = [extra.add(usd_N) for usd_N in columns.usd.values()] if columns.usd_NM is not None else []

    means = SetMeans(np.column_stack([*columns.scores.values(), *extra.columns]), sets, outcomes.queries)
    systems = _systems(columns, means, usd_columns)
    leaks, without = _leaks(router, outcomes, sets, chosen_N, scores_NM, default)
    single = list(columns.scores).index("best single")
    drawn = _drawn_blend(outcomes, scores_NM, weights_N)
    if short := [name for name, count in zip(means.sets, means.counts) if count < TAG_QUERIES]:
        remarks.append(
            f"{len(short)} of {len(means.sets)} sets have fewer than {TAG_QUERIES} queries ({_some(short)}), and count as much "
            "in the mean as the others."
        )
    return Evaluation(
        unit="points of 100" if points == 100 else "points of the rewards",
        measure="correct" if outcomes.correct is not None else "rewards",
        candidates=router.candidates,
        default=router.default,
        queries=len(outcomes),
        sets=dict(zip(means.sets, means.counts.tolist())),
        systems=systems,
        gain=means.difference(0, single),
        by_set=[_tag(name, [s == name for s in sets], outcomes, chosen_N, scores_NM, default) for name in means.sets],
        by_tag=_tags(outcomes, chosen_N, scores_NM, default),
        curve=_curve(curve_columns, means, columns),
        pair=_pair(pair_columns, means),
        confusion=confusion(chosen_N, scores_NM).round(3).tolist(),
        drawn_blend=drawn,
        left_to_default=float(weights_N @ (chosen_N == default)),
        calibration_error=calibration_error(values.success.ravel(), measure_NM.ravel()) if points == 100 else None,
        cost_of_best_single=means.ratio(usd_columns[0], usd_columns[single]) if usd_columns else None,
        leaks=leaks,
        without_leaks=without,
        remarks=remarks,
        examples=_examples(router, outcomes, sets, values, chosen_N, scores_NM),
    )


# --- What is evaluated ------------------------------------------------------------------------------------------------


def of_candidates(outcomes: Outcomes, candidates: Sequence[str]) -> tuple[Outcomes, list[str]]:
    """The outcomes of the router's candidates, in its order. Raises UserError if one is missing."""
    if missing := [name for name in candidates if name not in outcomes.models]:
        raise UserError(
            f"this router chooses among {_some(candidates, 10)}; the outcomes have no scores of {_some(missing)} (they have "
            f"{_some(outcomes.models, 10)}): score its candidates, or train a router for these models"
        )
    others = [name for name in outcomes.models if name not in candidates]
    places = [outcomes.models.index(name) for name in candidates]
    kept = {
        name: None if (table := getattr(outcomes, name)) is None else table[:, places]
        for name in ("rewards", "correct", "usd")
    }
    remarks = [f"Left out, because the router cannot choose them: {_some(others, 10)}."] if others else []
    return replace(outcomes, models=list(candidates), **kept), remarks


def whole_rows(outcomes: Outcomes, sets: Sequence[str]) -> tuple[Outcomes, list[str], list[str]]:
    """The queries that have a score of every model; what is left out is named. Raises UserError if nothing is left."""
    lacking_NM = np.isnan(outcomes.measure)
    if not lacking_NM.any():
        return outcomes, list(sets), []
    name = "rewards" if outcomes.correct is None else "correct"
    rows = np.flatnonzero(lacking_NM.any(1))
    models = ", ".join(f"{m} {count:,}" for m, count in outcomes.missing(name).items())
    if len(rows) == len(outcomes):
        raise UserError(
            f"no query has {name} of every candidate (missing: {models}); a router is compared on queries that all of them "
            "answered"
        )
    remark = (
        f"{len(rows):,} of {len(outcomes):,} queries are left out, because {name} of a model are missing there ({models}): "
        f"{_some([outcomes.ids[row] for row in rows])}."
    )
    logger.warning("%s", remark)
    keep = np.flatnonzero(~lacking_NM.any(1))
    return outcomes.select(keep), [sets[row] for row in keep], [remark]


def _usd_table(router: Router, outcomes: Outcomes) -> np.ndarray | None:
    """Dollars of each answer [N, M]: the outcomes' own; where these are missing, the means that the router knows."""
    if router.usd is None and outcomes.usd is None:
        return None
    known = outcomes.usd if outcomes.usd is not None else np.full(outcomes.rewards.shape, np.nan)
    if router.usd is not None:
        means_M = np.array([router.usd[name] for name in router.candidates])
    else:
        means_M = np.nanmean(known, 0)
    return np.where(np.isnan(known), means_M, known)


def _some(names: Sequence[str], count: int = NAMED) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


# --- Systems ----------------------------------------------------------------------------------------------------------


def alone(model: str) -> str:
    """The name of a system that always chooses this model; no model's name is a baseline's."""
    return f"{model} alone"


class _Columns:
    """Collects what every system scored on each query, and what it cost."""

    def __init__(self, scores_NM: np.ndarray, usd_NM: np.ndarray | None, models: list[str]):
        self.scores_NM, self.usd_NM, self.models = scores_NM, usd_NM, models
        self.rows = np.arange(len(scores_NM))
        self.says: dict[str, str] = {}
        self.scores: dict[str, np.ndarray] = {}
        self.usd: dict[str, np.ndarray] = {}

    def add_choice(self, name: str, says: str, chosen_N: np.ndarray) -> None:
        usd_N = None if self.usd_NM is None else self.usd_NM[self.rows, chosen_N]
        self.add(name, says, self.scores_NM[self.rows, chosen_N], usd_N)

    def add(self, name: str, says: str, scores_N: np.ndarray, usd_N: np.ndarray | None) -> None:
        self.says[name], self.scores[name] = says, scores_N
        if usd_N is not None:
            self.usd[name] = 1000 * usd_N

    def mean_usd(self) -> np.ndarray | None:
        return None if self.usd_NM is None else self.usd_NM.mean(1)


class _Extra:
    """Columns beside the systems' that are resampled with them; `add` returns their place."""

    def __init__(self, systems: _Columns, weights_N: np.ndarray):
        self.first, self.columns, self.weights_N = len(systems.scores), [], weights_N

    def add(self, column_N: np.ndarray) -> int:
        self.columns.append(column_N)
        return self.first + len(self.columns) - 1


def _oracle(columns: _Columns) -> np.ndarray:
    """The best model of each query; of several the cheapest."""
    best_NM = columns.scores_NM >= columns.scores_NM.max(1, keepdims=True) - 1e-9
    usd_NM = np.zeros_like(columns.scores_NM) if columns.usd_NM is None else columns.usd_NM
    return np.where(best_NM, usd_NM, np.inf).argmin(1)


def _baselines(router: Router, outcomes: Outcomes, sets: Sequence[str]) -> list[tuple[str, str, np.ndarray]]:
    """(name, what it is, chosen model of each query) of what was trained beside the router."""
    return []


def _systems(columns: _Columns, means: SetMeans, usd_columns: list[int]) -> list[System]:
    names = list(columns.scores)
    single, oracle = names.index("best single"), names.index("oracle")
    first = names.index(alone(columns.models[0]))
    models_SM = means.by_set_SK[:, first : first + len(columns.models)]
    made = []
    for place, name in enumerate(names):
        is_model = first <= place < first + len(columns.models)
        if is_model or name == "best single":
            model = place - first if is_model else columns.models.index(columns.says[name].split(",")[0])
            rank, uplift = rank_and_uplift_of_model(model, models_SM)
        else:
            rank, uplift = rank_and_uplift(means.by_set_SK[:, place], models_SM)
        made.append(
            System(
                name=name,
                says=columns.says[name],
                mean=means.mean(place),
                by_set=dict(zip(means.sets, means.by_set_SK[:, place].tolist())),
                router_minus_it=means.difference(0, place) if place else None,
                share_of_gap=means.share(place, single, oracle),
                mean_task_rank=rank,
                uplift=uplift,
                usd=float(means.mean_K[usd_columns[place]]) if usd_columns else None,
            )
        )
    return made


def _drawn_blend(outcomes: Outcomes, scores_NM: np.ndarray, weights_N: np.ndarray) -> dict[str, float]:
    """What a uniform blend scores if it is drawn once, as the gateway would, beside the mean of its models.

    On single questions its expectation is that mean; the draw's standard error is that of one draw a query.
    """
    blend = BlendPolicy("evaluation", dict.fromkeys(outcomes.models, 1.0))
    drawn = [blend.choose(Conversation(identity, []), 1, outcomes.models).model for identity in outcomes.ids]
    scores_N = scores_NM[np.arange(len(drawn)), [outcomes.models.index(model) for model in drawn]]
    return {
        "drawn": float(weights_N @ scores_N),
        "mean_of_models": float(weights_N @ scores_NM.mean(1)),
        "standard_error": float(np.sqrt(weights_N**2 @ scores_NM.var(1))),
    }


def _tag(
    name: str,
    has_it: Sequence[bool],
    outcomes: Outcomes,
    chosen_N: np.ndarray,
    scores_NM: np.ndarray,
    default: int,
) -> Tag:
    rows = np.flatnonzero(has_it)
    own_NM = scores_NM[rows]
    router_N, single_N = own_NM[np.arange(len(rows)), chosen_N[rows]], own_NM[:, default]
    means = SetMeans((router_N - single_N)[:, None], [name] * len(rows), [outcomes.queries[row] for row in rows])
    best = int(own_NM.mean(0).argmax())
    counts = Counter(outcomes.models[choice] for choice in chosen_N[rows])
    return Tag(
        name=name,
        queries=len(rows),
        router=float(router_N.mean()),
        best_single=float(single_N.mean()),
        gain=means.mean(0),
        best=outcomes.models[best],
        best_score=float(own_NM.mean(0)[best]),
        chosen=dict(counts.most_common()),
    )


def _tags(outcomes: Outcomes, chosen_N: np.ndarray, scores_NM: np.ndarray, default: int) -> list[Tag]:
    """The tags with enough queries, the most frequent first; none if every query has its set as its only tag."""
    if all(len(tags) < 2 for tags in outcomes.tags):
        return []
    counts = Counter(tag for tags in outcomes.tags for tag in tags)
    shown = [tag for tag, count in counts.most_common(TAGS_SHOWN) if count >= TAG_QUERIES]
    return [_tag(tag, [tag in tags for tags in outcomes.tags], outcomes, chosen_N, scores_NM, default) for tag in shown]


# --- Curves -----------------------------------------------------------------------------------------------------------


@dataclass
class _CurveColumns:
    by: str
    settings: list[float]
    x: list[float]
    columns: list[int]
    area: tuple[int, int] | None
    """Places of the area's numerator and denominator."""
    area_says: str


def _curve_columns(
    router: Router, values: Scores, columns: _Columns, margin: float | None, extra: _Extra
) -> _CurveColumns:
    """Add what the router scores at each setting to the columns: by usd_weight if it knows prices, else by margin."""
    value_NM = getattr(values, router.rule)
    default = router.candidates.index(router.default)
    if router.usd is not None:
        usd_M = np.array([router.usd[name] for name in router.candidates])
        scale = (value_NM.max() - value_NM.min()) / max(usd_M.max() - usd_M.min(), 1e-12)
        settings = [0.0, *(scale * np.geomspace(1e-3, 1e3, SETTINGS)).tolist()]
        choices = [router.choose(values, weight, margin) for weight in settings]
    else:
        lead_N = (value_NM - value_NM[:, [default]]).max(1)
        settings = sorted(
            {0.0, *np.quantile(lead_N, np.linspace(0, 1, SETTINGS)).tolist(), np.nextafter(lead_N.max(), 9)}
        )
        choices = [router.choose(values, 0.0, each) for each in settings]
    different = [0] + [i for i in range(1, len(choices)) if (choices[i] != choices[i - 1]).any()]
    points = []
    for i in different:
        score_N = columns.scores_NM[columns.rows, choices[i]]
        x_N = 1000 * columns.usd_NM[columns.rows, choices[i]] if router.usd is not None else choices[i] != default
        points.append((float(extra.weights_N @ x_N), settings[i], score_N))
    points.sort(key=lambda point: point[0])
    x, scores = [point[0] for point in points], [point[2] for point in points]
    area, says = _area(router, columns, x, scores, extra)
    by = "usd_weight" if router.usd is not None else "margin"
    return _CurveColumns(
        by, [float(point[1]) for point in points], x, [extra.add(score) for score in scores], area, says
    )


def _area(
    router: Router, columns: _Columns, x: list[float], scores: list[np.ndarray], extra: _Extra
) -> tuple[tuple[int, int] | None, str]:
    """Places of the two columns whose ratio is the area under the curve, and what the area means."""
    single_N = columns.scores["best single"]
    if router.usd is None:
        area_N = np.tensordot(area_under(x), np.array(scores), 1) - single_N
        says = (
            "the share of the oracle's gap that the router closes, as the mean over all shares of queries that may leave the "
            "best single model"
        )
        return (extra.add(area_N), extra.add(columns.scores["oracle"] - single_N)), says
    costs = {name: float(extra.weights_N @ columns.usd[alone(name)]) for name in router.candidates}
    cheapest = min(costs, key=costs.__getitem__)
    low, high = costs[cheapest], costs[router.default]
    if high <= low:
        return None, f"not defined: the best single model, {router.default}, is the cheapest"
    cheap_N = columns.scores[alone(cheapest)]
    area_N = np.tensordot(area_under([(each - low) / (high - low) for each in x]), np.array(scores), 1) - cheap_N
    says = (
        f"the share of the gap between {cheapest}, the cheapest, and {router.default}, the best single, that the router closes, "
        "as the mean over all budgets between the costs of the two; drawing one of the two at random has 0.5"
    )
    return (extra.add(area_N), extra.add(single_N - cheap_N)), says


def _curve(drawn: _CurveColumns, means: SetMeans, columns: _Columns) -> Curve:
    area = means.ratio(*drawn.area) if drawn.area else None
    says = drawn.area_says
    if drawn.area and area is None:
        says = "not defined: on these queries the better end of the curve is not clearly better"
    return Curve(drawn.by, drawn.settings, drawn.x, [means.mean(column) for column in drawn.columns], area, says)


def _pair_columns(
    router: Router, values: Scores, columns: _Columns, extra: _Extra
) -> tuple[str, str, int, int, float | None] | None:
    """(weak, strong, places of APGR's numerator and denominator, calls for half) for the best single model and a weak one.

    The weak one is the cheapest, or the one with the lowest score here if there are no prices. None if there is no gap.
    """
    scores = {name: float(extra.weights_N @ columns.scores[alone(name)]) for name in router.candidates}
    costs = (
        {name: float(extra.weights_N @ columns.usd[alone(name)]) for name in router.candidates}
        if columns.usd
        else scores
    )
    weak, strong = min(costs, key=costs.__getitem__), router.default
    if scores[strong] <= scores[weak]:
        return None
    value_NM = getattr(values, router.rule)
    preference_N = value_NM[:, router.candidates.index(strong)] - value_NM[:, router.candidates.index(weak)]
    gain_N = columns.scores[alone(strong)] - columns.scores[alone(weak)]
    half = calls_for_half(preference_N, gain_N, extra.weights_N)
    share_N = strong_calls(preference_N, extra.weights_N)
    return weak, strong, extra.add(share_N * gain_N), extra.add(gain_N), half


def _pair(found: tuple[str, str, int, int, float | None] | None, means: SetMeans) -> Pair | None:
    if found is None or (apgr := means.ratio(found[2], found[3])) is None:
        return None
    return Pair(found[0], found[1], apgr, found[4])


# --- Leaks and leaving sets out ---------------------------------------------------------------------------------------


def _leaks(
    router: Router, outcomes: Outcomes, sets: Sequence[str], chosen_N: np.ndarray, scores_NM: np.ndarray, default: int
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(queries that share text with training queries, the figures without them); None where there is nothing to say."""
    if not len(router.runs):
        return None, None
    shared = shared_runs(outcomes.queries, router.runs)
    rows = [row for row, run in enumerate(shared) if run is not None]
    leaks = {
        "queries": len(rows),
        "by_set": dict(Counter(sets[row] for row in rows).most_common()),
        "runs": dict(Counter(shared[row] for row in rows).most_common(NAMED)),
        "ids": [outcomes.ids[row] for row in rows],
    }
    keep = [row for row, run in enumerate(shared) if run is None]
    if not rows or not keep:
        return leaks, None
    own_NM = scores_NM[keep]
    pair_NK = np.column_stack([own_NM[np.arange(len(keep)), chosen_N[keep]], own_NM[:, default]])
    means = SetMeans(pair_NK, [sets[row] for row in keep], [outcomes.queries[row] for row in keep])
    return leaks, {
        "queries": len(keep),
        "mean": float(means.mean_K[0]),
        "best_single": float(means.mean_K[1]),
        "gain_over_best_single": _three(means.difference(0, 1)),
    }


def leave_one_out(router: Router, outcomes: Outcomes, sets: Sequence[str], paths: Sequence[str]) -> list[LeftOut]:
    """Train a router without each set, by this router's settings, and evaluate it on that set.

    Raises UserError if the training outcomes have none of the sets.
    """
    from fastft.compose.router.train import TrainSettings, train_router

    training, training_sets = read_with_sets(paths)
    training, _ = of_candidates(training, router.candidates)
    outcomes, _ = of_candidates(outcomes, router.candidates)
    outcomes, sets, _ = whole_rows(outcomes, sets)
    known = list(dict.fromkeys(training_sets))
    names = [name for name in dict.fromkeys(sets) if name in known]
    if not names:
        raise UserError(
            f"--leave_one_out: the training outcomes have none of the sets {_some(list(dict.fromkeys(sets)))}; theirs are "
            f"{_some(known)}"
        )
    if len(known) < 2:
        raise UserError(f"--leave_one_out: the training outcomes have one set, {known[0]}; nothing is left to train on")
    own = router.report.get("settings", {})
    settings = TrainSettings(**{key: value for key, value in own.items() if key in TrainSettings.__dataclass_fields__})
    points = 100.0 if outcomes.measure.min() >= 0 and outcomes.measure.max() <= 1 else 1.0
    made = []
    for name in names:
        logger.info("training without %s", name)
        rest = training.select([row for row, each in enumerate(training_sets) if each != name])
        without = train_router(rest, settings)
        test = outcomes.select([row for row, each in enumerate(sets) if each == name])
        test, _ = of_candidates(test, without.candidates)
        default = without.candidates.index(without.default)
        chosen_N = without.choose(without.scores(test.queries))
        tag = _tag(name, [True] * len(test), test, chosen_N, points * test.measure, default)
        made.append(LeftOut(name, len(rest), len(test), tag.router, without.default, tag.best_single, tag.gain))
    return made


# --- Examples and JSON ------------------------------------------------------------------------------------------------

EXAMPLES = 4


def _examples(
    router: Router,
    outcomes: Outcomes,
    sets: Sequence[str],
    values: Scores,
    chosen_N: np.ndarray,
    scores_NM: np.ndarray,
) -> dict[str, list[Example]]:
    """Queries, drawn at random, on which the choice did better than the best single model, and such on which it did worse."""
    default, rows = router.candidates.index(router.default), np.arange(len(chosen_N))
    gain_N = scores_NM[rows, chosen_N] - scores_NM[:, default]
    rng, value_NM = np.random.default_rng(0), getattr(values, router.rule)
    made = {}
    for kind, places in (("better", np.flatnonzero(gain_N > 0)), ("worse", np.flatnonzero(gain_N < 0))):
        shown = sorted(rng.permutation(places)[:EXAMPLES].tolist())
        made[kind] = [
            Example(
                set=sets[row],
                query=outcomes.queries[row],
                chosen=router.candidates[chosen_N[row]],
                score=float(scores_NM[row, chosen_N[row]]),
                default=router.default,
                default_score=float(scores_NM[row, default]),
                best=router.candidates[int(scores_NM[row].argmax())],
                best_score=float(scores_NM[row].max()),
                values=dict(zip(router.candidates, value_NM[row].round(3).tolist())),
            )
            for row in shown
        ]
    return made


def _three(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.value, interval.low, interval.high]


def to_json(made: Evaluation) -> str:
    """The content of evaluation.json. Intervals are [value, low, high]."""
    router, single = made.router, made.system("best single")
    content = {
        "mean": router.mean.value,
        "accuracy": router.by_set,
        "best_single": {"model": made.default, "mean": single.mean.value, "accuracy": single.by_set, "usd": single.usd},
        "gain_over_best_single": _three(made.gain),
        "worth_it": made.gain.low > 0,
        "baselines": {each.name.replace(" ", "_"): _system_json(each) for each in made.systems[1:]},
        **{key: value for key, value in _system_json(router).items() if key not in ("mean", "accuracy")},
        "usd_of_best_single": _three(made.cost_of_best_single),
    }
    rest = asdict(made)
    for key in ("systems", "gain", "cost_of_best_single", "examples"):
        del rest[key]
    text = json.dumps(_plain(content | rest), indent=1, ensure_ascii=False)
    return repair_text(text) + "\n"


def _system_json(system: System) -> dict[str, Any]:
    return {
        "what": system.says,
        "mean": system.mean.value,
        "interval": [system.mean.low, system.mean.high],
        "accuracy": system.by_set,
        "router_minus_it": _three(system.router_minus_it),
        "share_of_oracle_gap": _three(system.share_of_gap),
        "mean_task_rank": system.mean_task_rank,
        "uplift": system.uplift,
        "usd_per_1000": system.usd,
    }


def _plain(value: Any) -> Any:
    """The value with intervals as lists, and null in place of NaN."""
    if isinstance(value, dict):
        if value.keys() == {"value", "low", "high"}:
            return [value["value"], value["low"], value["high"]]
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
