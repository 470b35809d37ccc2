"""The truthful record: every served turn is one event, in DIR/events.sqlite.

    record = EventLog(Path("records"), texts=True)
    record.add(ServedTurn(...))    # from the event loop; never waits
    record.add_vote({...})         # a future, which is done when the vote is on the disk
    record.close()                 # everything that was added is on the disk

An event says who asked which name, which policy chose which model with which probabilities, which model really answered,
what was tried, tokens, times, and how it ended. It is written however the turn ended: the client left, the worker died. The
answer is read from the very bytes that were sent to the client. Votes on two answers (fastft.serve.arena.battles) have a
table of their own.

One thread writes, several events a transaction; the file is in WAL mode, so that others can read meanwhile. With
`texts=False`, messages and answers are replaced by their SHA-256 hashes; equal texts can still be found, and short ones
guessed.
"""

import hashlib
import logging
import queue
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from fastft.common import logs
from fastft.compose.abtest.policy import Assignment
from fastft.errors import UserError
from fastft.serve.protocol import USAGE_COMMENT

logger = logging.getLogger(__name__)

FILE = "events.sqlite"
BATCH = 500
"""Events in a transaction, at most."""
GATHER_S = 0.05
"""Seconds for which events are collected into one transaction, to share its cost (at least 0.1 ms). A kill -9 loses the
events of that time."""

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, id TEXT NOT NULL, event TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS votes (number INTEGER PRIMARY KEY, battle TEXT NOT NULL, vote TEXT NOT NULL)",
)
ROWS = 100
"""Events in one statement. The writer thread releases the interpreter lock at each statement, and must wait to get it
back."""


@dataclass(eq=False)
class ServedTurn:
    """All that the gateway knows of a turn that has ended; `event_of` turns it into an event."""

    path: str
    asked: str
    """The name that the client asked for."""
    body: bytes
    """The request, as it came."""
    streamed: bool
    key: str | None
    """The name of the API key, never the key."""
    conversation: str | None
    """None if this is no turn of a conversation, such as the titles and tags that chat pages request."""
    conversation_from: str
    """header, messages (a hash of the key's name and the first messages), battle, background, or none (a plain completion)."""
    turn: int
    policy: str | None
    """Kind of the policy; None if the client named the model itself."""
    chosen: str
    probabilities: dict[str, float]
    why: str
    next: tuple[str, ...] = ()
    """Models that are asked if the chosen one cannot answer."""
    through: tuple[str, ...] = ()
    """Virtual models between the name asked for and the model, such as an experiment's arm that is a blend."""
    scores: Mapping[str, float] | None = None
    """What the policy compared, by model: a router's probabilities of a good answer."""
    decision_s: float | None = None
    """How long the choice took, as the client felt it; None if the client named the model itself."""
    assignment: Assignment | None = None
    """The user's arm, if an experiment decided."""
    unit: str | None = None
    """The user of the experiment as a keyed hash, never the name; None if no user is known."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    at: float = field(default_factory=time.time)
    """When the request had arrived, in seconds since 1970."""
    clock: float = field(default_factory=time.perf_counter)
    """The same moment, on the clock of `first_s` and `total_s`, which include the moderation."""
    answered: str | None = None
    """The model that answered, at least in part; None if none did."""
    tries: list[dict[str, Any]] = field(default_factory=list)
    """{"worker", "model", "outcome"} in order: "answered", or why it did not."""
    status: int | None = None
    """The HTTP status that the client got; None if it left before."""
    outcome: str = "failed"
    """answered, refused (the request's fault), failed (no worker could), died (in mid-answer), error (the worker's, in
    mid-answer), client_left, slow_client, shut_down"""
    first_s: float | None = None
    total_s: float = 0.0
    sent: list[bytes] = field(default_factory=list)
    """The body of the response."""
    battle: dict[str, Any] | None = None
    """{"id", "side", "anonymous", "drawn_from"} if this is one side of a battle (fastft.serve.arena.battles)."""
    moderation: dict[str, Any] | None = None
    """The moderation endpoint's verdict on the question, if one was asked (fastft.serve.moderation)."""


