"""Compute all figures of a router on outcomes that it has not seen.

    outcomes, sets = read_with_sets(["test.jsonl"])
    made = evaluate(Router.load("routers/expert", with_baselines=True), outcomes, sets)
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

from fastft.common.records import read_records, repair_text
from fastft.compose.blend import BlendPolicy
from fastft.compose.router.figures.columns import Columns, Extra, alone
from fastft.compose.router.figures.curves import Curve, WeakAndStrong, curve_columns, curve_of, pair_columns, pair_of
from fastft.compose.router.figures.leaks import shared_runs
from fastft.compose.router.figures.measures import (
    LEAST,
    SetMeans,
    calibration_error,
    confusion,
    pooled,
    rank_and_uplift,
    rank_and_uplift_of_model,
    weights_of,
)
from fastft.compose.router.figures.verdict import is_worth_it
from fastft.compose.router.outcomes import Outcomes, read_outcomes
from fastft.compose.router.router import Router, Scores
from fastft.compose.router.training.baselines import SAYS
from fastft.data.conversation import Conversation
from fastft.errors import UserError
from fastft.judge.statistics.intervals import Interval

logger = logging.getLogger(__name__)

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
    pair: WeakAndStrong | None
    confusion: list[list[float]]
    drawn_blend: dict[str, float]
    left_to_default: float
    """The share of queries that the default answers."""
    unlike: float
    """The share of queries that resemble none of the training."""
    calibration_error: float | None
    cost_of_best_single: Interval | None
    leaks: dict[str, Any] | None
    without_leaks: dict[str, Any] | None
    remarks: list[str]
    examples: dict[str, list[Example]]
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def shared(self) -> int:
        """How many queries share text with training queries."""
        return self.leaks["queries"] if self.leaks else 0

    @property
    def judged(self) -> tuple[Interval, int] | None:
        """What the verdict rests on: (router minus best single, queries) without those that the training has seen.

        None if it has seen all of them.
        """
        if not self.shared:
            return self.gain, self.queries
        if self.without_leaks is None:
            return None
        return Interval(*self.without_leaks["gain_over_best_single"]), self.without_leaks["queries"]

    @property
    def worth_it(self) -> bool | None:
        """Whether the router is surely better than the best single model; None if these queries cannot say it."""
        return is_worth_it(*self.judged) if self.judged else None

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
    files = [Path(path).name.split(".")[0] for path in paths for _ in read_records(path)]
    return outcomes, [tags[0] if tags else file for tags, file in zip(outcomes.tags, files)]


def evaluate(
    router: Router, outcomes: Outcomes, sets: Sequence[str], usd_weight: float = 0.0, margin: float | None = None
) -> Evaluation:
    """Compute all figures. Raises UserError if the outcomes lack a candidate, or every query lacks a score."""
    outcomes, remarks = of_candidates(outcomes, router.candidates)
    outcomes, sets, more = whole_rows(outcomes, sets)
    remarks += more
    sets, own_sets = pooled(sets, outcomes.queries), sets
    matrix = router.features.transform(outcomes.queries)
    values = router.scores_of(matrix)
    chosen_N = router.choose(values, usd_weight, margin)
    measure_NM = outcomes.measure
    points = 100.0 if measure_NM.min() >= 0 and measure_NM.max() <= 1 else 1.0
    scores_NM, default = points * measure_NM, router.candidates.index(router.default)
    weights_N = weights_of(sets)

    columns = Columns(scores_NM, _usd_table(router, outcomes), router.candidates)
    columns.add_choice("router", f"by its {router.rule}", chosen_N)
    columns.add_choice("best single", f"{router.default}, chosen in training", np.full(len(sets), default))
    columns.add("uniform blend", "one of the models, drawn: the mean of all", scores_NM.mean(1), columns.mean_usd())
    for name, says, choice_N in _baselines(router, matrix, outcomes.tags):
        columns.add_choice(name, says, choice_N)
    for number, name in enumerate(router.candidates):
        columns.add_choice(alone(name), "", np.full(len(sets), number))
    columns.add_choice("oracle", "the best model of each query, which nobody knows before", _oracle(columns))
    extra = Extra(columns, weights_N)
    curve = curve_columns(router, values, columns, margin, extra)
    pair = pair_columns(router, values, columns, extra)
    usd_columns = [extra.add(usd_N) for usd_N in columns.usd.values()] if columns.usd_NM is not None else []

    means = SetMeans(np.column_stack([*columns.scores.values(), *extra.columns]), sets, outcomes.queries)
    systems = _systems(columns, means, usd_columns, default)
    leaks, without = _leaks(router, outcomes, sets, chosen_N, scores_NM, default)
    single = list(columns.scores).index("best single")
    drawn = _drawn_blend(outcomes, scores_NM, weights_N)
    if router.baselines and "best per tag" not in columns.scores:
        remarks.append("There is no best per tag: no tag of these queries was seen in training.")
    if moved := {own: to for own, to in zip(own_sets, sets) if own != to}:
        remarks.append(
            f"Sets of fewer than {LEAST} different queries ({some(list(moved))}) have no weight of their own: they count as part "
            f"of “{next(iter(moved.values()))}”."
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
        by_set=[
            tag_row(name, [s == name for s in sets], outcomes, chosen_N, scores_NM, default) for name in means.sets
        ],
        by_tag=_tags(outcomes, chosen_N, scores_NM, default),
        curve=curve_of(curve, means),
        pair=pair_of(pair, means),
        confusion=confusion(chosen_N, scores_NM).round(3).tolist(),
        drawn_blend=drawn,
        left_to_default=float(weights_N @ (chosen_N == default)),
        unlike=float(weights_N @ values.unlike),
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
            f"this router chooses among {some(candidates, 10)}; the outcomes have no scores of {some(missing)} (they have "
            f"{some(outcomes.models, 10)}): score its candidates, or train a router for these models"
        )
    others = [name for name in outcomes.models if name not in candidates]
    places = [outcomes.models.index(name) for name in candidates]
    kept = {
        name: None if (table := getattr(outcomes, name)) is None else table[:, places]
        for name in ("rewards", "correct", "usd")
    }
    remarks = [f"Left out, because the router cannot choose them: {some(others, 10)}."] if others else []
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
        f"{some([outcomes.ids[row] for row in rows])}."
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


def some(names: Sequence[str], count: int = NAMED) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


# --- Systems ----------------------------------------------------------------------------------------------------------


def _oracle(columns: Columns) -> np.ndarray:
    """The best model of each query; of several the cheapest."""
    best_NM = columns.scores_NM >= columns.scores_NM.max(1, keepdims=True) - 1e-9
    usd_NM = np.zeros_like(columns.scores_NM) if columns.usd_NM is None else columns.usd_NM
    return np.where(best_NM, usd_NM, np.inf).argmin(1)


def _baselines(router: Router, matrix: Any, tags: Sequence[Sequence[str]]) -> list[tuple[str, str, np.ndarray]]:
    """(name, what it is, chosen model of each query) of what was trained beside the router; `matrix`: the features."""
    if router.baselines is None:
        return []
    found = router.baselines.choose(matrix, router.features.dense(matrix), tags)
    return [(name, SAYS[name], chosen_N) for name, chosen_N in found.items()]


def _systems(columns: Columns, means: SetMeans, usd_columns: list[int], default: int) -> list[System]:
    names = list(columns.scores)
    single, oracle = names.index("best single"), names.index("oracle")
    first = names.index(alone(columns.models[0]))
    models_SM = means.by_set_SK[:, first : first + len(columns.models)]
    made = []
    for place, name in enumerate(names):
        is_model = first <= place < first + len(columns.models)
        if is_model or name == "best single":
            rank, uplift = rank_and_uplift_of_model(place - first if is_model else default, models_SM)
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


def tag_row(
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
    return [
        tag_row(tag, [tag in tags for tags in outcomes.tags], outcomes, chosen_N, scores_NM, default) for tag in shown
    ]


# --- Leaks ------------------------------------------------------------------------------------------------------------


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
    queries = [outcomes.queries[row] for row in keep]
    means = SetMeans(pair_NK, pooled([sets[row] for row in keep], queries), queries)
    return leaks, {
        "queries": len(keep),
        "mean": float(means.mean_K[0]),
        "best_single": float(means.mean_K[1]),
        "gain_over_best_single": _three(means.difference(0, 1)),
    }


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
        "worth_it": made.worth_it,
        "baselines": {each.name.replace(" ", "_"): _system_json(each) for each in made.systems[1:]},
        **{key: value for key, value in _system_json(router).items() if key not in ("mean", "accuracy")},
        "usd_of_best_single": _three(made.cost_of_best_single),
    }
    rest = asdict(made)
    for key in ("systems", "gain", "cost_of_best_single", "examples"):
        del rest[key]
    text = json.dumps(plain(content | rest), indent=1, ensure_ascii=False)
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


def plain(value: Any) -> Any:
    """The value with intervals as lists, and null in place of NaN."""
    if isinstance(value, dict):
        if value.keys() == {"value", "low", "high"}:
            return [value["value"], value["low"], value["high"]]
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
