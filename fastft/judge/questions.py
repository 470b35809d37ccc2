"""Questions and answers as files, one JSON object a line; the formats of Vicuna's evaluation and of MT-bench load as they are.

    {"id": "w-03", "category": "writing", "turns": ["…", "…"], "reference": ["…", "…"]}        a question; reference: optional
    {"question_id": "w-03", "model": "mine", "turns": ["…", "…"], "seconds": 2.1, …}           an answer, of `fastft answer`

Without --questions our own set is asked: 80 questions in the eight categories of Vicuna's (questions.jsonl, beside this file).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastft.common.records import Record, read_records, repair_text
from fastft.errors import UserError

OWN = Path(__file__).with_name("questions.jsonl")


@dataclass(frozen=True)
class Question:
    id: str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None  # an answer to each turn that a judge may trust


@dataclass(frozen=True)
class Answer:
    """A model's answers to a question's turns. `error` says why there are none; it is answered anew by the next run."""

    question_id: str
    model: str
    turns: tuple[str, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None


def load_questions(path: str | Path = OWN, references: str | Path | None = None) -> list[Question]:
    """Questions in their order. `references`: answers to (some of) them, in any of the formats of answers.

    Raises UserError with the line that is no question, an id that comes twice, a file without any.
    """
    trusted = {answer.question_id: answer.turns for answer in read_answers(references)} if references else {}
    found: dict[str, Question] = {}
    for record in _objects(path):
        row = record.value
        turns = row.get("turns") or [row.get("text")]
        identity = row.get("id", row.get("question_id"))
        if identity is None or not isinstance(turns, list) or not all(isinstance(t, str) and t.strip() for t in turns):
            raise UserError(f"{record.where}: is no question; it needs an id (or question_id) and turns (or text)")
        identity = str(identity)
        if identity in found:
            raise UserError(f"{record.where}: the id {identity} comes twice")
        reference = row.get("reference") or trusted.get(identity)
        reference = (reference,) if isinstance(reference, str) else reference
        if reference and not _texts(reference):
            raise UserError(f"{record.where}: the reference is no text, and no list of texts (one a turn)")
        reference = tuple(reference) if reference else None
        found[identity] = Question(identity, str(row.get("category", "general")), tuple(turns), reference)
    if not found:
        raise UserError(f"{path}: holds no questions")
    return list(found.values())


def read_answers(path: str | Path) -> list[Answer]:
    """Answers as `fastft answer`, Vicuna's evaluation (`text`) or MT-bench (`choices`) write them.

    Raises UserError with the line that is none, or a question that one model answers twice.
    """
    found: dict[tuple[str, str], Answer] = {}
    for record in _objects(path):
        row = record.value
        turns = row.get("turns")
        if turns is None and row.get("choices"):
            first = row["choices"][0] if isinstance(row["choices"], list) else None
            turns = first.get("turns") if isinstance(first, dict) else None
        elif turns is None:
            turns = [row.get("text")]
        model = row.get("model") or row.get("model_id")
        error = row.get("error")
        if not model or "question_id" not in row or not (error or _texts(turns)):
            raise UserError(
                f"{record.where}: is no answer; it needs question_id, model (or model_id) and turns (or text)"
            )
        known = {key: row.get(key) for key in ("seconds", "prompt_tokens", "completion_tokens", "finish_reason")}
        turns = tuple(turns) if _texts(turns) else ()
        answer = Answer(str(row["question_id"]), str(model), turns, row.get("parameters") or {}, **known, error=error)
        key = answer.question_id, answer.model
        if key in found and not found[key].error:
            raise UserError(f"{record.where}: {answer.model} answers question {answer.question_id} twice")
        found[key] = answer
    if not found:
        raise UserError(f"{path}: holds no answers")
    return list(found.values())


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(each, str) for each in value)


def _objects(path: str | Path) -> Iterator[Record]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    for record in read_records(path):
        if record.error or not isinstance(record.value, dict):
            raise UserError(f"{record.where}: {record.error or 'is no JSON object'}")
        yield replace(record, value=_repaired(record.value))


def _repaired(value: Any) -> Any:
    """Lone surrogates can be asked of nobody and written to no file."""
    if isinstance(value, dict):
        return {_repaired(key): _repaired(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_repaired(each) for each in value]
    return repair_text(value) if isinstance(value, str) else value
