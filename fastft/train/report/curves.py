"""Prepare the curves and totals of a run's metrics, for its page and the demo's, and the table of files that both show.

Templates and `fastft.common.html` define how numbers look. A value that is missing is left out here;
the templates have a sentence for it.
"""

import itertools
import os
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastft.common.html import Plot, compact, percent, precise, ticks

LINE_BUCKETS = 800  # sections of a plotted line: about a pixel each, 20 KB together
TREND_BUCKETS = 60  # sections of the mean that is drawn over a noisy line
NOISY = 2 * TREND_BUCKETS  # a line over more steps than this counts as noisy
HOVER_COLUMNS = 150  # sections that show their values under the pointer
MOST_DOTS = 30  # held-out losses get a dot each, unless there are more than this

KNOWN_FILES = {
    "conversations.jsonl": "what was kept, one conversation or part a line",
    "rejected.jsonl": "what was rejected, with the reason and the record as it was",
    "report.json": "the account of the cleaning",
    "cleaning.html": "the account of the cleaning with examples, as a page",
    "metrics.jsonl": "the numbers of every step",
    "tensorboard": "the numbers of every step, for TensorBoard",
    "checkpoints": "where training continues after an interruption",
    "config.yaml": "the settings, to run it again",
    "run.json": "data, devices and versions",
    "samples.jsonl": "all answers to the fixed prompts",
    "model": "the trained model, for transformers and vLLM",
    "report.html": "this page",
}

NAMES = {"train": "training", "held": "held out"}  # of the lines, in the legend
Point = tuple[float, float]  # step, value
Show = Callable[[float], str]


def file_rows(files: dict[str, str], page: Path) -> list[tuple[str, str, str, str | None]]:
    """(name, path, description, link from `page`) for each of `files`, a map from name to path."""
    return [(name, str(file), KNOWN_FILES.get(Path(file).name, ""), _link(file, page)) for name, file in files.items()]


def _link(file: str, page: Path) -> str | None:
    """The relative address of a file that is beside or below the page, so that the folder can be moved as a whole; else None."""
    relative = os.path.relpath(file, page.parent)
    return None if relative.startswith("..") else "./" + quote(relative, errors="replace")


class Training:
    """The contents of metrics.jsonl for a page: totals, plots, and the steps whose losses are not finite."""

    def __init__(self, metrics: list[dict[str, Any]]):
        rows = [row for row in metrics if _number(row.get("step")) is not None]
        self.steps = [row for row in rows if "eval_loss" not in row]
        self.loss, self.held_out = _series(rows, "loss"), _series(rows, "eval_loss")
        self.plot = draw("Loss", {"train": self.loss, "held": self.held_out}, precise, from_zero=False)
        series = {key: _series(rows, key) for key in ("lr", "grad_norm", "tokens_per_s", "mfu", "fill", "memory_gib")}
        series["fill"] = [
            (row["step"], row["tokens"] / (row["tokens"] + row["padding_tokens"]))
            for row in self.steps
            if _number(row.get("tokens")) and _number(row.get("padding_tokens")) is not None
        ]
        small = [
            ("Learning rate", "lr", precise),
            ("Gradient norm", "grad_norm", precise),
            ("Tokens/s", "tokens_per_s", compact),
            ("MFU", "mfu", percent),
            ("Rows full", "fill", percent),
            ("Memory of a process, GiB", "memory_gib", precise),
        ]
        plots = [draw(name, {"train": series[key]}, show) for name, key, show in small]
        self.small_plots = [plot for plot in plots if plot]
        self.noisy = len(self.loss) > NOISY
        self.epochs = max((epoch for _, epoch in _series(rows, "epoch")), default=None)
        self.tokens, self.trained, self.padding, self.seconds = (
            sum(value for _, value in _series(self.steps, key))
            for key in ("tokens", "trained_tokens", "padding_tokens", "step_time_s")
        )
        self.mfu = _mean(series["mfu"]) if series["mfu"] else None
        self.memory = max((gib for _, gib in series["memory_gib"]), default=None)
        self.elapsed = max((seconds for _, seconds in _series(rows, "elapsed_s")), default=None)
        self.cost = max((money for _, money in _series(rows, "cost")), default=None)
        self.best_held_out = min(self.held_out, key=itemgetter(1), default=None)
        self.skipped = sum(any(row.get(key, 0) is None for key in ("loss", "grad_norm")) for row in self.steps)
        self.broken = [row["step"] for row in rows for key in ("loss", "eval_loss") if _number(row.get(key, 0)) is None]


