"""Print the output of `fastft estimate --spot` as a table in the terminal, and write a page with plots (--page FILE)."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastft.common.files import short_name
from fastft.common.html import Plot, duration, percent, ticks, write_page
from fastft.cost.spot.candidates import PUBLISHED, STAGED, MachineCandidate, MachineComparison
from fastft.cost.spot.prices import Offer
from fastft.cost.spot.simulate import RUNS, Runs, mean_between_preemptions, simulate
from fastft.cost.spot.traces import fit

CURVE = 2.0 ** np.arange(-3, 4.5, 0.5)
"""Intervals of the plot, as multiples of the chosen one."""
CURVE_RUNS = 150
"""Simulated runs for each interval of the plot."""
WIDTH = 130
"""Width of the table where the output is a pipe, in characters."""


def show(found: MachineComparison, console, model: str) -> None:
    """Print the table, the offers that are doubted or need an opt-in, and the assumptions; write the page if asked to."""
    console.width = max(console.width, WIDTH)  # rich takes a pipe for 80 characters wide, and would cut numbers off
    console.print(_table(found))
    for line in conclusions(found):
        console.print(line)
    for reason, which in found.left_out.items():
        console.print(f"Left out, {reason}: {', '.join(which)}.")
    for offer in found.doubted:
        console.print(f"Not believed: {offer.cloud} {offer.gpu} in {offer.region}: {doubts(offer)}.")
    for offer in found.opt_in:
        console.print(f"{opt_in_heading(found)}: {offer.cloud} {offer.gpu} in {offer.region}: {opt_in(offer)}.")
    for line in assumptions(found):
        console.print(line)
    if found.config.page:
        write_spot_page(Path(found.config.page).expanduser(), found, model)
        console.print(f"page: {found.config.page}")


def _table(found: MachineComparison):
    """The table of all candidates for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("machines", "", "cheapest in"):
        table.add_column(heading, no_wrap=True)
    for heading in ("$/hour", "hours", "90 %", "$", "90 %", "stops", "lost min", "warned", "useful"):
        table.add_column(heading, justify="right", no_wrap=True)
    for c in found.candidates:
        table.add_row(
            c.machines,
            c.kind,
            f"{c.offer.cloud} {c.offer.region}{' (opt-in)' * bool(c.offer.opt_in)}",
            f"{c.price:.2f}",
            *(_number(value) for value in (*c.hours, *c.dollars)),
            _number(float(np.mean(c.runs.preemptions))) if c.spot else "-",
            _number(lost_minutes(c.runs)) if c.spot else "-",
            _number(lost_minutes(c.warned)) if c.spot else "-",
            percent(c.useful),
        )
    return table


def lost_minutes(runs: Runs) -> float:
    """Mean minutes of work that a run has to do again."""
    return float(np.mean(runs.lost_s)) / 60


def doubts(offer: Offer) -> str:
    """Say why the prices of an offer are not believed."""
    return " and ".join(filter(None, (offer.on_demand_doubt, offer.spot_doubt)))


def opt_in_heading(found: MachineComparison) -> str:
    """The heading of the offers that need an opt-in, which says whether they may be chosen."""
    return "Needs an opt-in" if found.config.opt_in_zones else "Needs an opt-in, not chosen without --opt_in_zones"


def opt_in(offer: Offer) -> str:
    """Say what the account has to turn on, and what the machine costs there."""
    prices = {"spot": offer.price(spot=True), "on demand": offer.price(spot=False)}
    said = ", ".join(f"{kind} ${dollars:.2f}" for kind, dollars in prices.items() if dollars is not None)
    return f"{offer.opt_in} that the account has to turn on; {said}"


def conclusions(found: MachineComparison) -> list[str]:
    """Sentences about the cheapest candidate, how it compares with machines on demand, and the interval between saves."""
    best = found.candidates[0]
    place = best.offer.region + ", needs an opt-in" * bool(best.offer.opt_in)
    lines = [
        f"Cheapest: {best.name} ({place}): ${_number(best.dollars[0])} in {_number(best.hours[0])} hours; in one run of ten more "
        f"than ${_number(best.dollars[1])} and {_number(best.hours[1])} hours."
    ]
    on_demand = next((c for c in found.candidates if not c.spot and c.offer.gpu == best.offer.gpu), None)
    if best.spot and on_demand:
        lines.append(
            f"On demand the same GPUs cost ${_number(on_demand.dollars[0])} ({on_demand.offer.cloud}, {on_demand.offer.region}): "
            f"{on_demand.dollars[0] / best.dollars[0]:.1f} times as much."
        )
    if spot := next((c for c in found.candidates if c.spot), None):
        job = spot.job
        lines.append(
            f"{spot.name}: a preemption every {duration(mean_between_preemptions(found.trace, spot.nodes))}; a save holds up the "
            f"steps for {duration(job.blocking_s)} and is safe {duration(job.upload_s)} later; saves are "
            f"{duration(job.interval_s)} apart"
            + (" (Young's interval, never below the upload)." if found.config.checkpoint_every == "auto" else ".")
        )
    return lines


