"""Read questions and answers, one JSON object a line; the files of Vicuna's evaluation and of MT-bench load as they are.

    {"id": "w-03", "category": "writing", "turns": ["…", "…"], "reference": ["…", "…"]}        a question; reference: optional
    {"question_id": "w-03", "model": "mine", "turns": ["…", "…"], "seconds": 2.1, …}           an answer, of `fastft answer`

Without --questions, our own set is asked: 80 questions in eight categories like those of Vicuna's (questions.jsonl beside this
file).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastft.errors import UserError
from fastft.judge.rows import Values, is_count, is_number, is_string, is_text, or_null, read_objects, require_values

OWN = Path(__file__).with_name("questions.jsonl")
# Types of the optional keys of a question or an answer.
QUESTION_VALUES: Values = {"category": (or_null(is_string), "a text or null")}
ANSWER_VALUES: Values = {
    "parameters": (or_null(lambda value: isinstance(value, dict)), "an object or null"),
    "seconds": (or_null(is_number), "a number or null"),
    "prompt_tokens": (or_null(is_count), "a whole number or null"),
    "completion_tokens": (or_null(is_count), "a whole number or null"),
    "finish_reason": (or_null(is_string), "a text or null"),
    "error": (or_null(is_string), "a text or null"),
    "answered_by": (
        or_null(lambda value: isinstance(value, list) and all(isinstance(each, dict) for each in value)),
        "a list of objects, one a turn, or null",
    ),
}


@dataclass(frozen=True)
class Question:
    """A question of one or more turns. `reference` is an answer to each turn that a judge may trust."""

    id: str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Answer:
    """A model's answers to a question's turns. `error` says why there are none; the next run asks the question again."""

    question_id: str
    model: str
    turns: tuple[str, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    answered_by: tuple[dict[str, Any], ...] | None = None
    """Where the model is a blend, for each turn: {"model", "probabilities", "why"}."""


def load_questions(path: str | Path = OWN, references: str | Path | None = None) -> list[Question]:
    """Return the questions of a file in their order.

    `references` is a file of answers to some of them, in any of the formats of answers. Raises UserError for a line that is
    no question, an id that is used twice, and a file without questions.
    """
    trusted = {answer.question_id: answer.turns for answer in read_answers(references)} if references else {}
    found: dict[str, Question] = {}
    for record in read_objects(path):
        row = record.value
        turns = _contents(row.get("turns")) or [row.get("text") or row.get("prompt")]
        identity = row.get("id", row.get("question_id", row.get("uid")))
        if not _is_id(identity) or not isinstance(turns, list) or not all(map(is_text, turns)):
            raise UserError(f"{record.where}: is not a question; it needs an id (or question_id) and turns (or text)")
        require_values(row, QUESTION_VALUES, f"{record.where}: is not a question")
        identity = str(identity)
        if identity in found:
            raise UserError(f"{record.where}: the id {identity} is used twice")
        reference = row.get("reference") or trusted.get(identity)
        reference = (reference,) if isinstance(reference, str) else reference
        if reference and not _texts(reference):
            raise UserError(f"{record.where}: the reference is neither a text nor a list of texts, one for each turn")
        reference = tuple(reference) if reference else None
        found[identity] = Question(identity, row.get("category") or "general", tuple(turns), reference)
    if not found:
        raise UserError(f"{path}: holds no questions")
    return list(found.values())


def read_answers(path: str | Path) -> list[Answer]:
    """Return the answers of a file as `fastft answer`, Vicuna's evaluation (`text`) or MT-bench (`choices`) write them.

    Raises UserError for a line that is no answer, and for a question that one model answers twice.
    """
    found: dict[tuple[str, str], Answer] = {}
    for record in read_objects(path):
        row = record.value
        turns, model = turns_of(row), row.get("model") or row.get("model_id")
        error = row.get("error")
        if not is_text(model) or not _is_id(row.get("question_id")) or not (error or turns):
            raise UserError(
                f"{record.where}: is not an answer; it needs question_id, model (or model_id) and turns (or text)"
            )
        require_values(row, ANSWER_VALUES, f"{record.where}: is not an answer")
        known = {key: row.get(key) for key in ("seconds", "prompt_tokens", "completion_tokens", "finish_reason")}
        by = row.get("answered_by")
        answer = Answer(
            question_id=str(row["question_id"]),
            model=model,
            turns=tuple(turns),
            parameters=row.get("parameters") or {},
            error=error or None,
            answered_by=tuple(by) if by is not None else None,
            **known,
        )
        key = answer.question_id, answer.model
        if key in found and not found[key].error:
            raise UserError(f"{record.where}: {answer.model} answers question {answer.question_id} twice")
        found[key] = answer
    if not found:
        raise UserError(f"{path}: holds no answers")
    return list(found.values())


def turns_of(row: dict[str, Any]) -> list[str]:
    """Return the turns of an answer in any of the formats, or an empty list if it has none."""
    if row.get("turns") is not None:
        turns = row["turns"]
    elif row.get("choices"):
        first = row["choices"][0] if isinstance(row["choices"], list) else None
        turns = first.get("turns") if isinstance(first, dict) else None
    else:  # QLoRA's files have the question as text, and the answer as generation
        turns = [row.get("generation_truncated") or row.get("generation") or row.get("text")]
    turns = _contents(turns)
    return list(turns) if _texts(turns) else []


def _contents(turns: Any) -> Any:
    """Return the turns as texts where each is an object with its text under "content", as in Arena-Hard's files."""
    if isinstance(turns, list) and turns and all(isinstance(each, dict) for each in turns):
        return [each.get("content") for each in turns]
    return turns


def _texts(value: Any) -> bool:
    """Return whether `value` is a list of one or more texts."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(each, str) for each in value)


def _is_id(value: Any) -> bool:
    return is_text(value) or (isinstance(value, int) and not isinstance(value, bool))
