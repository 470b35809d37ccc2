"""Show the results of an experiment: tables in the terminal, and a page with curves, fits and residuals."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastft.common.html import Plot, percent, precise, ticks, write_page
from fastft.compose.abtest.estimates import FEW_ACTIVE, FIGURES, ArmComparison, Effect, line_weights
from fastft.compose.abtest.results import ArmCurve, Results
from fastft.compose.abtest.verdict import number, points, ranges

WIDTH = 135
"""Width of the tables where the output is a pipe, in characters."""
MEANING = {
    "engagement_ratio": "use per user, ratio",
    "retention": "share who come back",
    "dzeta": "retention at the start",
    "dbeta": "how retention lasts",
    "dalpha": "use per visitor at the start",
    "dgamma": "how use per visitor lasts",
}
SHOWN_DAYS = (1, 2, 3, 5, 7, 10, 14, 21, 30, 60, 90)
COLOURS = 6
"""Arms have so many colours and line styles; more arms repeat them."""
Rows = list[list[str]]
Point = tuple[float, float]


def figure_rows(results: Results) -> Rows:
    """(arm, figure, meaning, value with interval, p, Holm's p, without winsorising) of each figure, and of the day without a
    line on which an arm differs most surely."""
    rows = []
    for found in results.comparisons:
        for name in FIGURES:
            if effect := found.figures.get(name):
                raw = found.raw.get(name)
                rows.append([
                    found.arm, name.replace("_", " "), MEANING[name], _value(name, effect), _p(effect.p),
                    _p(effect.p_holm), _value(name, raw) if raw else "",
                ])  # fmt: skip
        if found.shares:
            day, shares = min(found.shares.items(), key=lambda item: item[1].p)
            row = [found.arm, "retention", f"share on day {day}", points(shares), _p(shares.p), _p(shares.p_holm), ""]
            rows.append(row)
    return rows


def day_rows(results: Results) -> Rows:
    """(day, arm, R of the control, R of the arm, q or a difference with interval, E of the control, E of the arm, r with
    interval)."""
    control = results.curves[results.control]
    rows = []
    for found in results.comparisons:
        mine = results.curves[found.arm]
        days = sorted({*found.retention, *found.shares})
        few = [day for day in days if day in SHOWN_DAYS or day == days[-1]] if len(days) > 8 else days
        for day in few:
            row = [str(day), found.arm, percent(control.retention[day]), percent(mine.retention[day])]
            row.append(points(found.shares[day]) if day in found.shares else _ratio(found.retention[day]))
            if results.curves[found.arm].engagement:
                use = control.engagement.get(day), mine.engagement.get(day), found.engagement.get(day)
                row += ["–", "–", "–"] if None in use else [precise(use[0]), precise(use[1]), _ratio(use[2])]
            rows.append(row)
    return rows


def arm_rows(results: Results) -> Rows:
    """(arm, users, planned, with all days, power law of retention, its R2, power law of engagement, its R2) of each arm."""
    rows = []
    for arm, count in results.sample_ratio.users.items():
        row = [arm, f"{count:,}", f"{results.sample_ratio.expected[arm]:,.0f}"]
        if curve := results.curves.get(arm):
            row += [f"{curve.complete:,}", *_law(curve.retention_law), *_law(curve.engagement_law)]
        rows.append(row)
    return rows


ARM_HEADS = ("arm", "users", "planned", "all days passed", "retention", "R2", "use per visitor", "R2")
FIGURE_HEADS = ("arm", "figure", "what it says", "value [95 %]", "p", "p, Holm", "not winsorised")
DAY_HEADS = ("day", "arm", "R control", "R arm", "q [95 %]", "E control", "E arm", "r [95 %]")


def _law(law: Any) -> tuple[str, str]:
    if law is None:
        return "–", "–"
    return f"{law.scale:.3g} k^{law.exponent:.3f}", f"{law.r2:.2f}" if law.days > 2 else "2 days"


def _value(name: str, effect: Effect) -> str:
    return _ratio(effect) if name.endswith("ratio") else number(effect)


def _ratio(effect: Effect) -> str:
    value, low, high = (f"{each:.4f}" if each < 100 else precise(each) for each in effect.ratio)
    return f"{value} [{low}, {high}]"


def _p(p: float) -> str:
    return "–" if math.isnan(p) else "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0")


def notes(results: Results) -> list[str]:
    """What a reader must know of how the figures came about."""
    lines = list(results.remarks)
    if not results.comparisons:
        return lines
    fixed = "which --days says was fixed" if results.days_given else "by default; fix yours with --days"
    lines.append(
        f"Horizon: days 1 to {results.reached} after joining, of {results.planned}, {fixed} before the start. Read the "
        "figures once, at the end. A user counts for a day only if it has passed, and a day only if it has passed for a tenth of "
        "each arm's users."
    )
    for found in results.comparisons:
        if days := found.left_out["retention"]:
            lines.append(
                f"{found.arm}: on no line, because one of the two arms has fewer than {FEW_ACTIVE} active users: day "
                f"{ranges(days)}. There, the shares are compared by themselves (Fisher's test, corrected for all days)."
            )
    lines += _outlier_notes(results)
    tests = sum(len(each.figures) + bool(each.shares) for each in results.comparisons)
    lines.append(
        "Intervals are 95 % over users (delta method on each user's influence, leaving the user out); p is two-sided; Holm's "
        f"correction is over all {tests} tests. log q(k) = dzeta + dbeta log k and log r(k) = dalpha + "
        "dgamma log k, least squares: larger is better for the arm."
    )
    if any(each.engagement for each in results.comparisons):
        lines.append(
            "Use per visitor is over the users who came on that day. An arm that brings back people who use little lowers it, "
            "though nobody uses less: use per user, over all of an arm's users, is free of that."
        )
    return lines


def _outlier_notes(results: Results) -> list[str]:
    out = results.outliers
    if not out or out["quantile"] >= 1:
        return ["Amounts are taken as they are (--winsor 1)."] if out else []
    caps = []
    if out["above_by_day"]:
        caps.append(
            f"{out['above_by_day']:,} of users' days, to at most {_amount(out['cap_by_day'])} {results.unit} a day and "
            f"{_amount(out['cap_over_days'])} over the days"
        )
    if out["above_by_user"]:
        caps.append(
            f"{out['above_by_user']:,} of users' totals, to at most {_amount(out['cap_by_user'])} {results.unit}"
        )
    if not caps:
        return []
    largest = ", ".join(
        f"{each['user']} ({each['arm']}{'' if each['day'] is None else ', day ' + str(each['day'])}): {_amount(each['amount'])}"
        for each in out["largest"][:3]
    )
    return [
        f"Outliers are made smaller (--winsor): {'; '.join(caps)}. These are the {100 * out['quantile']:g} % points over "
        f"users; the largest: {largest}. The last column of the figures has them as they are."
    ]


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else precise(value)


def show(results: Results, console: Any) -> None:
    """Print warnings, the verdict, the tables and the notes; of an experiment that cannot be read, only its arms."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.width = max(console.width, WIDTH)
    for line in results.warnings:
        console.print(f"warning: {line}", markup=False, highlight=False)
    if results.comparisons:
        console.print(f"{results.verdict}", markup=False, highlight=False, style="bold")
    for heads, rows in (
        (ARM_HEADS, arm_rows(results)),
        *([(FIGURE_HEADS, figure_rows(results)), (DAY_HEADS, day_rows(results))] if results.comparisons else []),
    ):
        if rows:
            table = Table(box=SIMPLE_HEAD, pad_edge=False)
            for head in heads[: max(map(len, rows))]:
                # Only a long name of an arm is folded: a number must not lose its end.
                table.add_column(head, no_wrap=head != "arm", overflow="fold")
            for row in rows:
                table.add_row(*(each.replace("[", "\\[") for each in row))
            console.print(table)
    console.print(f"Sample ratio: p = {results.sample_ratio.p:.2g}.", highlight=False)
    for line in notes(results):
        console.print(line, markup=False, highlight=False)


# --- The page ---------------------------------------------------------------------------------------------------------


def write_abtest_page(path: Path, results: Results) -> None:
    """Write the page. An older one stays in place until the new one is complete."""
    arms = list(results.curves)
    colours = {arm: f"arm{place % COLOURS}" for place, arm in enumerate([results.control, *_others(arms, results)])}
    write_page(
        path,
        Path(__file__).with_name("abtest.html.jinja"),
        title=f"{', '.join(_others(results.sample_ratio.users, results))} against {results.control}",
        results=results,
        stopped=not results.comparisons,
        ratio_p=f"{results.sample_ratio.p:.2g}",
        curves=_curve_plots(results, colours) if results.comparisons else [],
        fits=[(found.arm, _fit_plots(found, colours[found.arm])) for found in results.comparisons],
        tables=[
            ("arms", "Arms", ARM_HEADS, arm_rows(results)),
            *([("figures", "Figures", FIGURE_HEADS, figure_rows(results))] if results.comparisons else []),
        ],
        days=(DAY_HEADS, day_rows(results)) if results.comparisons else None,
        notes=notes(results),
    )


def _others(arms: Iterable[str], results: Results) -> list[str]:
    return [arm for arm in arms if arm != results.control]


class _Frame:
    """Places points of a plot in percent of its width and height. The axis of days is logarithmic."""

    def __init__(self, days: Iterable[int], values: Iterable[float]):
        days, values = list(days), list(values)
        self.first, self.last = min(days), max(days)
        if self.first == self.last:
            self.first, self.last = self.first * 0.5, self.last * 2
        self.values = ticks(min(values), max(values))

    def x(self, day: float) -> float:
        return 100 * (math.log(day) - math.log(self.first)) / (math.log(self.last) - math.log(self.first))

    def y(self, value: float) -> float:
        return 100 * (self.values[-1] - value) / (self.values[-1] - self.values[0])

    def line(self, points: Iterable[Point]) -> str:
        return "M" + "L".join(f"{self.x(day):.2f} {self.y(value):.2f}" for day, value in points)

    def dots(self, points: Iterable[Point]) -> str:
        return "".join(f"M{self.x(day):.2f} {self.y(value):.2f}h0" for day, value in points)

    def bars(self, spans: Iterable[tuple[float, float, float]]) -> str:
        return "".join(f"M{self.x(day):.2f} {self.y(low):.2f}V{self.y(high):.2f}" for day, low, high in spans)

    def x_ticks(self, days: Sequence[int]) -> list[tuple[float, str]]:
        chosen = days if len(days) <= 5 else [day for day in (1, 2, 4, 7, 14, 30, 60, 90) if day in days]
        return [(self.x(day), f"day {day}" if day == chosen[0] else str(day)) for day in chosen]

    def y_ticks(self, show: Callable[[float], str]) -> list[tuple[float, str]]:
        return [(self.y(value), show(value)) for value in self.values]

    def hovers(self, texts: dict[int, str]) -> list[tuple[float, float, str]]:
        days = sorted(texts)
        edges = [0.0, *((self.x(a) + self.x(b)) / 2 for a, b in itertools.pairwise(days)), 100.0]
        return [(left, right - left, texts[day]) for day, left, right in zip(days, edges, edges[1:])]


def _curve_plots(results: Results, colours: dict[str, str]) -> list[Plot]:
    """Retention and, if known by day, engagement of every arm over days."""
    shown: list[tuple[str, Callable[[ArmCurve], dict[int, float]], Callable[[float], str]]] = [
        ("Retention: users who come back", lambda curve: curve.retention, _percent),
        (f"Engagement: {results.unit} per visitor", lambda curve: curve.engagement, precise),
    ]
    plots = []
    for title, of, show in shown:
        series = {arm: of(results.curves[arm]) for arm in colours if of(results.curves[arm])}
        if not series:
            continue
        days = sorted(set().union(*series.values()))
        frame = _Frame(days, [0.0, *(value for each in series.values() for value in each.values())])
        lines = []
        for arm, values in series.items():
            lines.append((colours[arm], frame.line(values.items())))
            lines.append((f"{colours[arm]} dot", frame.dots(values.items())))
        texts = {
            day: f"day {day}: " + ", ".join(f"{arm} {show(v[day])}" for arm, v in series.items() if day in v)
            for day in days
        }
        last = {arm: f"{show(values[max(values)])} on day {max(values)}" for arm, values in series.items()}
        legend = [(colours[arm], arm, last[arm]) for arm in series]
        plots.append(
            Plot(title, frame.x_ticks(days), frame.y_ticks(show), lines, frame.hovers(texts), legend)
        )  # fmt: skip
    return plots


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _fit_plots(found: ArmComparison, colour: str) -> list[Plot]:
    """log q and log r with their lines and intervals, and the residuals of each."""
    plots = []
    off = found.left_out["retention"]
    for name, effects in (("q", found.retention), ("r", found.engagement)):
        effects = {day: effect for day, effect in effects.items() if day not in off}
        if len(effects) >= 2:
            plots += _fit(name, effects, colour)
    return plots


def _fit(name: str, effects: dict[int, Effect], colour: str) -> list[Plot]:
    days = sorted(effects)
    at, value_K = np.array(days), np.array([effects[day].value for day in days])
    intercept, slope = line_weights(at) @ value_K
    line = {day: float(intercept + slope * math.log(day)) for day in days}
    spans = [(day, effects[day].low, effects[day].high) for day in days]
    frame = _Frame(days, [0.0, *line.values(), *(each for _, *two in spans for each in two)])
    fit = Plot(
        f"log {name}(k)",
        frame.x_ticks(days),
        frame.y_ticks(_signed),
        [
            ("none", frame.line([(days[0], 0.0), (days[-1], 0.0)])),
            (f"{colour} faint", frame.bars(spans)),
            (colour, frame.line(line.items())),
            (f"{colour} dot", frame.dots((day, effects[day].value) for day in days)),
        ],
        frame.hovers({day: f"day {day}: {number(effects[day])}, line {_signed(line[day])}" for day in days}),
        [],
    )
    if len(days) == 2:  # the line is exact and leaves nothing
        return [fit]
    rest = {day: effects[day].value - line[day] for day in days}
    size = max(map(abs, rest.values()))
    frame = _Frame(days, [-max(size, 0.001), max(size, 0.001)])
    residuals = Plot(
        f"Residuals of log {name}(k)",
        frame.x_ticks(days),
        frame.y_ticks(_signed),
        [
            ("none", frame.line([(days[0], 0.0), (days[-1], 0.0)])),
            (f"{colour} faint", frame.bars((day, 0.0, value) for day, value in rest.items())),
            (f"{colour} dot", frame.dots(rest.items())),
        ],
        frame.hovers({day: f"day {day}: {_signed(value)}" for day, value in rest.items()}),
        [],
    )
    return [fit, residuals]


def _signed(value: float) -> str:
    return f"{value:+.3g}" if value else "0"
