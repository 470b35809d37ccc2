"""Train a router on outcomes, beside its baselines: `fastft router train OUTCOMES… -o DIR`.

    fastft router train outcomes.jsonl -o routers/first --reward correct --tags clusters:25

Each fifth of the queries is held out once. On what was held out, success is calibrated, the margin is chosen, and router and
baselines are compared; the router that is saved has learned from all queries.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastft.common.command_line import option, parse, run_module
from fastft.common.files import require_not_input
from fastft.compose.router.figures.leaks import fingerprints
from fastft.compose.router.figures.measures import SetMeans, calibration_error, pooled, weights_of
from fastft.compose.router.figures.verdict import counted, signed, verdict
from fastft.compose.router.outcomes import Outcomes, read_outcomes
from fastft.compose.router.router import Router, choose_by, require_router_place
from fastft.compose.router.training.baselines import SAYS, Baselines, fit_baselines
from fastft.compose.router.training.calibration import brier, fit_scale
from fastft.compose.router.training.fit import Head, fit_heads, hard_labels, sigmoid, soft_labels
from fastft.compose.router.training.tags import cluster_tags, clusters_wanted, enhance, first_tags, known_mean
from fastft.compose.router.vectors.embeddings import embeddings_of
from fastft.compose.router.vectors.features import Features, HashedFeatures, require_packages
from fastft.compose.router.vectors.neighbours import Neighbours
from fastft.errors import UsageError, UserError
from fastft.judge.statistics.intervals import Interval

logger = logging.getLogger(__name__)

FOLDS = 5
FEWEST = 40  # distinct queries of which some can be held out
MARGINS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
MARGIN_OF_FEW = 0.05  # where nothing can be held out
CHEAPER = 0.01  # of the measure that a lower price may cost
OUTLYING = (0.005, 0.995)  # quantiles of rewards between which they are scaled to [0, 1]
TAGS_KEPT = 200  # tags whose means are written into router.json


@dataclass
class TrainSettings:
    reward: Literal["rewards", "correct"] = "rewards"
    """What the router learns: the rewards, or whether the answers are correct."""
    temperature: float = 1.0
    """Divides the rewards, scaled to [0, 1], before the softmax. Below 1, the best model of a query counts for more."""
    beta: float = 0.3
    """The weight of a query's own label; the rest is the mean of its tags. 1: no enhancement; 0: tags only."""
    tags: str = "tags"
    """tags: those of the outcomes; clusters:N: N groups of similar queries; none."""
    encoder: str | None = None
    """A directory with a sentence encoder, or with static embeddings (tokenizer.json and one table). Default: hashed words."""
    c: float = 10.0
    """The inverse strength of the shrinkage of weights."""
    seed: int = 0
    """Of everything that is drawn. The same outcomes and settings give the same router."""


@dataclass
class RouterTrainPlaces:
    output: str = option(short="-o")
    """The directory to write."""
    outcomes: list[str] = option(positional=True, several=True)
    """Files of outcomes, JSON Lines, also as .gz or .zst."""


def main(argv: Sequence[str]) -> int:
    """`fastft router train`."""
    what = "Train a router on outcomes, beside its baselines."
    [places, settings] = parse(argv, "fastft router train", what, RouterTrainPlaces, TrainSettings)
    from rich.console import Console

    _require_sane(settings)
    if not places.outcomes:
        raise UsageError("outcomes: name at least one file of outcomes")
    require_router_place(Path(places.output))
    require_not_input(Path(places.output), [*places.outcomes, *([settings.encoder] if settings.encoder else [])])
    router = train_router(read_outcomes(places.outcomes), settings)
    router.save(places.output)
    show(router, Console())
    return 0


