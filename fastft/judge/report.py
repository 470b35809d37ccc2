"""What a judging run shows: tables in the terminal, results.json, results.md for a README, report.html with every answer.

fastft report JUDGED_DIR      # anew, from judgments.jsonl, questions.jsonl and answers.jsonl there
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastft.common.files import write_whole
from fastft.common.html import write_page
from fastft.common.records import repair_text
from fastft.judge.judgment import Judgment, read_judgments
from fastft.judge.questions import Answer, Question, load_questions, read_answers
from fastft.judge.stats import Estimate, Figures, Lengths, Pair, compute

JUDGMENTS, QUESTIONS, ANSWERS = "judgments.jsonl", "questions.jsonl", "answers.jsonl"
WIDTH = 150
FLAGS = {
    "failed": "no reply, after all retries",
    "refusal": "the judge refused",
    "cut": "the judge's words were cut at --max_tokens",
    "empty": "the judge said nothing",
    "injection": "an answer speaks to the judge (asks for a score, claims to be better)",
    "quotes_injection": "the judge repeats an answer's words to it: read it",
    "contradiction": "the text of a review says other scores than its field",
}


def write_all(
    directory: Path,
    judgments: list[Judgment],
    questions: list[Question],
    answers: list[Answer],
    to_see: float | None = None,
) -> Figures:
    """results.json, results.md and report.html, each whole or not there, the page last. Returns the figures."""
    figures = write_figures(directory, judgments, answers, to_see)
    write_judge_page(directory / "report.html", figures, judgments, questions, answers)
    return figures


def write_figures(
    directory: Path, judgments: list[Judgment], answers: list[Answer], to_see: float | None = None
) -> Figures:
    """results.json and results.md. Returns the figures."""
    figures = compute(judgments, answer_lengths(answers), to_see)
    write_whole(
        directory / "results.json",
        repair_text(json.dumps(_plain(asdict(figures)), indent=1, ensure_ascii=False)) + "\n",
    )
    write_whole(directory / "results.md", repair_text(markdown(figures)))
    return figures


def report_again(directory: Path) -> Path:
    """The report of a judged directory, from its files. Raises UserError where they are not there."""
    judgments = read_judgments(directory / JUDGMENTS)
    questions = load_questions(directory / QUESTIONS) if (directory / QUESTIONS).is_file() else []
    answers = read_answers(directory / ANSWERS) if (directory / ANSWERS).is_file() else []
    write_all(directory, judgments, questions, answers)
    return directory / "report.html"


def answer_lengths(answers: list[Answer]) -> Lengths:
    return {(answer.question_id, answer.model): sum(map(len, answer.turns)) for answer in answers}


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Tables --------------------------------------------------------------------------------------------------------------------

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


def pair_row(pair: Pair) -> list[str]:
    t = pair.total
    return [
        f"{pair.first} : {pair.second}",
        f"{t.first_total:.1f}:{t.second_total:.1f}",
        f"{t.percent:.0f} %" if math.isfinite(t.percent) else "–",
        *map(str, (t.wins, t.ties, t.losses, t.unparsed)),
        f"{pair.better_or_equal}/{pair.questions}",
        share(pair.win_rate),
        "–" if math.isnan(pair.p_value) else "<0.001" if pair.p_value < 0.001 else f"{pair.p_value:.3f}",
        f"{100 * pair.controlled.win_rate.value:.1f} %" if pair.controlled else "–",
    ]


def share(estimate: Estimate | None) -> str:
    if estimate is None or math.isnan(estimate.value):
        return "–"
    return f"{100 * estimate.value:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def number(estimate: Estimate | None, digits: int = 2) -> str:
    if estimate is None or math.isnan(estimate.value):
        return "–"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def tables(figures: Figures) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """(title, heads, rows) of all that is shown in the terminal, in Markdown and on the page."""
    found = []
    if figures.pairs:
        found.append(("Pairs", PAIR_HEADS, [pair_row(pair) for pair in figures.pairs]))
        rows = [[judge, *pair_row(pair)] for judge, own in figures.by_judge.items() for pair in own.pairs]
        if rows:
            found.append(("Pairs, by each judge", ("judge", *PAIR_HEADS), rows))
    if len(figures.ratings) > 2:
        rows = [[name, number(estimate, 0)] for name, estimate in figures.ratings.items()]
        found.append(("Bradley-Terry ratings (Elo scale, mean 1000)", ("model", "rating"), rows))
    if figures.singles:
        rows = [[s.model, number(s.score), str(s.unparsed)] for s in figures.singles]
        found.append(("Scores, judged alone", ("model", "mean score", "unparsed"), rows))
        rows = [
            [j, s.model, number(s.score), str(s.unparsed)] for j, own in figures.by_judge.items() for s in own.singles
        ]
        if rows:
            found.append(("Scores, by each judge", ("judge", "model", "mean score", "unparsed"), rows))
        categories = list(dict.fromkeys(category for s in figures.singles for category in s.by_category))
        rows = [[c, *(f"{s.by_category.get(c, math.nan):.2f}" for s in figures.singles)] for c in categories]
        found.append(("Scores by category", ("category", *(s.model for s in figures.singles)), rows))
    if figures.differences:
        rows = [
            [f"{d.second} - {d.first}", number(d.difference), f"{d.p_value:.3f}", _needed(d.questions_needed)]
            for d in figures.differences
        ]
        found.append(("Differences", ("models", "mean difference", "p", f"questions to see {figures.to_see:g}"), rows))
    rows = [
        [
            judge,
            *map(str, (p.both_orders, p.consistent, p.half_flips, p.flips)),
            share(p.flip_rate),
            share(p.first_wins),
        ]
        for judge, p in figures.position.items()
    ]
    if rows:
        heads = (
            "judge",
            "in both orders",
            "same verdict",
            "win and tie",
            "flipped",
            "share flipped",
            "decisive ones won by the first shown",
        )
        found.append(("Order", heads, rows))
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
    if rows:
        heads = ("first", "second", "second's quality", "being longer", "being shown first", "win rate, same length")
        found.append(("What moves a verdict (log odds ± standard error)", heads, rows))
    if figures.agreement:
        rows = [
            [*a.judges, str(a.looks), f"{100 * a.agreed:.1f} %", f"{a.kappa:.2f}", str(a.flips)]
            for a in figures.agreement
        ]
        found.append(
            ("Judges among themselves", ("judge", "judge", "looks", "agreed", "kappa", "opposite winners"), rows)
        )
    if figures.score_agreement:
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
        found.append(("Judges among themselves", heads, rows))
    return found


def _coefficient(found: tuple[float, float] | None) -> str:
    return "–" if found is None else f"{found[0]:+.2f} ± {found[1]:.2f}"


def _needed(questions: int) -> str:
    return f"{questions:,}" if questions else "–"


def remarks(figures: Figures) -> list[str]:
    """What a reader of the tables must know."""
    by = ", ".join(figures.judges)
    lines = [f"{figures.judgments:,} judgments by {by}; {figures.unparsed} could not be read and are in no mean."]
    lines += [f"{count} flagged {flag}: {FLAGS.get(flag, flag)}." for flag, count in sorted(figures.flags.items())]
    lines.append("Intervals: 95 %, questions resampled. p: sign flips by question.")
    if figures.pairs:
        lines.append(
            "Ratio: the second's total in percent of the first's. Won, tied, lost: the second's judgments. ≥: questions on which "
            "it won at least half. Win rate: a tie is half a win; same length: what a regression makes of it at equal length."
        )
        judged = [pair for pair in figures.pairs if pair.questions]
        if judged:
            widest = max(pair.win_rate.high - pair.win_rate.low for pair in judged)
            needed = max(pair.questions_needed for pair in judged)
            lines.append(
                f"Half an interval is up to {50 * widest:.0f} points wide: closer models cannot be told apart with these "
                f"questions. To see {50 + figures.to_see:g} % instead of 50 (power 80 %) takes {_needed(needed)}."
            )
        if any(position.one_order for position in figures.position.values()):
            lines.append("Only one order was judged: what the place alone is worth cannot be told from who is better.")
    return lines


def show(figures: Figures, console) -> None:
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
    parts = []
    for title, heads, rows in tables(figures):
        parts.append(f"**{title}**\n\n{markdown_table(heads, rows)}")
    return "\n\n".join([*parts, "\n".join(f"- {_cell(line)}" for line in remarks(figures))]) + "\n"


def markdown_table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in (heads, ["---"] * len(heads), *rows))


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


# The page ------------------------------------------------------------------------------------------------------------------


def write_judge_page(
    path: Path, figures: Figures, judgments: list[Judgment], questions: list[Question], answers: list[Answer]
) -> None:
    # A pair has one name, whoever was shown first. Templates sort nothing: theirs is another order than Python's.
    pair_names = {frozenset((pair.first, pair.second)): f"{pair.first} : {pair.second}" for pair in figures.pairs}
    write_page(
        path,
        Path(__file__).with_name("judge.html.jinja"),
        title="Judged: " + ", ".join(figures.models),
        lede=_lede(figures),
        tables=tables(figures),
        remarks=remarks(figures),
        categories=[(f"{pair.first} : {pair.second}", _category_bars(pair)) for pair in figures.pairs],
        matrix=_matrix(figures) if len(figures.models) > 2 else None,
        models=figures.models,
        judges=figures.judges,
        ratings=_rating_lines(figures),
        questions=list(_browser(judgments, questions, answers, pair_names)),
        question_categories=list(dict.fromkeys(judgment.category for judgment in judgments)),
        compared=[*pair_names.values(), *(single.model for single in figures.singles)],
    )


def _lede(figures: Figures) -> str:
    judged = [pair for pair in figures.pairs if pair.questions]
    if figures.pairs and not judged:
        return "None of the judgments could be read."
    if judged:
        pair = max(judged, key=lambda pair: abs(pair.win_rate.value - 0.5))
        name, other, rate = pair.second, pair.first, pair.win_rate
        if rate.value < 0.5:
            name, other, rate = other, name, Estimate(1 - rate.value, 1 - rate.high, 1 - rate.low)
        sure = "" if rate.low > 0.5 and pair.p_value < 0.05 else " That may be chance."
        return f"{name} wins {share(rate)} of the comparisons with {other}, ties counted half.{sure}"
    best = max(figures.singles, key=lambda single: single.score.value if single.score else -1)
    if not best.score:
        return "None of the judgments could be read."
    return f"{best.model} has the highest mean score: {number(best.score)}."


def _category_bars(pair: Pair) -> list[dict[str, Any]]:
    rows = []
    for category, total in pair.by_category.items():
        games = total.wins + total.ties + total.losses
        shares = [100 * part / games if games else 0 for part in (total.wins, total.ties, total.losses)]
        rows.append({"name": category, "shares": shares, "total": total})
    return rows


def _matrix(figures: Figures) -> list[tuple[str, list[tuple[str, float | None]]]]:
    """Rows: the win rate of the row's model against the column's."""
    rates: dict[tuple[str, str], float] = {}
    for pair in (pair for pair in figures.pairs if pair.questions):
        rates[pair.second, pair.first] = pair.win_rate.value
        rates[pair.first, pair.second] = 1 - pair.win_rate.value
    return [(row, [(column, rates.get((row, column))) for column in figures.models]) for row in figures.models]


def _rating_lines(figures: Figures) -> list[dict[str, Any]]:
    if len(figures.ratings) < 2:
        return []
    low = min(estimate.low for estimate in figures.ratings.values())
    span = max(estimate.high for estimate in figures.ratings.values()) - low or 1.0
    place = lambda value: 100 * (value - low) / span  # noqa: E731
    return [
        {
            "name": name,
            "text": number(e, 0),
            "low": place(e.low),
            "width": place(e.high) - place(e.low),
            "middle": place(e.value),
        }
        for name, e in figures.ratings.items()
    ]


def _browser(
    judgments: list[Judgment], questions: list[Question], answers: list[Answer], pair_names: dict[frozenset, str]
):
    """Each judged question with its answers, its judgments, and what they can be filtered by."""
    texts = {question.id: question for question in questions}
    given = {(answer.question_id, answer.model): answer for answer in answers}
    by_question: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        by_question[judgment.question_id].append(judgment)
    for identity, own in by_question.items():
        models = list(dict.fromkeys(name for j in own for name in (j.model_a, j.model_b) if name))
        question = texts.get(identity)
        flipped = _flipped(own)
        yield {
            "id": identity,
            "category": own[0].category,
            "turns": question.turns if question else (),
            "reference": question.reference if question else None,
            "answers": [(model, given[identity, model].turns) for model in models if (identity, model) in given],
            "judgments": [
                (j, _kinds(j, flipped), pair_names[frozenset((j.model_a, j.model_b))] if j.model_b else j.model_a)
                for j in own
            ],
        }


def _flipped(judgments: list[Judgment]) -> set[tuple]:
    """Looks (judge, turn, models) whose two orders name opposite winners."""
    winners: dict[tuple, set[str]] = defaultdict(set)
    for j in judgments:
        if j.winner not in (None, "tie"):
            winners[_look(j)].add(j.winner)
    return {look for look, names in winners.items() if len(names) > 1}


def _look(judgment: Judgment) -> tuple:
    return judgment.judge, judgment.turn, frozenset((judgment.model_a, judgment.model_b))


def _kinds(judgment: Judgment, flipped: set[tuple]) -> str:
    """What the page's filter finds it under."""
    kinds = ["flip"] * (_look(judgment) in flipped) + ["tie"] * (judgment.winner == "tie")
    kinds += ["unparsed"] * (not judgment.parsed) + ["flagged"] * bool(judgment.flags)
    return " ".join(kinds)