def assumptions(found: MachineComparison) -> list[str]:
    """Sentences about preemptions, saves and prices, for the terminal and the page."""
    rate, burst = fit(found.trace)
    measured = f", one per node every {1 / rate:.3g} hours, {burst:.2g} at once" if found.config.trace and rate else ""
    return [
        f"Preemptions: {found.trace.name}, {found.trace.end_s / 3600:,.0f} hours{measured}; {RUNS} runs, each beginning at a "
        "random time of it. Losing one node stops all nodes of a run. Stops, lost min: means of the runs; warned: lost min if "
        "the cloud's notice (AWS 120 s, Google and Azure 30 s) is used to save, where a save fits into it. Useful: the share of "
        "the paid time that is spent on work which need not be done again.",
        f"Recovery: {duration(found.config.recovery_s)}, which are paid for. Unless an option says otherwise, a save is copied "
        f"to the host's memory at {STAGED / 1e9:g} GB/s per GPU and uploaded at {PUBLISHED / 1e9:g} GB/s per machine. The "
        "dollars do not include storage, traffic and the jobs controller.",
        f"Prices: {found.config.prices}. Prices change; take a fresh catalog before you decide.",
    ]


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "never"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# The page ------------------------------------------------------------------------------------------------------------------


def write_spot_page(path: Path, found: MachineComparison, model: str) -> None:
    """Write the page. An older one stays in place until the new one is complete."""
    spot = next((c for c in found.candidates if c.spot), None)
    write_page(
        path,
        Path(__file__).with_name("spot.html.jinja"),
        title=f"{short_name(model)}: what it costs",
        lede=" ".join(conclusions(found)[:2]),
        rows=_bars(found.candidates),
        plot=_curve(spot, found) if spot else None,
        interval=conclusions(found)[-1] if spot else "",
        left_out=found.left_out,
        doubted=[(f"{o.cloud} {o.gpu}, {o.region}", doubts(o)) for o in found.doubted],
        opt_in_heading=opt_in_heading(found),
        opt_in=[(f"{o.cloud} {o.gpu}, {o.region}", opt_in(o)) for o in found.opt_in],
        assumptions=assumptions(found),
    )


def _bars(candidates: list[MachineCandidate]) -> list[dict[str, Any]]:
    """The rows of the page's table, each with a bar in percent of the largest sum.

    The bar has two parts: `median`, and `tail`, which continues it to the 90th percentile.
    """
    largest = max((c.dollars[1] for c in candidates if c.dollars[1] < math.inf), default=1.0) or 1.0
    share = [[100 * min(value / largest, 1.0) for value in c.dollars] for c in candidates]
    return [
        {
            "name": c.machines,
            "where": f"{c.offer.cloud}, {c.offer.region}{' (opt-in)' * bool(c.offer.opt_in)}",
            "kind": c.kind,
            "price": f"{c.price:.2f}",
            "dollars": [_number(value) for value in c.dollars],
            "hours": [_number(value) for value in c.hours],
            "lost": _number(lost_minutes(c.runs)) if c.spot else "–",
            "warned": _number(lost_minutes(c.warned)) if c.spot else "–",
            "useful": percent(c.useful),
            "median": median,
            "tail": percentile - median,
        }
        for c, (median, percentile) in zip(candidates, share)
    ]


def _curve(c: MachineCandidate, found: MachineComparison) -> Plot | None:
    """A plot of the useful share of the paid time over the interval between saves; None if there is but one interval.

    The axis of the intervals is logarithmic, and the chosen interval is marked.
    """
    intervals = [i for i in CURVE * c.job.interval_s if c.job.upload_s <= i < c.job.work_s] or [c.job.interval_s]
    points = []
    for interval in intervals:
        runs = simulate(replace(c.job, interval_s=interval), found.trace, CURVE_RUNS)
        points.append((interval / 60, float(np.mean(c.job.work_s / 3600 / runs.paid_hours))))
    chosen = c.job.interval_s / 60, float(np.mean(c.job.work_s / 3600 / c.runs.paid_hours))
    low, high = math.log(points[0][0]), math.log(points[-1][0])
    if high <= low:
        return None
    y_ticks = ticks(min(share for _, share in (*points, chosen)), 1.0)

    def x(minutes: float) -> float:
        return 100 * (math.log(minutes) - low) / (high - low)

    def corner(point: tuple[float, float]) -> str:
        return f"{x(point[0]):.2f} {100 * (y_ticks[-1] - point[1]) / (y_ticks[-1] - y_ticks[0]):.2f}"

    edges = [0.0, *((x(a[0]) + x(b[0])) / 2 for a, b in zip(points, points[1:])), 100.0]
    return Plot(
        title="Paid time that is useful",
        x_ticks=[(x(minutes), f"{minutes:.3g} min") for minutes, _ in points[::3]],
        y_ticks=[(100 * (y_ticks[-1] - t) / (y_ticks[-1] - y_ticks[0]), percent(t)) for t in y_ticks],
        lines=[("train", "M" + "L".join(map(corner, points))), ("held dot", f"M{corner(chosen)}h0")],
        hovers=[
            (left, right - left, f"every {minutes:.3g} min: {percent(share)}")
            for (minutes, share), left, right in zip(points, edges, edges[1:])
        ],
        legend=[("held", "chosen", f"every {chosen[0]:.3g} min: {percent(chosen[1])}")],
    )