def train_router(outcomes: Outcomes, settings: TrainSettings, with_baselines: bool = True) -> Router:
    """Train a router. Raises UserError for outcomes from which nothing can be learned, UsageError for settings."""
    require_packages()
    _require_sane(settings)
    outcomes = _usable(outcomes, settings)
    scaled, says = _scaled(outcomes.rewards if settings.reward == "rewards" else outcomes.correct, settings)
    features = _features(settings, outcomes.queries)
    matrix = features.transform(outcomes.queries)
    dense = features.dense(matrix)
    task = _Task(
        matrix, dense, scaled, _measure(outcomes, scaled), _tags(outcomes, dense, settings), outcomes.tags, settings
    )
    sets = pooled(first_tags(outcomes.tags), outcomes.queries)
    default = int(np.nanargmax(_set_means(task.measure, sets)))
    fitted = task.fit(np.arange(len(outcomes)), with_baselines)
    router = Router(
        candidates=outcomes.models,
        features=features,
        distribution=fitted.heads["distribution"],
        success=fitted.heads["success"],
        default=outcomes.models[default],
        margin=MARGIN_OF_FEW,
        usd=_mean_usd(outcomes),
        neighbours=Neighbours.fit(dense, settings.seed),
        runs=fingerprints(outcomes.queries),
        baselines=fitted.baselines,
        report=_report(outcomes, settings, task, says),
    )
    router.report["examples"] = [
        {"id": outcomes.ids[place], "tags": task.tags[place]} for place in router.neighbours.places
    ]
    fold = _folds(outcomes.queries, settings.seed)
    if fold is None:
        logger.warning(
            "router: only %s: none can be held out, so nothing is known of how good the router is, its success is not "
            "calibrated, and it leaves the default for a lead of %g",
            counted(len(set(outcomes.queries))),
            MARGIN_OF_FEW,
        )
        return router
    held = _hold_out(task, fold, with_baselines)
    sets = _compared_sets(outcomes, task)
    router.success = fit_scale(held.logits, task.measure).applied_to(router.success)
    router.margin = _best_margin(held.success, task.measure, default, sets, outcomes.usd, np.full(len(fold), True))
    router.report["held_out"] = _compared(outcomes, task, held, fold, default, sets)
    return router


# --- What is learned --------------------------------------------------------------------------------------------------


@dataclass
class _Fitted:
    heads: dict[str, Head]
    baselines: Baselines | None


@dataclass
class _Task:
    """Everything that is learned from N queries, for any part of them."""

    matrix: Any
    dense: np.ndarray
    rewards: np.ndarray
    """[N, M] in [0, 1], NaN where a score is missing."""
    measure: np.ndarray
    """The same of what choices are judged by."""
    tags: list[list[str]]
    """Those that smooth the labels."""
    given_tags: list[list[str]]
    settings: TrainSettings

    def fit(self, rows: np.ndarray, with_baselines: bool) -> _Fitted:
        """Fit both heads, and the baselines, on the queries at `rows`."""
        settings, rewards = self.settings, self.rewards[rows]
        matrix, tags = self.matrix[rows], [self.tags[row] for row in rows]
        labels = enhance(soft_labels(rewards, settings.temperature), tags, settings.beta)
        distributions = {"distribution": labels}
        if with_baselines:
            distributions["hard"] = hard_labels(rewards)
        heads = fit_heads(matrix, distributions, enhance(rewards, tags, settings.beta), settings.c)
        if not with_baselines:
            return _Fitted(heads, None)
        given = [self.given_tags[row] for row in rows]
        return _Fitted(heads, fit_baselines(self.dense[rows], labels, rewards, heads["hard"], given, settings.seed))


def _usable(outcomes: Outcomes, settings: TrainSettings) -> Outcomes:
    """Leave out queries without any score. Raises UserError if nothing is left to choose from or to learn."""
    if settings.reward == "correct" and outcomes.correct is None:
        raise UserError('--reward correct: these outcomes have no "correct"; use --reward rewards')
    if len(outcomes.models) < 2:
        raise UserError(
            f"these outcomes have one model only ({outcomes.models[0]}); a router chooses between at least two"
        )
    table = outcomes.rewards if settings.reward == "rewards" else outcomes.correct
    known = ~np.isnan(table)
    if unscored := [model for model, some in zip(outcomes.models, known.any(0)) if not some]:
        raise UserError(f"{', '.join(unscored)}: no query has a score ({settings.reward}) of this model; leave it out")
    rows = np.flatnonzero(known.any(1))
    if len(rows) < len(outcomes):
        logger.warning("router: left out without any score: %s", counted(len(outcomes) - len(rows)))
    if repeated := len(rows) - len({outcomes.queries[row] for row in rows}):
        logger.info("router: held out together with an equal one: %s", counted(repeated))
    if blank := sum(not outcomes.queries[row].strip() for row in rows):
        logger.warning("router: without any word: %s, teaching the mean of the models only", counted(blank))
    return outcomes.select(rows) if len(rows) < len(outcomes) else outcomes


