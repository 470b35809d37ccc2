"""The reviews of Vicuna's original evaluation as judgments: `fastft judge --reviews DIR --scores field|text`.

A review has the judge's words (`text`) and a pair of scores (`score`) that people filled in where the original parser failed.
"field" takes the latter, "text" reads the words and names every review whose field says something else. The files are
review_FIRST_SECOND.jsonl; the first model was always shown first.
"""

from pathlib import Path

from fastft.judge.judgment import Judgment
from fastft.judge.parsing import parse_pair
from fastft.judge.questions import Question, load_questions
from fastft.records import read_records


def read_reviews(directory: Path, scores: str) -> tuple[list[Judgment], list[str], list[Question]]:
    """Judgments of all review files in `directory`, a line for each whose field contradicts its text, and the questions, from
    the file of the original's layout (TABLE/question.jsonl beside TABLE/review/) where there is one.

    Raises ValueError for a directory without reviews, or the record that is none.
    """
    paths = sorted(directory.glob("review_*.jsonl")) if directory.is_dir() else []
    if not paths:
        raise ValueError(f"{directory}: holds no reviews (review_FIRST_SECOND.jsonl)")
    questions = _questions(directory)
    categories = {question.id: question.category for question in questions}
    judgments, contradictions = [], []
    for path in paths:
        first, _, second = path.stem.removeprefix("review_").partition("_")
        if not second:
            raise ValueError(f"{path}: which two models? The name must be review_FIRST_SECOND.jsonl")
        for record in read_records(path):
            row = record.value
            if record.error or not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f"{record.where}: {record.error or 'is no review: it has no text'}")
            question, read = str(row.get("question_id")), parse_pair(row["text"])
            entered = _pair(row.get("score"))
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
    return judgments, contradictions, questions


def _pair(value) -> tuple[float, float] | None:
    """A field's scores; the original marks what nobody filled in with -1."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, (int, float)) and v >= 0 for v in value):
        return float(value[0]), float(value[1])
    return None


def _questions(directory: Path) -> list[Question]:
    for place in (directory, *directory.parents[:2]):
        if (place / "question.jsonl").is_file():
            return load_questions(place / "question.jsonl")
    return []
