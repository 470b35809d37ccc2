"""The answers that were paid for: answers.jsonl, to which each is appended at once, so that a killed run loses none.

    {"key", "id", "teacher", "model", "version", "message", "parameters", "text", "reasoning", "finish_reason", "refused",
     "prompt_tokens", "completion_tokens", "usd", "seconds", "endpoint", "request_id", "batch"}

`key` is a digest of the request, so equal requests have one answer, and an answer stays valid when the plan changes. Memory
holds the place of each answer in the file, not its text. Other rows, {"teacher", "failed_usd"}, are what failed tries of a run
may have cost.
"""

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

import orjson

from fastft.common.files import full_disk, make_directory, room_for
from fastft.distill.settings import TeacherConfig
from fastft.errors import UserError
from fastft.inference.completion import Reply

logger = logging.getLogger(__name__)

RESERVE = 8 << 20  # bytes that are kept free for the answers in flight when the disk becomes full
CHUNK = 1 << 24
# Thoughts that an endpoint leaves at the beginning of a text. If the prompt holds the opening mark, only the closing one is
# sent; it then ends a line. Thoughts without an end were cut, and there is no answer.
_THOUGHTS = re.compile(
    r"\s*<think(?:ing)?>(.*?)(?:</think(?:ing)?>|\Z)|((?:(?!<think).)*?)</think(?:ing)?>[ \t]*\n", re.DOTALL
)


def messages_of(row: dict[str, Any]) -> list[dict[str, str]]:
    """What a teacher is sent for a row of the plan. An empty system message is none, as the student will be asked."""
    system = [{"role": "system", "content": row["system"]}] if row["system"] else []
    return [*system, {"role": "user", "content": row["query"]}]


def key_of(teacher: TeacherConfig, row: dict[str, Any]) -> str:
    """The digest of a request: the model, its parameters and the messages, but not the address."""
    request = orjson.dumps([teacher.model, teacher.sent, row["system"], row["query"]], option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(request, digest_size=16).hexdigest()


def without_thoughts(text: str) -> tuple[str, str]:
    """The (thoughts, answer) of a text; ("", text) where the endpoint keeps thoughts apart, or there are none."""
    found = _THOUGHTS.match(text)
    return ((found[1] or found[2] or "").strip(), text[found.end() :].lstrip()) if found else ("", text)


class Answers:
    """The file of answers, read once at the start. `path` need not exist; `open` makes it."""

    def __init__(self, path: Path):
        self.path, self.file, self.end = path, None, 0
        self.places: dict[bytes, tuple[int, int]] = {}  # key -> (where its row begins, bytes)
        self.usd: dict[str, float] = {}  # by teacher, with what failed tries may have cost
        self.versions: dict[tuple[str, str], list[str]] = {}  # by (teacher, model), in the order of their first answer
        self.sums: dict[str, list[int]] = {}  # by teacher: answers, prompt tokens, reply tokens
        self.reader = None
        if path.is_file():
            self._read()

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self.places

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer to a request, None if there is none."""
        place = self.places.get(bytes.fromhex(key))
        if place is None:
            return None
        self.reader = self.reader or open(self.path, "rb")  # noqa: SIM115  it stays open as long as the run
        self.reader.seek(place[0])
        return orjson.loads(self.reader.read(place[1]))

    def open(self) -> None:
        """Prepare to append. Raises UserError if that is impossible, before anything is paid for."""
        make_directory(self.path.parent)
        try:
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            self.file.truncate(self.end)  # a line that a kill has cut
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written to ({error.strerror})") from None
        with room_for(self.path, RESERVE), self._reserve.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, RESERVE)

    def close(self) -> None:
        """Give the reserve back."""
        self._reserve.unlink(missing_ok=True)
        for file in (self.file, self.reader):
            if file:
                file.close()
        self.file = self.reader = None

    def add(self, key: str, row: dict[str, Any], teacher: TeacherConfig, reply: Reply) -> None:
        """Append the reply to a row of the plan. Raises FullDiskError after it was written to the reserve."""
        thoughts, text = without_thoughts(reply.text)
        self._append(
            {
                "key": key,
                "id": row["id"],
                "teacher": teacher.name,
                "model": teacher.model,
                "version": reply.model,
                "message": row["message"],
                "parameters": teacher.sent,
                "text": text,
                "reasoning": reply.reasoning or thoughts,
                "finish_reason": reply.finish_reason,
                "refused": reply.refused,
                "prompt_tokens": reply.prompt_tokens,
                "completion_tokens": reply.completion_tokens,
                "usd": reply.usd,
                "seconds": round(reply.seconds, 3),
                "endpoint": reply.endpoint,
                "request_id": reply.request_id,
                "batch": reply.batch,
            }
        )

    def add_failed_cost(self, teacher: str, usd: float) -> None:
        """Note what the failed tries of this run may have cost."""
        self._append({"teacher": teacher, "failed_usd": usd})

    def mean_reply_tokens(self, teacher: str) -> float | None:
        """The mean length of a teacher's answers so far, None if there are none."""
        count, _, tokens = self.sums.get(teacher, (0, 0, 0))
        return tokens / count if count else None

    @property
    def _reserve(self) -> Path:
        return self.path.with_suffix(".reserve")

    def _append(self, row: dict[str, Any]) -> None:
        line = orjson.dumps(row, default=str) + b"\n"
        full = None
        try:
            with room_for(self.path, len(line)):
                self._write(line)
        except Exception as error:
            if not full_disk(error):
                raise
            self._reserve.unlink(missing_ok=True)
            self.file.truncate(self.end)
            self._write(line)
            full = error
        self._note(row, self.end, len(line))
        self.end += len(line)
        if full:
            raise full

    def _write(self, line: bytes) -> None:
        """Write a whole line; an unbuffered file may take less than it is given when the disk becomes full."""
        written = 0
        while written < len(line):
            written += self.file.write(line[written:])

    def _read(self) -> None:
        """Read the places of the answers. A broken line in the middle is left where it is, and its row is asked again."""
        broken = 0
        with self.path.open("rb", buffering=CHUNK) as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # cut by a kill
                try:
                    self._note(orjson.loads(line), self.end, len(line))
                except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
                    broken += 1
                self.end += len(line)
        if broken:
            logger.warning("%s: %d broken lines; their queries are asked again", self.path, broken)

    def _note(self, row: dict[str, Any], begin: int, size: int) -> None:
        teacher = row["teacher"]
        self.usd.setdefault(teacher, 0.0)
        if "failed_usd" in row:
            self.usd[teacher] += row["failed_usd"]
            return
        self.places[bytes.fromhex(row["key"])] = begin, size
        self.usd[teacher] += row["usd"]
        sums = self.sums.setdefault(teacher, [0, 0, 0])
        for index, count in enumerate((1, row["prompt_tokens"], row["completion_tokens"])):
            sums[index] += count
        versions = self.versions.setdefault((teacher, row["model"]), [])
        if row["version"] and row["version"] not in versions:
            versions.append(row["version"])