def draw(title: str, series: dict[str, list[Point]], show: Show, from_zero: bool = True) -> Plot | None:
    """Plot lines over steps, "train", "held" or both; None if there are no points. `show` formats a value."""
    series = {kind: points for kind, points in series.items() if points}
    if not series:
        return None
    steps, values = zip(*itertools.chain(*series.values()))
    first, last = (min(steps), max(steps)) if min(steps) < max(steps) else (steps[0] - 1, steps[0] + 1)
    first = 0.0 if 0 < first < last / 10 else first  # a run that begins at step 1 is drawn from 0
    y_ticks = ticks(min([0.0, *values] if from_zero else values), max(values))

    def x(step: float) -> float:
        return 100 * (step - first) / (last - first)

    def y(value: float) -> float:
        return 100 * (y_ticks[-1] - value) / (y_ticks[-1] - y_ticks[0])

    def path(points: list[Point], dots: bool = False) -> str:
        corners = [f"{x(step):.2f} {y(value):.2f}" for step, value in points]
        # A line of no length with round ends is a dot, and stays round however the plot is stretched.
        return "".join(f"M{corner}h0" for corner in corners) if dots else f"M{'L'.join(corners)}h0"

    lines = []
    if train := series.get("train"):
        lines.append(("train faint" if len(train) > NOISY else "train", path(thin(train, LINE_BUCKETS))))
    if train and len(train) > NOISY:
        lines.append(
            ("train", path([((part[0][0] + part[-1][0]) / 2, _mean(part)) for part in buckets(train, TREND_BUCKETS)]))
        )
    if held := series.get("held"):
        lines.append(("held", path(thin(held, LINE_BUCKETS))))
        lines += [("held dot", path(held, dots=True))] if len(held) <= MOST_DOTS else []
    return Plot(
        title,
        x_ticks=[
            (x(t), f"{t:,.0f}" if t < 1e4 else compact(t)) for t in ticks(first, last, whole=True) if first <= t <= last
        ],
        y_ticks=[(y(t), show(t)) for t in y_ticks],
        lines=lines,
        hovers=list(_hovers(series, x, show)),
        legend=[(kind, NAMES[kind], show(points[-1][1])) for kind, points in series.items()],
    )


def _hovers(
    series: dict[str, list[Point]], x: Callable[[float], float], show: Show
) -> Iterable[tuple[float, float, str]]:
    """(left, width, text) of columns that fill the plot.

    The text names the steps of the column and each line's value there, or the mean and the range of its values.
    """
    tagged = sorted((step, value, kind) for kind, points in series.items() for step, value in points)
    parts = list(buckets(tagged, HOVER_COLUMNS))
    edges = [0.0, *(x((a[-1][0] + b[0][0]) / 2) for a, b in itertools.pairwise(parts)), 100.0]
    for part, left, right in zip(parts, edges, edges[1:]):
        first, last = part[0][0], part[-1][0]
        text = f"step {first:,.0f}" if first == last else f"steps {first:,.0f} to {last:,.0f}"
        for kind in series:
            if points := [(step, value) for step, value, k in part if k == kind]:
                values = [value for _, value in points]
                spread = f" ({show(min(values))} to {show(max(values))})" if len(values) > 1 else ""
                text += f"; {NAMES[kind] + ' ' if len(series) > 1 else ''}{show(_mean(points))}{spread}"
        yield left, right - left, text


def buckets(points: list[tuple], count: int) -> Iterable[list[tuple]]:
    """Divide points, which are in order of x, into at most `count` sections of equal length. Empty ones are left out."""
    first, length = points[0][0], (points[-1][0] - points[0][0]) / count or 1
    for _, part in itertools.groupby(points, key=lambda point: min(int((point[0] - first) / length), count - 1)):
        yield list(part)


def thin(points: list[Point], count: int) -> list[Point]:
    """Select points whose line looks like that of all points: the two ends, and the extremes of each of `count` sections.

    Taking every n-th point instead would lose the spikes, which are what readers look for.
    """
    if len(points) <= 2 * count:
        return points
    extremes = {points[0], points[-1]}
    for part in buckets(points, count):
        extremes |= {min(part, key=itemgetter(1)), max(part, key=itemgetter(1))}
    return sorted(extremes)


def _series(rows: list[dict[str, Any]], key: str) -> list[Point]:
    """The values of `key` over the steps, without those that are not finite numbers."""
    points = ((row["step"], _number(row[key])) for row in rows if key in row)
    return sorted((float(step), value) for step, value in points if value is not None)


def _number(value: Any) -> float | None:
    """`value` if it is a number that can be drawn, else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None  # false for NaN, too


def _mean(points: list[Point]) -> float:
    return sum(value for _, value in points) / len(points)
