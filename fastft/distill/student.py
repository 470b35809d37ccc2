"""Write what the student is trained on: a file of conversations for each teacher, and a train.yaml with a stage for each.

    stage1/conversations.jsonl  stage2/conversations.jsonl  held_out/conversations.jsonl  train.yaml

Every conversation has the column `distill`, which says where it comes from: teacher, version, message, parameters, tokens,
dollars, request id. `fastft train` reads past it. Only the teacher's tokens are learned; a query without a system message has
none, as `fastft bench` asks.
"""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from fastft.common.files import make_directory, write_whole, written_whole
from fastft.data.conversation import Conversation, Message
from fastft.distill.draws import share
from fastft.distill.settings import DistillConfig, StudentConfig
from fastft.distill.verify.checks import KEPT, AnswerVerdict
from fastft.errors import UsageError, UserError

FILE = "conversations.jsonl"


@dataclass
class Stages:
    """The files of conversations while they are written, and how many each has."""

    config: DistillConfig
    files: dict[str, BinaryIO] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    erased: dict[str, int] = field(default_factory=dict)

    def open(self, stack: ExitStack) -> None:
        """Open a file for each stage, and for what is held out; each appears whole when `stack` closes."""
        ours = [*self.config.directory.glob(f"stage[1-9]*/{FILE}"), self.config.directory / "held_out" / FILE]
        for stale in set(ours) - set(stage_paths(self.config).values()):
            stale.unlink(missing_ok=True)  # of a teacher that an earlier start had, or held out then
        for name, path in stage_paths(self.config).items():
            make_directory(path.parent)
            partial = stack.enter_context(written_whole(path))
            self.files[name] = stack.enter_context(partial.open("wb"))
            self.counts[name] = self.erased[name] = 0

    def add(self, row: dict[str, Any], found: dict[str, tuple[dict[str, Any] | None, AnswerVerdict]]) -> None:
        """Write a query's kept answers to their stages; a held-out one only with the last teacher's answer."""
        kept = {name: answer for name, (answer, verdict) in found.items() if verdict.status == KEPT}
        if kept and self._is_held_out(row):
            name = list(kept)[-1]
            self._write("held out", conversation(row, kept[name], ""))
            return
        for name, answer in kept.items():
            system, erased = self._system(row)
            self.erased[name] += erased
            self._write(name, conversation(row, answer, system, erased))

    def _is_held_out(self, row: dict[str, Any]) -> bool:
        return share(self.config.seed, "held out", row["id"]) < self.config.student.held_out

    def _system(self, row: dict[str, Any]) -> tuple[str, bool]:
        """The system message that the student sees, and whether it stands for another."""
        erases = row["system"] and share(self.config.seed, "erase", row["id"]) < self.config.erase_system
        return (self.config.student.generic, True) if erases else (row["system"], False)

    def _write(self, name: str, line: bytes) -> None:
        self.files[name].write(line + b"\n")
        self.counts[name] += 1


def stage_paths(config: DistillConfig) -> dict[str, Path]:
    """The file of each stage by its teacher, and of "held out" if anything is held out."""
    paths = {each.name: config.directory / f"stage{number}" / FILE for number, each in enumerate(config.teachers, 1)}
    return paths | ({"held out": config.directory / "held_out" / FILE} if config.student.held_out else {})


def conversation(row: dict[str, Any], answer: dict[str, Any], system: str, erased: bool = False) -> bytes:
    """A line of a stage's file."""
    messages = [Message("system", system)] if system else []
    ends = answer["finish_reason"] != "length"
    text = answer["text"] if ends else answer["text"].rstrip()  # what an answer is cut at says nothing
    messages += [Message("user", row["query"]), Message("assistant", text, train=True, ends=ends)]
    made = Conversation(
        row["id"], messages, source=f"{row['collection']}/{row['task']}", model=answer["version"] or answer["model"]
    )
    names = (
        "teacher",
        "version",
        "parameters",
        "prompt_tokens",
        "completion_tokens",
        "usd",
        "request_id",
        "endpoint",
        "reasoning",
    )
    origin = {"message": row["message"], "erased": erased, **{name: answer[name] for name in names}}
    return made.to_json()[:-1] + b',"distill":' + orjson.dumps(origin) + b"}"


def write_train_yaml(config: DistillConfig, counts: dict[str, int]) -> Path | None:
    """Write train.yaml, with a stage for each file that holds anything.

    Returns its path, None if there is nothing to train on; a train.yaml of an earlier start is then removed.
    """
    path = config.directory / "train.yaml"
    if not any(counts[each.name] for each in config.teachers):
        path.unlink(missing_ok=True)
        return None
    write_whole(path, _train_yaml(config, counts))
    return path


def require_trainable(config: DistillConfig) -> None:
    """Raise UserError, before anything is paid for, if the trainer will not take what `student` says in train.yaml."""
    from fastft.config import parse_config

    # What is ours in train.yaml is known to be right, and to parse it takes half a second.
    if config.student == StudentConfig():
        return
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(_train_yaml(config, dict.fromkeys(stage_paths(config), 1)))
        file.flush()
        try:
            parse_config(["--config", file.name])
        except (UserError, UsageError) as error:
            raise UserError(f"student: train: {str(error).replace(file.name, 'train.yaml')}") from None


def _train_yaml(config: DistillConfig, counts: dict[str, int]) -> str:
    """The text of train.yaml, with a stage for each teacher and an eval_data if they have conversations."""
    import yaml

    student, paths = config.student, stage_paths(config)
    stages = [
        {"data": str(paths[each.name]), "epochs": student.epochs} for each in config.teachers if counts[each.name]
    ]
    values = {
        "model": student.model,
        "output_dir": str(config.directory / "student"),
        "stages": stages,
        "seq_len": student.seq_len,
        "overlong": "drop",
        "seed": config.seed,
    }
    values |= {"template": student.template} if student.template else {}
    values |= {"eval_data": str(paths["held out"])} if counts.get("held out") else {}
    return yaml.safe_dump({**values, **student.train}, sort_keys=False, allow_unicode=True)
