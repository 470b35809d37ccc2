"""Show an evaluation: tables in the terminal, the verdict in a sentence, and the page evaluation.html.

show(made, Console())
print(verdict(made))
write_evaluation_page(Path("evaluated/evaluation.html"), made)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastft.common.html import Plot, compact, percent, precise, ticks, write_page
from fastft.compose.router.figures.columns import alone
from fastft.compose.router.figures.evaluation import TAGS_SHOWN, Evaluation, System, Tag
from fastft.compose.router.figures.verdict import counted
from fastft.compose.router.figures.verdict import verdict as verdict_of
from fastft.judge.statistics.intervals import Interval
from fastft.judge.tables import FigureTable, number, share

WIDTH = 150
"""Characters of a terminal: a narrower one would wrap the numbers."""
QUERY_SHOWN = 1500
"""Characters of an example's query."""


def verdict(made: Evaluation) -> str:
    """Whether the router is worth it, in a sentence or two."""
    ratio = made.cost_of_best_single
    cost = f" It costs {share(ratio)} of what that model costs." if ratio else ""
    if made.judged is None:
        return (
            "Whether this router is worth it is not known: all of these queries share text with training queries, so they say "
            f"nothing about new ones.{cost}"
        )
    said = verdict_of(*made.judged, made.default, made.unit)
    rests = f" That is without the {made.shared:,} that share text with training queries." if made.shared else ""
    return f"{said[0].upper()}{said[1:]}.{rests}{cost}"


def tables(made: Evaluation) -> list[FigureTable]:
    """The tables that are not empty, as texts."""
    found = [
        _systems_table(made),
        _tags_table("By set", "set", made.by_set, made),
        _tags_table("By tag", "tag", made.by_tag, None),
        FigureTable(
            "Sets left out of the training",
            ("set", "queries", "trained on", "router", "best single of the rest", "difference [95 %]"),
            [
                [
                    each.set,
                    f"{each.queries:,}",
                    f"{each.trained_on:,}",
                    f"{each.router:.2f}",
                    f"{each.best_single} {each.best_single_score:.2f}",
                    number(each.gain),
                ]
                for each in made.left_out
            ],
        ),
    ]
    return [table for table in found if table.rows]


def _systems_table(made: Evaluation) -> FigureTable:
    heads = ["", "mean [95 %]", "router minus it", "of the oracle's gap", "MTR", "uplift"]
    priced = made.router.usd is not None
    rows = [_system_row(system, priced) for system in made.systems]
    return FigureTable(
        f"Systems ({made.measure}, {made.unit})", (*heads, *["$ per 1,000"] * priced, "what it is"), rows
    )


def _system_row(system: System, priced: bool) -> list[str]:
    gap = system.share_of_gap
    return [
        system.name,
        number(system.mean),
        number(system.router_minus_it),
        percent(gap.value) if gap else "–",
        f"{system.mean_task_rank:.2f}",
        percent(system.uplift),
        *([f"{system.usd:.4g}"] if priced and system.usd is not None else []),
        system.says,
    ]


def _tags_table(title: str, kind: str, tags: Sequence[Tag], made: Evaluation | None) -> FigureTable:
    """`made` adds the columns that are known for sets alone: what the baselines score."""
    if len(tags) > TAGS_SHOWN:
        title = f"{title} (the {TAGS_SHOWN} with the most queries, of {len(tags):,})"
        tags = sorted(tags, key=lambda tag: -tag.queries)[:TAGS_SHOWN]
    others = [s for s in made.systems if s.name in ("uniform blend", "best per tag", "oracle")] if made else []
    heads = (
        kind, "queries", "router", "best single", "difference [95 %]", *(each.name for each in others), "best here",
        "chosen most",
    )  # fmt: skip
    rows = [
        [tag.name, f"{tag.queries:,}", f"{tag.router:.2f}", f"{tag.best_single:.2f}", number(tag.gain)]
        + [f"{each.by_set[tag.name]:.2f}" for each in others]
        + [f"{tag.best} {tag.best_score:.2f}", _most(tag)]
        for tag in tags
    ]
    return FigureTable(title, heads, rows)


def _most(tag: Tag) -> str:
    model, count = next(iter(tag.chosen.items()))
    return f"{model} {percent(count / tag.queries)}".replace(" %", "\u00a0%")


