"""Read rows of the cleaner's own rejected.jsonl, so that the file can be an input of another run.

    python -m cleaning out/rejected.jsonl -o again --without refusal

The `record` of a row is a record as it was read from its dump. Here it is taken out of the row and read like a record of
that dump, with the same id. A row about a single round (its `round` is not null) becomes a conversation of that round,
`ID-round-N`, because the rest of its dialogue was kept. A record that was not JSON is parsed once more, and rejected for the
same reason unless it can be read by now. A record that was rejected twice is a row inside of a row.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from cleaning.sources.turns import Rejection, text_of
from fastft.common.records import parse_json
from fastft.errors import UserError

_KEYS = frozenset(("id", "where", "reason", "detail", "round", "record"))
_RECORD = b',"record":'  # certainly the key, because quotes inside a text would be escaped
# Keys of the records that the cleaner writes instead of a whole record: for one branch of a tree, and for one round.
_BRANCH, _ROUND = frozenset(("id", "model", "lang", "messages")), frozenset(("messages",))


@dataclass(frozen=True, slots=True)
class Row:
    """A line of rejected.jsonl."""

    id: str
    where: str
    reason: str
    detail: str
    round: int | None
    line: bytes

    @property
    def record(self) -> bytes:
        """The record, as JSON."""
        return self.line.rstrip(b"\n").partition(_RECORD)[2][:-1]


def read_row(line: bytes) -> Row:
    """Read a line that the cleaner wrote, without parsing the record in it, which is most of the line.

    Raises UserError, without saying where, for any other line.
    """
    try:
        return Row(**orjson.loads(line[: line.find(_RECORD)] + b"}"), line=line)
    except (orjson.JSONDecodeError, TypeError):
        raise UserError("is not a line that the cleaner wrote") from None


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """The record in a row, and what the row says about it."""

    record: Any
    id: str
    single_round: bool  # whether the record is one round of a conversation
    written_here: bool  # whether the cleaner wrote the record itself, as `messages`, whatever the format of the dump


def is_row(record: Any) -> bool:
    """Tell whether a record is a row of rejected.jsonl."""
    return isinstance(record, dict) and record.keys() == _KEYS


def unwrap(row: dict) -> Unwrapped:
    """Return the record in a row. Raises Rejection (`broken_record`) for one that still cannot be read."""
    record = row["record"]
    while is_row(record):
        row, record = record, record["record"]
    if row["reason"] == "broken_record":
        record = _read_again(record, text_of(row["detail"]))
    id, round = text_of(row["id"]), row["round"]
    written_here = isinstance(record, dict) and record.keys() in (_BRANCH, _ROUND)
    if round is None:
        return Unwrapped(record, id, False, written_here)
    return Unwrapped(record, f"{id}-round-{text_of(round)}", True, written_here)


def _read_again(record: Any, detail: str) -> Any:
    """Return a record that could not be read at first; `detail` says why it was rejected. Raises Rejection if it still cannot."""
    if not isinstance(record, str):
        if record is None:  # it was nested too deeply to be written
            raise Rejection("broken_record", detail)
        return record
    try:
        return parse_json(record.encode("utf-8", "surrogatepass"))
    except ValueError:
        # A saved page can be read now, because its bytes that were not UTF-8 have been replaced.
        if record.lstrip("\ufeff \t\r\n").startswith("<"):
            return record
        raise Rejection("broken_record", detail) from None
