"""What a router scores and costs at every setting, and RouteLLM's figures for two models.

found = curve_columns(router, values, columns, margin, extra)       # before the resampling
curve = curve_of(found, means)                                      # after it
"""

from dataclasses import dataclass

import numpy as np

from fastft.compose.router.figures.columns import Columns, Extra, alone
from fastft.compose.router.figures.measures import SetMeans, area_under, calls_for_half, strong_calls
from fastft.compose.router.router import Router, Scores
from fastft.judge.statistics.intervals import Interval

SETTINGS = 40
"""Settings of usd_weight or margin that are tried; those that choose the same are drawn once."""


@dataclass(frozen=True)
class Curve:
    """What a router scores at different settings of one number, and what it costs there."""

    by: str
    """usd_weight, or margin."""
    settings: list[float]
    x: list[float]
    """Dollars per 1,000 queries, or the share of queries that are not left with the default."""
    score: list[Interval]
    area: Interval | None
    area_says: str


@dataclass
class WeakAndStrong:
    """RouteLLM's figures: queries are sent to a strong model instead of a weak one, in the order of the router's preference.

    APGR is the share of the gap between the two that is recovered, as the mean over all shares of calls to the strong model
    (arXiv 2406.18665); a random order has 0.5. `calls_for_half` is the smallest share of calls that recovers half.
    """

    weak: str
    strong: str
    apgr: Interval
    calls_for_half: float | None


@dataclass
class CurveColumns:
    by: str
    settings: list[float]
    x: list[float]
    columns: list[int]
    area: tuple[int, int] | None
    """Places of the area's numerator and denominator."""
    area_says: str


def curve_columns(router: Router, values: Scores, columns: Columns, margin: float | None, extra: Extra) -> CurveColumns:
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
    return CurveColumns(
        by, [float(point[1]) for point in points], x, [extra.add(score) for score in scores], area, says
    )


def _area(
    router: Router, columns: Columns, x: list[float], scores: list[np.ndarray], extra: Extra
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


def curve_of(drawn: CurveColumns, means: SetMeans) -> Curve:
    area = means.ratio(*drawn.area) if drawn.area else None
    says = drawn.area_says
    if drawn.area and area is None:
        says = "not defined: on these queries the better end of the curve is not clearly better"
    return Curve(drawn.by, drawn.settings, drawn.x, [means.mean(column) for column in drawn.columns], area, says)


def pair_columns(
    router: Router, values: Scores, columns: Columns, extra: Extra
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


def pair_of(found: tuple[str, str, int, int, float | None] | None, means: SetMeans) -> WeakAndStrong | None:
    if found is None or (apgr := means.ratio(found[2], found[3])) is None:
        return None
    return WeakAndStrong(found[0], found[1], apgr, found[4])