def _scaled(rewards: np.ndarray, settings: TrainSettings) -> tuple[np.ndarray, str]:
    """Return the rewards between 0 and 1, and how that was done. Raises UserError if all are equal."""
    low, high = float(np.nanmin(rewards)), float(np.nanmax(rewards))
    if low == high:
        raise UserError(f"every score ({settings.reward}) is {low:g}: there is nothing to learn")
    if low >= 0 and high <= 1:
        return rewards, "as given"
    bottom, top = (float(each) for each in np.nanquantile(rewards, OUTLYING))
    if bottom == top:
        bottom, top = low, high
    says = f"from [{bottom:.4g}, {top:.4g}] to [0, 1]; what lies outside, such as {low:.4g} and {high:.4g}, is cut"
    logger.info("router: rewards are scaled %s", says)
    return np.clip((rewards - bottom) / (top - bottom), 0, 1), says


def _measure(outcomes: Outcomes, scaled: np.ndarray) -> np.ndarray:
    """What choices are judged by: `correct` where the outcomes have it, else the scaled rewards."""
    return scaled if outcomes.correct is None else outcomes.correct


def _tags(outcomes: Outcomes, dense: np.ndarray, settings: TrainSettings) -> list[list[str]]:
    """The tags that smooth the labels."""
    count = clusters_wanted(settings.tags)
    if count:
        return cluster_tags(dense, count, settings.seed)
    if settings.tags == "none" or settings.beta == 1:
        return [[] for _ in outcomes.ids]
    sizes = Counter(tag for own in outcomes.tags for tag in own)
    if not sizes:
        logger.warning("router: no query has a tag, so no label is smoothed; --tags clusters:25 groups similar queries")
    elif single := sum(size == 1 for size in sizes.values()):
        logger.info("router: %d of %d tags have one query each: they smooth nothing", single, len(sizes))
    return outcomes.tags


def _features(settings: TrainSettings, queries: list[str]) -> Features:
    return embeddings_of(settings.encoder) if settings.encoder else HashedFeatures().fit(queries)


def _mean_usd(outcomes: Outcomes) -> dict[str, float] | None:
    if outcomes.usd is None:
        return None
    means = known_mean(outcomes.usd)
    if unpriced := [model for model, mean in zip(outcomes.models, means) if math.isnan(mean)]:
        logger.warning("router: no query has a price (usd) of %s: prices are left out", ", ".join(unpriced))
        return None
    return dict(zip(outcomes.models, means.tolist()))


def _require_sane(settings: TrainSettings) -> None:
    clusters_wanted(settings.tags)
    if not 0 < settings.temperature < math.inf:
        raise UsageError(f"--temperature {settings.temperature:g}: must be above 0")
    if not 0 <= settings.beta <= 1:
        raise UsageError(f"--beta {settings.beta:g}: must be between 0 and 1")
    if not 0 < settings.c < math.inf:
        raise UsageError(f"--c {settings.c:g}: must be above 0")
    if settings.seed < 0:
        raise UsageError(f"--seed {settings.seed}: must be at least 0")


# --- What is held out -------------------------------------------------------------------------------------------------


@dataclass
class _HeldOut:
    """What routers thought of queries that they had not seen."""

    logits: np.ndarray
    """[N, M] of the success head."""
    success: np.ndarray
    """[N, M]: calibrated on the other fifths."""
    chosen: dict[str, np.ndarray]
    """By baseline, [N]."""


def _folds(queries: list[str], seed: int) -> np.ndarray | None:
    """The fifth of each query; equal queries are in the same one. None if there are too few."""
    place = {query: number for number, query in enumerate(dict.fromkeys(queries))}
    if len(place) < FEWEST:
        return None
    fold = np.random.default_rng(seed).permutation(len(place)) % FOLDS
    return fold[[place[query] for query in queries]]