def event_of(turn: ServedTurn, texts: bool) -> dict[str, Any]:
    """The event of a turn, as it is written and exported."""
    answers, usage = read_answers(b"".join(turn.sent), turn.streamed)
    event = {
        "id": turn.id,
        "at": turn.at,
        "path": turn.path,
        "key": turn.key,
        "conversation": turn.conversation,
        "conversation_from": turn.conversation_from,
        "turn": turn.turn,
        "asked": turn.asked,
        "policy": turn.policy,
        "chosen": turn.chosen,
        "probabilities": turn.probabilities,
        "why": turn.why,
        "model": turn.answered,
        "failover": _is_failover(turn),
        "tries": turn.tries,
        "stream": turn.streamed,
        "status": turn.status,
        "outcome": turn.outcome,
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "first_s": turn.first_s,
        "total_s": turn.total_s,
    }
    known = ("through", "scores", "decision_s", "battle", "moderation")
    event |= {name: value for name in known if (value := getattr(turn, name)) not in (None, ())}
    if turn.assignment:
        event |= _exposure(turn.assignment, turn.unit)
    request = orjson.loads(turn.body)
    prompt = {name: request[name] for name in ("messages", "prompt") if name in request}
    if texts:
        return event | prompt | {"answers": answers}
    hashed = [
        {"content_sha256": _hash(answer["content"].encode()), "finish_reason": answer["finish_reason"]}
        for answer in answers
    ]
    return (
        event | {f"{name}_sha256": _hash(orjson.dumps(value)) for name, value in prompt.items()} | {"answers": hashed}
    )


def _is_failover(turn: ServedTurn) -> bool:
    """Whether another worker was asked than the first one, or another model than the chosen one, which may be known as down."""
    return len({(each["worker"], each["model"]) for each in turn.tries}) > 1 or any(
        each["model"] != turn.chosen for each in turn.tries
    )