def remarks(made: Evaluation) -> list[str]:
    """What a reader of the tables needs to know."""
    blend = made.drawn_blend
    sets = "1 set" if len(made.sets) == 1 else f"{len(made.sets)} sets"
    sigmas = abs(blend["drawn"] - blend["mean_of_models"]) / max(blend["standard_error"], 1e-12)
    lines = [
        f"{counted(made.queries)} of {sets}. A set is a query's first tag, or its file if it has no tag; every "
        "set counts the same in a mean. Intervals: 95 %, by drawing queries anew in every set, the same for all systems.",
        *made.remarks,
        f"Best single: {made.default}, which training chose; it answers {percent(made.left_to_default)} of the queries. "
        f"{percent(made.unlike)} of the queries are unlike those of the training.",
        "Best per tag needs to know which set a question is from, and the oracle which answer will be best: neither can be "
        "served. Where the router is no better than best per tag, all it does is tell the sets apart.",
        "Of the oracle's gap: how far a system goes from the best single model (0 %) to the oracle (100 %).",
        "MTR, mean task rank: the rank of a system among itself and the models alone in each set, 1 is the best, equal ones "
        "share the mean of their ranks; the mean over sets. Uplift: the share of sets in which no model alone is better.",
        f"A uniform blend scores the mean of its models on single questions: drawn once it has {blend['drawn']:.2f}, the mean is "
        f"{blend['mean_of_models']:.2f}, one standard error of the draw {blend['standard_error']:.2f} ({sigmas:.1f} away). "
        "It can be better only over several turns.",
    ]
    if made.curve.area:
        lines.append(f"Area under the curve by {made.curve.by}: {number(made.curve.area, 3)}, {made.curve.area_says}.")
    else:
        lines.append(f"Area under the curve by {made.curve.by}: {made.curve.area_says}.")
    if pair := made.pair:
        half = f"; half of the gap takes {percent(pair.calls_for_half)} of the calls" if pair.calls_for_half else ""
        lines.append(
            f"RouteLLM's APGR of {pair.strong} (strong) and {pair.weak} (weak): {number(pair.apgr, 3)}, the share of the gap "
            "between the two that is recovered if queries are sent to the strong one in the order of the router's "
            f"preference, as the mean over all shares of calls; a random order has 0.5{half}."
        )
    if made.calibration_error is not None:
        lines.append(
            f"The probabilities of success are off by {made.calibration_error:.3f} on average (expected calibration error)."
        )
    return [*lines, *_about_leaks(made)]


def _about_leaks(made: Evaluation) -> list[str]:
    if made.leaks is None:
        return [
            "Not checked whether test queries share text with training queries: this router keeps no hashes of them."
        ]
    if not made.leaks["queries"]:
        return ["No test query shares 13 words in a row with a training query, or is a shorter one."]
    sets = ", ".join(f"{name} {count:,}" for name, count in made.leaks["by_set"].items())
    example = next(iter(made.leaks["runs"]))
    line = (
        f"Leak check: {made.leaks['queries']:,} of {made.queries:,} test queries share 13 words in a row with a training query, "
        f"or are a shorter one ({sets}), most often “{' '.join(example.split())}”."
    )
    if not (without := made.without_leaks):
        return [f"{line} That is all of them: these figures say nothing about new queries."]
    gain = Interval(*without["gain_over_best_single"])
    return [
        f"{line} Without them: router {without['mean']:.2f}, best single {without['best_single']:.2f}, difference {number(gain)}."
    ]


def show(made: Evaluation, console: Any) -> None:
    """Print the tables and remarks on a rich console."""
    from rich.table import Table

    console.width = max(console.width, WIDTH)
    for title, heads, rows in tables(made):
        table = Table(*heads, title=title, show_edge=False, title_justify="left")
        for column in table.columns[1:-1]:
            column.no_wrap = True
        for row in rows:
            table.add_row(*row)
        console.print(table, markup=False)
    for line in remarks(made):
        console.print(line, markup=False)


# --- The page ---------------------------------------------------------------------------------------------------------