def _hold_out(task: _Task, fold: np.ndarray, with_baselines: bool) -> _HeldOut:
    logits = np.zeros(task.rewards.shape)
    chosen: dict[str, np.ndarray] = {}
    for number in range(FOLDS):
        inside, outside = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        fitted = task.fit(inside, with_baselines)
        matrix = task.matrix[outside]
        logits[outside] = fitted.heads["success"].logits(matrix)
        if fitted.baselines:
            tags = [task.given_tags[row] for row in outside]
            for name, own in fitted.baselines.choose(matrix, task.dense[outside], tags).items():
                chosen.setdefault(name, np.zeros(len(fold), dtype=int))[outside] = own
    success = np.zeros_like(logits)
    for number in range(FOLDS):
        own, others = fold == number, fold != number
        success[own] = sigmoid(fit_scale(logits[others], task.measure[others])(logits[own]))
    return _HeldOut(logits, success, chosen)


def _best_margin(
    success: np.ndarray,
    measure: np.ndarray,
    default: int,
    sets: list[str],
    usd: np.ndarray | None,
    rows: np.ndarray,
) -> float:
    """The margin of MARGINS with the best measure on `rows`, the largest of equal ones.

    Where prices are known, it is the one with the lowest costs among those that lose at most CHEAPER of the measure.
    """
    rows = np.flatnonzero(rows & ~np.isnan(measure).any(1))
    if len(rows) < FEWEST:
        return MARGIN_OF_FEW
    weights = weights_of([sets[row] for row in rows])
    choices = [choose_by(success[rows], default, margin) for margin in MARGINS]
    means = np.array([weights @ measure[rows, chosen] for chosen in choices])
    if usd is None or np.isnan(usd[rows]).any():
        return max(zip(means.round(6), MARGINS))[1]
    costs = [float(weights @ usd[rows, chosen]) for chosen in choices]
    good = np.flatnonzero(means >= means.max() - CHEAPER)
    return MARGINS[min(good, key=lambda place: (costs[place], -means[place]))]


def _compared_sets(outcomes: Outcomes, task: _Task) -> list[str]:
    """The set of each query; small sets are pooled among the queries that have all scores, which alone are compared."""
    sets = first_tags(outcomes.tags)
    rows = np.flatnonzero(~np.isnan(task.measure).any(1))
    for row, name in zip(rows, pooled([sets[row] for row in rows], [outcomes.queries[row] for row in rows])):
        sets[row] = name
    return sets


def _compared(
    outcomes: Outcomes, task: _Task, held: _HeldOut, fold: np.ndarray, default: int, sets: list[str]
) -> dict[str, Any] | None:
    """The figures of router and baselines on held-out queries, in points of 100; None if no query has all scores.

    Each fifth is judged with the calibration and the margin of the others.
    """
    rows = np.flatnonzero(~np.isnan(task.measure).any(1))
    if len(rows) < FEWEST:
        logger.warning("router: fewer than %d queries have the scores of all models: nothing can be compared", FEWEST)
        return None
    chosen = np.zeros(len(fold), dtype=int)
    for number in range(FOLDS):
        margin = _best_margin(held.success, task.measure, default, sets, outcomes.usd, fold != number)
        chosen[fold == number] = choose_by(held.success[fold == number], default, margin)
    measure = 100 * task.measure[rows]
    count = np.arange(len(rows))
    columns = {
        "router": measure[count, chosen[rows]],
        "best single": measure[:, default],
        "uniform blend": measure.mean(1),
        **{name: measure[count, own[rows]] for name, own in held.chosen.items()},
        "oracle": measure.max(1),
    }
    means = SetMeans(
        np.column_stack(list(columns.values())), [sets[row] for row in rows], [outcomes.queries[r] for r in rows]
    )
    best = measure.max(1, keepdims=True)
    table = [
        {
            "name": name,
            "mean": means.mean_K[place],
            "router_minus_it": _three(means.difference(0, place)) if place else None,
        }
        for place, name in enumerate(columns)
    ]
    known = ~np.isnan(task.measure)
    return {
        "queries": len(rows),
        "sets": len(means.sets),
        "table": table,
        "gain_over_best_single": _three(means.difference(0, 1)),
        "left_to_default": float((chosen[rows] == default).mean()),
        "calibration_error": calibration_error(held.success[known], task.measure[known]),
        "brier": brier(held.success, task.measure),
        "brier_of_means": brier(np.broadcast_to(known_mean(task.measure), task.measure.shape), task.measure),
        "never_best": [
            model
            for place, model in enumerate(outcomes.models)
            if not ((measure[:, place] == best[:, 0]) & ((measure == best).sum(1) == 1)).any()
        ],
    }


