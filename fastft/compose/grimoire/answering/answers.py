"""Reads which label an answer names, and keeps what the weak model answered: one row for each setting and question.

Skill and format are measured apart. `answer` is the label that the model chose; `valid` is the share of its answers that are a
label at all: for a text 1 or 0, for likelihoods the probability that its answer begins with one of the labels.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fastft.common.records import parse_json, read_records, repair_text
from fastft.compose.grimoire.task import TaskQuestion, normalized

ZERO_SHOT, FEW_SHOT = "zero-shot", "few-shot"
# Chinese, Japanese, Korean, Thai, Lao, Burmese, Khmer: no spaces between words, or endings that cling to them.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True)
class Setting:
    """One way to ask the weak model: what it is told before each question."""

    name: str
    kind: str  # zero-shot, few-shot, profound or simple
    prompt: str
    sampler: str = ""
    text: str = ""  # the grimoire alone

    def digest(self, question: TaskQuestion) -> str:
        """What an answer is kept under: another prompt, or another text under the same id, is another question."""
        return hashlib.sha256(repair_text(f"{self.prompt}\0{question.text}").encode()).hexdigest()[:16]


@dataclass(frozen=True)
class WeakAnswer:
    """What the weak model answered to a question in a setting. `error` is set if the call failed for good."""

    setting: str
    id: str
    label: str  # the right one
    answer: str | None = None  # the label that it chose, None if its text names none, or several
    valid: float = 0.0
    how: str = ""  # likelihood, choice or text
    scores: dict[str, float] | None = None  # log P of each label, for likelihood
    text: str = ""
    error: str = ""
    prompt: str = ""  # the digest of what it was told, and of the question

    @property
    def right(self) -> bool:
        return self.answer == self.label


def read_label(text: str, labels: Sequence[str]) -> str | None:
    """Return the label that an answer names, None if it names none or several.

    After the last "Answer:", as in Grimoire's paper, the text is compared in lower case without punctuation. It may be the label
    alone, or hold it as whole words: "untrue" does not name "true". Where labels overlap, the longest one counts, and "noHate"
    may be written "no hate" or "no-hate". "not true" names nothing, unless it is a label.
    """
    said = normalized(text.rpartition("Answer:")[2])
    # The label as it is spelled comes last: it stands if another one reads alike.
    by_reading = {normalized(_CAMEL.sub(" ", label)): label for label in labels}
    by_reading |= {normalized(label): label for label in labels}
    joined = {normalized(label).replace(" ", ""): label for label in labels}
    if alone := by_reading.get(said) or (joined.get(said.replace(" ", "")) if len(joined) == len(labels) else None):
        return alone
    rest, found = f" {said} ", set()
    for reading in sorted(by_reading, key=len, reverse=True):
        spaced = reading if _UNSPACED.search(reading) else f" {reading} "
        if f" not{spaced}" in rest:
            return None
        if spaced in rest:
            found.add(by_reading[reading])
            rest = rest.replace(spaced, " \0 ")
    return found.pop() if len(found) == 1 else None


def read_choice(text: str, labels: Sequence[str]) -> str | None:
    """Return the label in a reply of the form {"answer": LABEL}, None if it is not of that form."""
    try:
        row = parse_json(text.encode())
    except ValueError:
        return None
    said = row.get("answer") if isinstance(row, dict) else None
    return said if said in labels else None


def choice_format(labels: Sequence[str]) -> dict:
    """Return the `response_format` that lets an endpoint answer with one of the labels only."""
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "string", "enum": list(labels)}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


# Calibration ---------------------------------------------------------------------------------------------------------------


def label_means(answers: Iterable[WeakAnswer]) -> dict[str, dict[str, float]]:
    """Return each label's mean log likelihood over the questions, by setting, for `calibrated`."""
    rows: dict[str, list[dict[str, float]]] = {}
    for answer in answers:
        if answer.scores:
            rows.setdefault(answer.setting, []).append(answer.scores)
    return {
        setting: {label: sum(row[label] for row in some) / len(some) for label in some[0]}
        for setting, some in rows.items()
    }


def best_label(scores: Mapping[str, float], means: Mapping[str, float] | None = None) -> str:
    """Return the likeliest label; with `means`, the one that is likeliest above what it is on average."""
    return max(scores, key=lambda label: scores[label] - (means[label] if means else 0.0))


def calibrated(answers: Iterable[WeakAnswer], means: Mapping[str, Mapping[str, float]]) -> list[WeakAnswer]:
    """Return the answers with every label's mean taken away, which removes the weak model's taste for some labels."""
    return [
        replace(each, answer=best_label(each.scores, means[each.setting]))
        if each.scores and each.setting in means
        else each
        for each in answers
    ]


# The file of answers -------------------------------------------------------------------------------------------------------


class AnswerFile:
    """Answers as JSON Lines, each appended at once: a killed run asks only what is missing. Failed ones are asked again."""

    def __init__(self, path: Path):
        self.path = path
        self.done: dict[tuple[str, str], WeakAnswer] = {}
        for row in _rows_of(path):
            if isinstance(row, dict) and row.keys() == asdict(WeakAnswer("", "", "")).keys():
                answer = WeakAnswer(**row)
                self.done[answer.prompt, answer.id] = answer
        self.file = None

    def missing(self, setting: Setting, questions: Sequence[TaskQuestion]) -> list[TaskQuestion]:
        """Return the questions without an answer in this setting, and those whose calls have failed."""
        answers = (self.done.get((setting.digest(each), each.id)) for each in questions)
        return [each for each, answer in zip(questions, answers) if answer is None or answer.error]

    def add(self, answers: Iterable[WeakAnswer]) -> None:
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  it stays open as long as the run
            if self.file.tell():
                self.file.write(b"\n")  # the last line may have been cut
        answers = list(answers)
        self.file.write("".join(_line(answer) for answer in answers).encode())
        self.done |= {(answer.prompt, answer.id): answer for answer in answers}

    def of(self, setting: Setting, questions: Sequence[TaskQuestion]) -> list[WeakAnswer]:
        """Return the answers to these questions in this setting, under its present name and with their present labels."""
        found = [(self.done.get((setting.digest(each), each.id)), each.label) for each in questions]
        return [replace(answer, setting=setting.name, label=label) for answer, label in found if answer is not None]


def _rows_of(path: Path) -> Iterable[object]:
    if not path.is_file() or not path.read_bytes().strip():
        return ()
    return (record.value for record in read_records(path) if not record.error)


def _line(answer: WeakAnswer) -> str:
    return repair_text(json.dumps(asdict(answer), ensure_ascii=False)) + "\n"