def write_evaluation_page(path: Path, made: Evaluation) -> None:
    """Write the page: the verdict, tables, the curve, who was chosen and who was best, and examples."""
    write_page(
        path,
        Path(__file__).with_name("evaluation.html.jinja"),
        title=f"A router for {len(made.candidates)} models",
        lede=verdict(made),
        made=made,
        systems=_systems_table(made),
        tables=tables(made)[1:],
        remarks=remarks(made),
        plot=_plot(made),
        curve_says=_curve_says(made),
        confusion=_confusion_rows(made),
        examples=[(f"{kind} than the best single model", made.examples[kind.lower()]) for kind in ("Better", "Worse")],
        longest=QUERY_SHOWN,
        three=number,
    )  # fmt: skip


def _confusion_rows(made: Evaluation) -> list[tuple[str, int, list[tuple[int, float]]]]:
    """(model, how often it was chosen, (queries, share of the row) of each column) for the models that were chosen."""
    rows = []
    for name, counts in zip(made.candidates, made.confusion):
        total = sum(counts)
        rows.append((name, round(total), [(round(count), count / total if total else 0.0) for count in counts]))
    return rows


def _dots_say(made: Evaluation) -> str:
    dots = [made.system(alone(name)) for name in made.candidates]
    ordered = sorted(zip(dots, made.candidates), key=lambda dot: dot[0].usd or 0.0)
    return ", ".join(f"{name} ({dot.mean.value:.2f} at ${precise(dot.usd or 0.0)})" for dot, name in ordered)


def _curve_says(made: Evaluation) -> str:
    if made.curve.by == "usd_weight":
        return (
            "Each point is the router at another usd_weight: the larger, the more a dollar counts against a good answer. "
            f"The lines around it are the 95 % interval; the dots are the models, each alone, from the left: {_dots_say(made)}."
        )
    return (
        "Each point is the router at another margin: the smaller, the more queries leave the best single model. Without "
        "prices, the share that leaves stands for the effort. The lines around it are the 95 % interval; the dot is the best "
        "single model."
    )


def _plot(made: Evaluation) -> Plot:
    curve, priced = made.curve, made.curve.by == "usd_weight"
    models = {name: made.system(alone(name)) for name in made.candidates} if priced else {}
    dots = [(s.usd or 0.0, s.mean.value, name) for name, s in models.items()]
    dots = dots or [(0.0, made.system("best single").mean.value, made.default)]
    xs = [*curve.x, *(x for x, _, _ in dots)]
    ys = [*(v for s in curve.score for v in (s.low, s.high)), *(y for _, y, _ in dots)]
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs)), ticks(min(ys), max(ys))

    def x(value: float) -> float:
        return 100 * (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def y(value: float) -> float:
        return 100 * (y_ticks[-1] - value) / (y_ticks[-1] - y_ticks[0])

    def line(values: Sequence[float]) -> str:
        return "M" + "L".join(f"{x(a):.2f} {y(b):.2f}" for a, b in zip(curve.x, values)) + "h0"

    shown = (lambda v: f"${precise(v)}") if priced else percent
    setting = "usd_weight" if priced else "margin"
    hovers = []
    edges = [x(value) for value in curve.x]
    for i, (score, at) in enumerate(zip(curve.score, curve.x)):
        left = (edges[i - 1] + edges[i]) / 2 if i else 0.0
        right = (edges[i] + edges[i + 1]) / 2 if i + 1 < len(edges) else 100.0
        text = f"{shown(at)}: {number(score)}, {setting} {precise(curve.settings[i])}"
        hovers.append((left, max(right - left, 0.0), text))
    return Plot(
        "Score over dollars per 1,000 queries"
        if priced
        else "Score over the share of queries that leave the best single",
        x_ticks=[(x(t), shown(t) if not priced else f"${compact(t)}" if t >= 1 else f"${t:g}") for t in x_ticks],
        y_ticks=[(y(t), precise(t)) for t in y_ticks],
        lines=[
            ("train faint", line([score.low for score in curve.score])),
            ("train faint", line([score.high for score in curve.score])),
            ("train", line([score.value for score in curve.score])),
            ("held dot", "".join(f"M{x(a):.2f} {y(b):.2f}h0" for a, b, _ in dots)),
        ],
        hovers=hovers,
        legend=[("train", "router", ""), ("held", "each model alone" if priced else "best single", "")],
    )
