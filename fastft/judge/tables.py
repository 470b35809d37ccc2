"""Lay out the figures of a judging run as tables: the same ones in the terminal, in Markdown and on the page.

show(figures, Console())
text = markdown(figures)
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from fastft.judge.statistics.intervals import Interval
from fastft.judge.statistics.stats import Figures, Pair

WIDTH = 150  # characters: a narrower terminal would wrap the numbers of the widest table
FLAGS = {
    "failed": "no reply",
    "refusal": "the judge refused",
    "cut": "the judge's words were cut at --max_tokens",
    "empty": "the judge said nothing",
    "injection": "an answer speaks to the judge (asks for a score, claims to be better)",
    "quotes_injection": "the judge repeats an answer's words to it, so read what it wrote",
    "contradiction": "the judge's words and the field beside them say different things",
    "both_bad": "a person said that both answers are bad",
}
PAIR_HEADS = (
    "first : second",
    "totals",
    "ratio",
    "won",
    "tied",
    "lost",
    "unparsed",
    "≥",
    "win rate",
    "p",
    "same length",
)


class FigureTable(NamedTuple):
    """A table as texts, one row a line."""

    title: str
    heads: tuple[str, ...]
    rows: list[list[str]]


def tables(figures: Figures) -> list[FigureTable]:
    """Return all tables that are not empty."""
    made = [
        FigureTable("Pairs", PAIR_HEADS, [pair_row(pair) for pair in figures.pairs]),
        _pairs_by_judge(figures),
        _ratings(figures),
        *_scores(figures),
        _differences(figures),
        _order(figures),
        _length_control(figures),
        _agreement(figures),
        _score_agreement(figures),
    ]
    return [table for table in made if table.rows]


def pair_row(pair: Pair) -> list[str]:
    t = pair.total
    return [
        f"{pair.first} : {pair.second}",
        f"{t.first_total:.1f}:{t.second_total:.1f}" if t.first_total or t.second_total else "–",
        f"{t.percent:.0f} %" if math.isfinite(t.percent) else "–",
        *map(str, (t.wins, t.ties, t.losses, t.unparsed)),
        f"{pair.better_or_equal}/{pair.questions}",
        share(pair.win_rate),
        "–" if math.isnan(pair.p_value) else "<0.001" if pair.p_value < 0.001 else f"{pair.p_value:.3f}",
        f"{100 * pair.controlled.win_rate.value:.1f} %" if pair.controlled else "–",
    ]


def _pairs_by_judge(figures: Figures) -> FigureTable:
    rows = [[judge, *pair_row(pair)] for judge, own in figures.by_judge.items() for pair in own.pairs]
    return FigureTable("Pairs, by each judge", ("judge", *PAIR_HEADS), rows)


def _ratings(figures: Figures) -> FigureTable:
    """The table of ratings, for three models or more; two are better compared by their win rate."""
    ratings = figures.ratings if len(figures.ratings) > 2 else {}
    rows = [[name, number(interval, 0)] for name, interval in ratings.items()]
    return FigureTable("Bradley-Terry ratings (Elo scale, mean 1000)", ("model", "rating"), rows)


def _scores(figures: Figures) -> list[FigureTable]:
    singles = figures.singles
    rows = [[s.model, number(s.score), str(s.unparsed)] for s in singles]
    by_judge = [
        [judge, s.model, number(s.score), str(s.unparsed)]
        for judge, own in figures.by_judge.items()
        for s in own.singles
    ]
    categories = list(dict.fromkeys(category for s in singles for category in s.by_category))
    by_category = [[c, *(f"{s.by_category.get(c, math.nan):.2f}" for s in singles)] for c in categories]
    return [
        FigureTable("Scores, judged alone", ("model", "mean score", "unparsed"), rows),
        FigureTable("Scores, by each judge", ("judge", "model", "mean score", "unparsed"), by_judge),
        FigureTable("Scores by category", ("category", *(s.model for s in singles)), by_category),
    ]


def _differences(figures: Figures) -> FigureTable:
    rows = [
        [f"{d.second} - {d.first}", number(d.difference), f"{d.p_value:.3f}", _needed(d.questions_needed)]
        for d in figures.differences
    ]
    heads = ("models", "mean difference", "p", f"questions to see {figures.to_see:g}")
    return FigureTable("Differences", heads, rows)


def _order(figures: Figures) -> FigureTable:
    rows = [
        [
            judge,
            *map(str, (p.both_orders, p.consistent, p.half_flips, p.flips)),
            share(p.flip_rate),
            share(p.first_wins),
        ]
        for judge, p in figures.position.items()
    ]
    heads = (
        "judge",
        "in both orders",
        "same verdict",
        "win and tie",
        "flipped",
        "share flipped",
        "decisive ones won by the first shown",
    )
    return FigureTable("Order", heads, rows)


def _length_control(figures: Figures) -> FigureTable:
    rows = [
        [
            pair.first,
            pair.second,
            *(_coefficient(c) for c in (pair.controlled.quality, pair.controlled.length, pair.controlled.first)),
            share(pair.controlled.win_rate),
        ]
        for pair in figures.pairs
        if pair.controlled
    ]
    heads = ("first", "second", "second's quality", "being longer", "being shown first", "win rate, same length")
    return FigureTable("What moves a verdict (log odds ± standard error)", heads, rows)


def _agreement(figures: Figures) -> FigureTable:
    rows = [
        [*a.judges, str(a.looks), f"{100 * a.agreed:.1f} %", f"{a.kappa:.2f}", str(a.flips)] for a in figures.agreement
    ]
    heads = ("judge", "judge", "looks", "agreed", "kappa", "opposite winners")
    return FigureTable("Judges among themselves", heads, rows)


def _score_agreement(figures: Figures) -> FigureTable:
    rows = [
        [
            *a.judges,
            str(a.looks),
            "–" if math.isnan(a.correlation) else f"{a.correlation:.2f}",
            f"{a.difference:+.2f}",
        ]
        for a in figures.score_agreement
    ]
    heads = ("judge", "judge", "looks", "correlation", "second gives more by")
    return FigureTable("Judges among themselves", heads, rows)


def share(interval: Interval | None) -> str:
    """Write a share in percent with its interval."""
    if interval is None or math.isnan(interval.value):
        return "–"
    return f"{100 * interval.value:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def number(interval: Interval | None, digits: int = 2) -> str:
    """Write a value with its interval."""
    if interval is None or math.isnan(interval.value):
        return "–"
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _coefficient(found: tuple[float, float] | None) -> str:
    return "–" if found is None else f"{found[0]:+.2f} ± {found[1]:.2f}"


def _needed(questions: int) -> str:
    return f"{questions:,}" if questions else "–"


def remarks(figures: Figures) -> list[str]:
    """Return the notes that a reader of the tables needs."""
    by = ", ".join(figures.judges)
    lines = [
        f"{figures.judgments:,} judgments by {by}; {figures.unparsed} could not be read and are left out of every mean."
    ]
    lines += [f"{count} flagged {flag}: {FLAGS.get(flag, flag)}." for flag, count in sorted(figures.flags.items())]
    lines += [f"{count} without a reply, because {why}" for why, count in figures.failures.items()]
    lines.append("Intervals: 95 %, by resampling questions. p: by flipping signs of questions.")
    if figures.pairs:
        lines.append(
            "Ratio: the second's total in percent of the first's. Won, tied, lost: the second's judgments. ≥: questions on which "
            "it won at least half. Win rate: a tie is half a win. Same length: the win rate that a regression predicts for "
            "answers of equal length."
        )
        lines += _what_the_intervals_allow(figures)
        if any(position.one_order for position in figures.position.values()):
            lines.append(
                "Only one order was judged, so an advantage of being shown first cannot be told from being better."
            )
    return lines


def _what_the_intervals_allow(figures: Figures) -> list[str]:
    judged = [pair for pair in figures.pairs if pair.questions]
    if not judged:
        return []
    widest = max(pair.win_rate.high - pair.win_rate.low for pair in judged)
    needed = max(pair.questions_needed for pair in judged)
    line = f"Half an interval is up to {50 * widest:.0f} points wide: closer models cannot be told apart with these questions."
    if needed:
        line += f" To tell {50 + figures.to_see:g} % from 50 % (power 80 %) would take {needed:,} questions."
    return [line]


def show(figures: Figures, console: Any) -> None:
    """Print the tables and remarks on a rich console."""
    from rich.table import Table

    console.width = max(console.width, WIDTH)
    for title, heads, rows in tables(figures):
        table = Table(*heads, title=title, show_edge=False, title_justify="left")
        for column in table.columns[1:]:  # long names wrap, numbers do not
            column.no_wrap = True
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in remarks(figures):
        console.print(line, markup=False)


def markdown(figures: Figures) -> str:
    """Return the tables and remarks as Markdown."""
    parts = [f"**{title}**\n\n{markdown_table(heads, rows)}" for title, heads, rows in tables(figures)]
    return "\n\n".join([*parts, "\n".join(f"- {_cell(line)}" for line in remarks(figures))]) + "\n"


def markdown_table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in (heads, ["---"] * len(heads), *rows))


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
