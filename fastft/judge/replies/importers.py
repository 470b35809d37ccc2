"""The reviews of Vicuna's original evaluation as judgments: `fastft judge --reviews DIR --scores field|text`.

A review has the judge's words (`text`) and a pair of scores (`score`) that people filled in where the original parser failed.
"field" takes the latter, "text" reads the words and names every review whose field says something else. The files are
review_FIRST_SECOND.jsonl; the first model was shown first, unless the ids of the answers in a review say otherwise: then
those are believed, and the file is named.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from fastft.common.records import read_records
from fastft.errors import UserError
from fastft.judge.judgment import Judgment
from fastft.judge.questions import Answer, Question, load_questions
from fastft.judge.replies.parsing import parse_pair


def read_reviews(directory: Path, scores: str) -> tuple[list[Judgment], list[str], list[Question], list[Answer]]:
    """Judgments of all review files in `directory`, a line for each contradiction (of a field and its text, of a file's name and
    its rows), and the questions and the answers, where they lie as in the original (TABLE/question.jsonl and
    TABLE/answer/answer_NAME.jsonl beside TABLE/review/).

    Raises UserError for a directory without reviews, or the record that is none.
    """
    paths = sorted(directory.glob("review_*.jsonl")) if directory.is_dir() else []
    if not paths:
        raise UserError(f"{directory}: holds no reviews (review_FIRST_SECOND.jsonl)")
    questions = _questions(directory)
    categories = {question.id: question.category for question in questions}
    answers = _answers(directory)
    judgments, contradictions, models = [], [], set()
    homes = _homes(directory)
    for path in paths:
        named = _models(path, answers)
        models |= {*named}
        swapped = 0
        for record in read_records(path):
            row = record.value
            if record.error or not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise UserError(f"{record.where}: {record.error or 'is no review: it has no text'}")
            question, read = str(row.get("question_id")), parse_pair(row["text"])
            entered = _pair(row.get("score"))
            first, second = named
            if homes.get(str(row.get("answer1_id"))) == named[1] or homes.get(str(row.get("answer2_id"))) == named[0]:
                (second, first), swapped = named, swapped + 1  # the row knows which answer was shown first
            if read and entered and read != entered:
                says, holds = (" : ".join(f"{score:g}" for score in pair) for pair in (read, entered))
                contradictions.append(f"{path.name}, question {question}: the text says {says}, the field {holds}")
            pair = entered if scores == "field" else read
            judgments.append(
                Judgment(
                    question_id=question,
                    category=categories.get(question, "all"),
                    mode="pairwise",
                    judge="review",
                    model_a=first,
                    model_b=second,
                    score_a=pair[0] if pair else None,
                    score_b=pair[1] if pair else None,
                    parsed=pair is not None,
                    text=row["text"],
                    flags=("contradiction",) if read and entered and read != entered else (),
                )
            )
        if swapped:
            line = f"{path.name}: the ids of {swapped} answers say that {named[1]} was shown first; they are believed"
            contradictions.append(line)
    return (
        judgments,
        contradictions,
        questions,
        [answer for name in answers if name in models for answer in answers[name]],
    )


def _models(path: Path, known: Iterable[str]) -> tuple[str, str]:
    """Names may hold underscores: then those are right whose answers are there."""
    parts = path.stem.removeprefix("review_").split("_")
    pairs = [("_".join(parts[:i]), "_".join(parts[i:])) for i in range(1, len(parts))]
    if not pairs or not all(pairs[0]):
        raise UserError(f"{path}: which two models? The name must be review_FIRST_SECOND.jsonl")
    return next((pair for pair in pairs if {*pair} <= {*known}), pairs[0])


def _pair(value) -> tuple[float, float] | None:
    """A field's scores; the original marks what nobody filled in with -1."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, (int, float)) and v >= 0 for v in value):
        return float(value[0]), float(value[1])
    return None


def _answers(directory: Path) -> dict[str, list[Answer]]:
    """By the names in the files' names: some rows have no model's."""
    return {
        name: [Answer(str(row["question_id"]), name, (row["text"],)) for row in rows]
        for name, rows in _answer_rows(directory)
    }


def _homes(directory: Path) -> dict[str, str]:
    """Whose answer an answer's id is, where the answers have ids."""
    return {
        str(row["answer_id"]): name for name, rows in _answer_rows(directory) for row in rows if row.get("answer_id")
    }


def _answer_rows(directory: Path) -> Iterator[tuple[str, list[dict]]]:
    places = [place / "answer" for place in _places(directory)]
    for path in next((sorted(place.glob("answer_*.jsonl")) for place in places if place.is_dir()), []):
        rows = [record.value for record in read_records(path)]
        yield path.stem.removeprefix("answer_"), [row for row in rows if _is_answer(row)]


def _is_answer(row) -> bool:
    return isinstance(row, dict) and "question_id" in row and isinstance(row.get("text"), str)


def _places(directory: Path) -> list[Path]:
    return [directory, *directory.resolve().parents[:2]]


def _questions(directory: Path) -> list[Question]:
    for place in _places(directory):
        if (place / "question.jsonl").is_file():
            return load_questions(place / "question.jsonl")
    return []
