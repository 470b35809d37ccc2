"""`fastft grimoire apply DIR TEXTS -o FILE`: answer texts with the chosen help, or make training data of the answers.

    fastft grimoire apply grimoires/trec new.jsonl -o answers.jsonl
    fastft grimoire apply grimoires/trec new.jsonl -o conversations.jsonl --as conversations

TEXTS are JSON Lines with `text`. As conversations, an answer stands after the zero-shot prompt, and the grimoire that led to it
is left out: a model that is trained on them learns to answer so without it (Orca 2 calls that prompt erasure). Answers that name
no label are left out there, and counted. The chosen prompt itself is DIR/prompt.txt.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastft.common.command_line import option, parse, run_module
from fastft.common.files import require_place, written_whole
from fastft.common.records import repair_text
from fastft.compose.grimoire.answering.answers import ZERO_SHOT, AnswerFile, WeakAnswer, calibrated
from fastft.compose.grimoire.choosing.choice import Chosen
from fastft.compose.grimoire.run import RANKED, SIMILAR
from fastft.compose.grimoire.task import TaskQuestion
from fastft.data.conversation import Conversation, Message
from fastft.errors import UserError
from fastft.inference.endpoint import EndpointConfig
from fastft.judge.rows import read_objects


@dataclass(kw_only=True)
class ApplyConfig:
    """Which texts are answered, and what becomes of the answers."""

    directory: Path = option(positional=True)
    """What `fastft grimoire build` has written (-o)."""
    texts: Path = option(positional=True)
    """JSON Lines with text, and perhaps id."""
    output: Path = option(short="-o")
    """The file to write, JSON Lines."""
    form: Literal["answers", "conversations"] = option("answers", name="as")
    """answers: {"id", "text", "answer", "setting"}; conversations: what `fastft train` reads, with the grimoire left out."""
    batch_size: int = 16
    """Questions at a time, for a weak model's directory."""
    key_env: list[str] = option(several=True)
    """Environment variables with keys, for the weak model and the encoder, of those that are endpoints."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError("--batch_size must be at least 1")


def main(argv: Sequence[str]) -> int:
    what = "Answer texts with the chosen help, or make training data of the answers."
    config, endpoint = parse(argv, "fastft grimoire apply", what, ApplyConfig, EndpointConfig)
    apply(config, endpoint)
    return 0


def apply(config: ApplyConfig, endpoint: EndpointConfig) -> None:
    """Answer, and write the file whole. Raises UserError."""
    choice = Chosen.load(config.directory)
    questions = _read_texts(config.texts)
    require_place(config.output)
    endpoints = choice.endpoints(endpoint, config.key_env)
    weak = choice.weak(endpoints, config.batch_size)
    file = AnswerFile(config.directory / "apply_runs.jsonl")
    by_name, name = {each.name: each for each in choice.settings}, choice.content["chosen"]
    own = [name] * len(questions)
    if name in (SIMILAR, RANKED):
        places = choice.chooser(name, endpoints.encoder).places([each.text for each in questions])
        own = [choice.grimoires[int(place)].name for place in places]
    answers: dict[str, WeakAnswer] = {}
    for setting in dict.fromkeys(own):
        asked = [each for each, its in zip(questions, own) if its == setting]
        found = calibrated(weak.answer(by_name[setting], asked, choice.labels, file), choice.content["means"])
        answers |= {each.id: each for each in found}
    rows = _conversations if config.form == "conversations" else _answers
    with written_whole(config.output) as partial, partial.open("wb") as out:
        count = 0
        for row in rows(choice, questions, answers):
            out.write(row + b"\n")
            count += 1
    failed = sum(bool(each.error) for each in answers.values())
    unnamed = sum(not each.error and each.answer is None for each in answers.values())
    print(f"{config.output}: {count:,} {config.form} ({name}); {unnamed} answers name no label, {failed} calls failed")


def _read_texts(path: Path) -> list[TaskQuestion]:
    """Return the texts with ids that depend on the text, so that another file's answers are not taken for this one's."""
    found = []
    for record in read_objects(path):
        text = record.value.get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{record.where}: its text is missing or not a text")
        name = f"{record.value.get('id', len(found))}:{hashlib.sha256(repair_text(text).encode()).hexdigest()[:16]}"
        found.append(TaskQuestion(name, text.strip(), ""))
    if len({each.id for each in found}) < len(found):
        raise UserError(f"{path}: two rows have the same id and text")
    return found


def _answers(choice: Chosen, questions: Sequence[TaskQuestion], answers: dict[str, WeakAnswer]) -> Iterator[bytes]:
    for question in questions:
        answer = answers[question.id]
        row = {
            "id": question.id.rpartition(":")[0],
            "text": question.text,
            "answer": answer.answer,
            "valid": answer.valid,
            "setting": answer.setting,
            "error": answer.error,
        }
        yield repair_text(json.dumps(row, ensure_ascii=False)).encode()


def _conversations(
    choice: Chosen, questions: Sequence[TaskQuestion], answers: dict[str, WeakAnswer]
) -> Iterator[bytes]:
    told = next(each.prompt for each in choice.settings if each.name == ZERO_SHOT)
    for question in questions:
        answer = answers[question.id]
        if answer.error or answer.answer is None:
            continue
        messages = [
            Message("system", told),
            Message("user", question.text),
            Message("assistant", answer.answer, train=True),
        ]
        name = question.id.rpartition(":")[0]
        yield Conversation(
            name, messages, source=f"grimoire {choice.content['task']}", model=choice.content["weak"]
        ).to_json()


if __name__ == "__main__":
    run_module(main)
