"""Read the reviews of Vicuna's original evaluation as judgments: `fastft judge --reviews DIR --scores field|text`.

A review has the judge's words (`text`) and a pair of scores (`score`), which people entered if the original parser failed.
"field" takes these scores, "text" reads the words, and both name every review in which the two differ. The files are called
review_FIRST_SECOND.jsonl. The first model was shown first, unless the ids of the answers in a review say otherwise. Then the
ids decide, and the file is reported.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.common.records import Record, read_records
from fastft.errors import UserError
from fastft.judge.judgment import Judgment
from fastft.judge.questions import Answer, Question, load_questions
from fastft.judge.replies.parsing import parse_pair


def read_reviews(directory: Path, scores: str) -> tuple[list[Judgment], list[str], list[Question], list[Answer]]:
    """Return the judgments of all review files in `directory`, contradictions, questions and answers.

    Contradictions are lines: a field that differs from its text, or a file's name that differs from its rows. Questions and
    answers are read from the places that they have in the original: TABLE/question.jsonl and TABLE/answer/answer_NAME.jsonl
    beside TABLE/review/. Raises UserError for a directory without reviews, and for a record that is no review.
    """
    paths = sorted(directory.glob("review_*.jsonl")) if directory.is_dir() else []
    if not paths:
        raise UserError(f"{directory}: holds no reviews (review_FIRST_SECOND.jsonl)")
    questions, answers = _questions(directory), _answers(directory)
    categories = {question.id: question.category for question in questions}
    models_of_ids = _models_of_ids(directory)
    judgments, contradictions, models = [], [], set()
    for path in paths:
        named = _models(path, answers)
        models |= {*named}
        swapped = 0
        for review in _reviews(path):
            shown = _shown_order(review.row, named, models_of_ids)
            swapped += shown != named
            if review.contradicts_itself:
                says, holds = (" : ".join(f"{score:g}" for score in pair) for pair in (review.read, review.entered))
                line = f"{path.name}, question {review.question}: the text says {says}, the field {holds}"
                contradictions.append(line)
            category = categories.get(review.question, "all")
            judgments.append(review.judgment(category, shown, review.entered if scores == "field" else review.read))
        if swapped:
            line = f"{path.name}: the ids of {swapped} answers say that {named[1]} was shown first; they are believed"
            contradictions.append(line)
    return judgments, contradictions, questions, [each for name in answers if name in models for each in answers[name]]


@dataclass(frozen=True)
class _Review:
    """A row of a review file: the scores that its words give (`read`), and those in its field (`entered`)."""

    row: dict[str, Any]
    question: str
    read: tuple[float, float] | None
    entered: tuple[float, float] | None

    @property
    def contradicts_itself(self) -> bool:
        return bool(self.read and self.entered and self.read != self.entered)

    def judgment(self, category: str, shown: tuple[str, str], pair: tuple[float, float] | None) -> Judgment:
        return Judgment(
            question_id=self.question,
            category=category,
            mode="pairwise",
            judge="review",
            model_a=shown[0],
            model_b=shown[1],
            score_a=pair[0] if pair else None,
            score_b=pair[1] if pair else None,
            parsed=pair is not None,
            text=self.row["text"],
            flags=("contradiction",) if self.contradicts_itself else (),
        )


def _reviews(path: Path) -> Iterator[_Review]:
    for record in read_records(path):
        row = _row(record)
        yield _Review(row, str(row.get("question_id")), parse_pair(row["text"]), _pair(row.get("score")))


def _row(record: Record) -> dict[str, Any]:
    """Return a record that is a review. Raises UserError otherwise."""
    row = record.value
    if record.error or not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f"{record.where}: {record.error or 'is not a review, because it has no text'}")
    return row


def _shown_order(row: dict[str, Any], named: tuple[str, str], models_of_ids: dict[str, str]) -> tuple[str, str]:
    """Return the models in the order in which they were shown: by the row's ids, or without any by the file's name."""
    first, second = (models_of_ids.get(str(row.get(key))) for key in ("answer1_id", "answer2_id"))
    return named[::-1] if first == named[1] or second == named[0] else named


def _models(path: Path, known: Iterable[str]) -> tuple[str, str]:
    """Return the two models in a file's name.

    If a model's name contains underscores, the names in the answers decide where it ends.
    """
    parts = path.stem.removeprefix("review_").split("_")
    pairs = [("_".join(parts[:i]), "_".join(parts[i:])) for i in range(1, len(parts))]
    if not pairs or not all(pairs[0]):
        raise UserError(f"{path}: which two models? The name must be review_FIRST_SECOND.jsonl")
    return next((pair for pair in pairs if {*pair} <= {*known}), pairs[0])


def _pair(value: Any) -> tuple[float, float] | None:
    """Return a field's scores, or None if none were entered, which the original marks with -1."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, (int, float)) and v >= 0 for v in value):
        return float(value[0]), float(value[1])
    return None


def _answers(directory: Path) -> dict[str, list[Answer]]:
    """Return the answers by model. The model is the one in the file's name, because some rows name none."""
    return {
        name: [Answer(str(row["question_id"]), name, (row["text"],)) for row in rows]
        for name, rows in _answer_rows(directory)
    }


def _models_of_ids(directory: Path) -> dict[str, str]:
    """Return the model of each answer's id, where the answers have ids."""
    return {
        str(row["answer_id"]): name for name, rows in _answer_rows(directory) for row in rows if row.get("answer_id")
    }


def _answer_rows(directory: Path) -> Iterator[tuple[str, list[dict]]]:
    """Yield (model, rows) of every file in the first directory of answers that has any."""
    places = [place / "answer" for place in _places(directory)]
    for path in next((sorted(place.glob("answer_*.jsonl")) for place in places if place.is_dir()), []):
        rows = [record.value for record in read_records(path)]
        yield path.stem.removeprefix("answer_"), [row for row in rows if _is_answer(row)]


def _is_answer(row: Any) -> bool:
    return isinstance(row, dict) and "question_id" in row and isinstance(row.get("text"), str)


def _places(directory: Path) -> list[Path]:
    """Return where questions and answers may lie: in the directory of the reviews, and in the two above it."""
    return [directory, *directory.resolve().parents[:2]]


def _questions(directory: Path) -> list[Question]:
    for place in _places(directory):
        if (place / "question.jsonl").is_file():
            return load_questions(place / "question.jsonl")
    return []