def _set_means(table: np.ndarray, sets: list[str]) -> np.ndarray:
    """The mean over sets of each model's mean, [M], over what is known."""
    names = np.array(sets)
    return known_mean(np.array([known_mean(table[names == name]) for name in dict.fromkeys(sets)]))


def _three(interval: Any) -> list[float]:
    return [interval.value, interval.low, interval.high]


# --- What is said -----------------------------------------------------------------------------------------------------


def _report(outcomes: Outcomes, settings: TrainSettings, task: _Task, says: str) -> dict[str, Any]:
    members: dict[str, list[int]] = {}
    for row, own in enumerate(task.tags):
        for tag in own:
            members.setdefault(tag, []).append(row)
    largest = sorted(members, key=lambda tag: -len(members[tag]))[:TAGS_KEPT]
    means = {tag: known_mean(task.measure[members[tag]]) for tag in largest}
    labels = np.nan_to_num(soft_labels(task.rewards, settings.temperature))
    return {
        "settings": asdict(settings),
        "data": {
            "queries": len(outcomes),
            "digest": outcomes.digest,
            "measure": "rewards" if outcomes.correct is None else "correct",
            "rewards": says,
        },
        "means": dict(zip(outcomes.models, known_mean(task.measure).round(4).tolist())),
        "mean_distribution": dict(zip(outcomes.models, labels.mean(0).round(4).tolist())),
        "tags": {
            tag: {"queries": len(members[tag]), "means": dict(zip(outcomes.models, _plain(means[tag])))}
            for tag in largest
        },
    }


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else round(float(value), 4) for value in values]


def show(router: Router, console: Any) -> None:
    """Print how router and baselines did on held-out queries, and in the last line whether the router is worth it."""
    from rich.table import Table

    held = router.report.get("held_out")
    print(f"candidates: {', '.join(router.candidates)}; default: {router.default}; margin {router.margin:g}")
    if not held:
        print("nothing was held out: whether this router is worth it is not known; fastft router evaluate says it")
        return
    measure = router.report["data"]["measure"]
    title = f"Held-out queries ({held['queries']:,}, each fifth once), {measure} in points of 100, mean over {held['sets']} sets"
    table = Table("", "mean", "router minus it [95 %]", "", title=title, show_edge=False, title_justify="left")
    for row in held["table"]:
        text = signed(Interval(*row["router_minus_it"])) if row["router_minus_it"] else ""
        table.add_row(row["name"], f"{row['mean']:.2f}", text, _says(row["name"], router))
    console.width = max(console.width, 110)
    console.print(table)
    print(
        f"{held['left_to_default']:.0%} of the queries are left to the default. Success: calibration error "
        f"{held['calibration_error']:.3f}, Brier {held['brier']:.3f} (the models' means alone: {held['brier_of_means']:.3f})."
    )
    if len(held["never_best"]) == len(router.candidates):
        print("No model is ever the only best one of a query.")
    elif held["never_best"]:
        print(f"Never the only best one of a query, and so perhaps not needed: {', '.join(held['never_best'])}.")
    print(verdict(Interval(*held["gain_over_best_single"]), held["queries"], router.default, "points of 100"))


def _says(name: str, router: Router) -> str:
    says = {
        "router": "by its success, margin and calibration from the other fifths",
        "best single": router.default,
        "uniform blend": "one of the models, drawn",
        "oracle": "the best model of each query, which nobody knows before",
    }
    return (says | SAYS)[name]


if __name__ == "__main__":
    run_module(main)
