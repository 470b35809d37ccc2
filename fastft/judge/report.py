"""Write the results of a judging run: results.json, results.md for a README, and report.html with every answer.

fastft report JUDGED_DIR      # again, from judgments.jsonl, questions.jsonl and answers.jsonl there
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastft.common.files import write_whole
from fastft.common.html import write_page
from fastft.common.records import repair_text
from fastft.judge.judgment import Judgment, read_judgments
from fastft.judge.questions import Answer, Question, load_questions, read_answers
from fastft.judge.statistics.intervals import Interval
from fastft.judge.statistics.stats import Figures, Lengths, Pair, compute
from fastft.judge.tables import markdown, number, remarks, share, tables

JUDGMENTS, QUESTIONS, ANSWERS = "judgments.jsonl", "questions.jsonl", "answers.jsonl"


def write_all(
    directory: Path,
    judgments: list[Judgment],
    questions: list[Question],
    answers: list[Answer],
    to_see: float | None = None,
) -> Figures:
    """Write results.json, results.md and report.html, each whole or not at all, the page last. Returns the figures."""
    figures = write_figures(directory, judgments, answers, to_see)
    write_judge_page(directory / "report.html", figures, judgments, questions, answers)
    return figures


def write_figures(
    directory: Path, judgments: list[Judgment], answers: list[Answer], to_see: float | None = None
) -> Figures:
    """Write results.json and results.md. Returns the figures."""
    figures = compute(judgments, answer_lengths(answers), to_see)
    write_whole(
        directory / "results.json",
        repair_text(json.dumps(_plain(asdict(figures)), indent=1, ensure_ascii=False)) + "\n",
    )
    write_whole(directory / "results.md", repair_text(markdown(figures)))
    return figures


def report_again(directory: Path) -> Path:
    """Write the report of a judged directory again, from its files. Raises UserError if there are no judgments."""
    judgments = read_judgments(directory / JUDGMENTS)
    questions = load_questions(directory / QUESTIONS) if (directory / QUESTIONS).is_file() else []
    answers = read_answers(directory / ANSWERS) if (directory / ANSWERS).is_file() else []
    write_all(directory, judgments, questions, answers)
    return directory / "report.html"


def answer_lengths(answers: list[Answer]) -> Lengths:
    """Return the characters of every answer, by question and model."""
    return {(answer.question_id, answer.model): sum(map(len, answer.turns)) for answer in answers}


def _plain(value: Any) -> Any:
    """Return the value with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_judge_page(
    path: Path, figures: Figures, judgments: list[Judgment], questions: list[Question], answers: list[Answer]
) -> None:
    """Write report.html: the tables, plots, and every question with its answers and judgments."""
    # A pair has one name, whichever model was shown first. The template must not sort, because jinja's order differs from
    # Python's.
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
    """Return the result in one sentence: of the pair that differs most, or of the best mean score."""
    judged = [pair for pair in figures.pairs if pair.questions]
    if figures.pairs and not judged:
        return "None of the judgments could be read."
    if judged:
        pair = max(judged, key=lambda pair: abs(pair.win_rate.value - 0.5))
        name, other, rate = pair.second, pair.first, pair.win_rate
        if rate.value < 0.5:
            name, other, rate = other, name, Interval(1 - rate.value, 1 - rate.high, 1 - rate.low)
        sure = "" if rate.low > 0.5 and pair.p_value < 0.05 else " That may be chance."
        return f"{name} wins {share(rate)} of the comparisons with {other}, ties counted half.{sure}"
    best = max(figures.singles, key=lambda single: single.score.value if single.score else -1)
    if not best.score:
        return "None of the judgments could be read."
    return f"{best.model} has the highest mean score: {number(best.score)}."


def _category_bars(pair: Pair) -> list[dict[str, Any]]:
    """Return the shares of judgments won, tied and lost in each category, in percent."""
    rows = []
    for category, total in pair.by_category.items():
        games = total.wins + total.ties + total.losses
        shares = [100 * part / games if games else 0 for part in (total.wins, total.ties, total.losses)]
        rows.append({"name": category, "shares": shares, "total": total})
    return rows


def _matrix(figures: Figures) -> list[tuple[str, list[tuple[str, float | None]]]]:
    """Return the win rate of each row's model against each column's."""
    rates: dict[tuple[str, str], float] = {}
    for pair in (pair for pair in figures.pairs if pair.questions):
        rates[pair.second, pair.first] = pair.win_rate.value
        rates[pair.first, pair.second] = 1 - pair.win_rate.value
    return [(row, [(column, rates.get((row, column))) for column in figures.models]) for row in figures.models]


def _rating_lines(figures: Figures) -> list[dict[str, Any]]:
    """Return the ratings with their places on a line of 100 units."""
    if len(figures.ratings) < 2:
        return []
    low = min(estimate.low for estimate in figures.ratings.values())
    span = max(estimate.high for estimate in figures.ratings.values()) - low or 1.0

    def place(value: float) -> float:
        return 100 * (value - low) / span

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
) -> Iterator[dict[str, Any]]:
    """Yield each judged question with its answers and judgments, and the keywords for the page's filter."""
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
    """Return the (judge, turn, models) whose two orders have opposite winners."""
    winners: dict[tuple, set[str]] = defaultdict(set)
    for j in judgments:
        if j.winner not in (None, "tie"):
            winners[_look(j)].add(j.winner)
    return {look for look, names in winners.items() if len(names) > 1}


def _look(judgment: Judgment) -> tuple:
    return judgment.judge, judgment.turn, frozenset((judgment.model_a, judgment.model_b))


def _kinds(judgment: Judgment, flipped: set[tuple]) -> str:
    """Return the keywords of a judgment for the page's filter."""
    kinds = ["flip"] * (_look(judgment) in flipped) + ["tie"] * (judgment.winner == "tie")
    kinds += ["unparsed"] * (not judgment.parsed) + ["flagged"] * bool(judgment.flags)
    return " ".join(kinds)