def _exposure(assignment: Assignment, unit: str | None) -> dict[str, Any]:
    """An event's fields of an experiment. A unit's first event with `exposed` is its exposure."""
    return {
        "experiment": assignment.experiment,
        "arm": assignment.arm,
        "share": assignment.share,
        "unit": unit,
        "counted": assignment.counted,
        "exposed": assignment.counted,
    }


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_answers(sent: bytes, streamed: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(answers, usage) of the body of a response, chat or completion, as far as it was sent.

    An answer is {"content", "finish_reason"}, and has "reasoning" and "tool_calls" where the model gave them: the thoughts
    as text, the calls as true.
    """
    answers: dict[int, dict[str, Any]] = {}
    usage: dict[str, Any] = {}
    for chunk in _chunks(sent, streamed):
        if isinstance(chunk.get("usage"), dict):
            usage = chunk["usage"]
        for choice in chunk.get("choices") or ():
            answer = answers.setdefault(choice.get("index", 0), {"content": "", "finish_reason": None})
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            answer["content"] += said.get("content") or ""
            if thought := said.get("reasoning_content") or said.get("reasoning"):
                answer["reasoning"] = answer.get("reasoning", "") + thought
            if said.get("tool_calls"):
                answer["tool_calls"] = True
            answer["finish_reason"] = choice.get("finish_reason") or answer["finish_reason"]
    return [answers[index] for index in sorted(answers)], usage


def _chunks(sent: bytes, streamed: bool) -> Iterator[dict[str, Any]]:
    for piece in _events(sent) if streamed else [sent]:
        try:
            chunk = orjson.loads(piece)
        except orjson.JSONDecodeError:  # [DONE]; or a worker that speaks another protocol: there is no answer to read
            continue
        if isinstance(chunk, dict):
            yield chunk


def _events(stream: bytes) -> Iterator[bytes]:
    """The JSON objects of a stream's events. Our workers' comment with the token counts is read like an event."""
    for line in stream.splitlines():
        if line.startswith(b"data:"):
            yield line[5:]
        elif line.startswith(USAGE_COMMENT):
            yield b'{"usage":%s}' % line[len(USAGE_COMMENT) :]


class EventLog:
    """Writes events to DIR/events.sqlite in a thread of its own."""

    def __init__(self, directory: Path, texts: bool = True):
        """Raises UserError if the directory cannot be written to."""
        self.directory, self.texts = directory, texts
        self.lost = 0
        self.queue: queue.SimpleQueue[ServedTurn | tuple[dict[str, Any], Future] | None] = queue.SimpleQueue()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            database = _open(directory / FILE)
            for statement in _SCHEMA:
                database.execute(statement)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"--record {directory}: cannot be written to ({error})") from None
        self.thread = threading.Thread(target=self._write, args=(database,), name="record", daemon=True)
        self.thread.start()

    def add(self, turn: ServedTurn) -> None:
        self.queue.put(turn)

    def add_vote(self, vote: dict[str, Any]) -> "Future[None]":
        """Queue a vote; return a future that is done when it is written, or has the exception that prevented this."""
        written: Future[None] = Future()
        self.queue.put((vote, written))
        return written

    def close(self) -> None:
        """Return when everything that was added is written."""
        self.queue.put(None)
        self.thread.join()

    def _write(self, database: sqlite3.Connection) -> None:
        last = False
        while not last:
            added = [self.queue.get()]
            if added[0] is not None:
                time.sleep(GATHER_S)
            while len(added) < BATCH and not self.queue.empty():
                added.append(self.queue.get())
            last = added[-1] is None
            self._insert(database, [each for each in added if isinstance(each, ServedTurn)])
            for each in added:
                if isinstance(each, tuple):
                    self._insert_vote(database, *each)
        database.close()

    def _insert_vote(self, database: sqlite3.Connection, vote: dict[str, Any], written: "Future[None]") -> None:
        try:
            with database:
                row = (vote["battle"], orjson.dumps(vote).decode())
                database.execute("INSERT INTO votes (battle, vote) VALUES (?, ?)", row)
        except sqlite3.Error as error:  # reported to the voter
            logger.error("record: a vote is not written: %s: %s", self.directory / FILE, error)
            written.set_exception(error)
        except Exception as error:  # a bug, which whoever voted meets; it must not end the record
            written.set_exception(error)
        else:
            written.set_result(None)

    def _insert(self, database: sqlite3.Connection, turns: list[ServedTurn]) -> None:
        rows = []
        for turn in turns:
            try:
                rows.append((turn.id, orjson.dumps(event_of(turn, self.texts)).decode()))
            except Exception as bug:  # one event that cannot be made must not end the record
                self.lost += 1
                logs.log_bug(logger, bug, "record: the event of turn %s could not be made", turn.id)
        try:
            with database:
                for start in range(0, len(rows), ROWS):
                    part = rows[start : start + ROWS]
                    places = ", ".join(["(?, ?)"] * len(part))
                    database.execute(
                        f"INSERT INTO events (id, event) VALUES {places}", [v for row in part for v in row]
                    )
        except sqlite3.Error as error:  # a full disk, most likely
            self.lost += len(rows)
            logger.error("record: %d events are lost: %s: %s", len(rows), self.directory / FILE, error)


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=30, check_same_thread=False)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=NORMAL")
    return database


def read_events(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a record, oldest first; it may be written to meanwhile. Raises UserError if there is none."""
    return _read(directory, "SELECT event FROM events ORDER BY number")


def read_votes(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the votes of a record, oldest first; records of earlier releases have none.

    Raises UserError as `read_events`.
    """
    return _read(directory, "SELECT vote FROM votes ORDER BY number", "votes")


def _read(directory: Path, query: str, table: str | None = None) -> Iterator[dict[str, Any]]:
    path = directory / FILE
    if not path.is_file():
        raise UserError(f"{directory}: no record ({FILE}) is there; fastft serve --record {directory} writes one")
    try:
        # Not opened read-only: the last reader of a WAL file that nobody writes to has to tidy it up.
        database = sqlite3.connect(path, timeout=30)
        known = "SELECT 1 FROM sqlite_master WHERE name = ?"
        if table is None or database.execute(known, (table,)).fetchone():
            for (content,) in database.execute(query):
                yield orjson.loads(content)
        database.close()
    except sqlite3.Error as error:
        raise UserError(f"{path}: is not a record that can be read ({error})") from None
