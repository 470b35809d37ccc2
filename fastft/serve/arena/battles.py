"""The arena: two models answer the same questions, a person says which is better, and the vote goes into the record.

    POST   /arena/battles             {} draws two models and hides their names; {"models": [NAME, NAME]} names them
    POST   /arena/battles/ID/a, /b    a chat request without a model: one side's answer, as a stream
    POST   /arena/battles/ID/vote     {"winner": "a" | "b" | "tie" | "both_bad"}; the reply names the models
    DELETE /arena/battles/ID/vote     take the vote back
    GET    /arena/leaderboard         ratings from all votes that count (fastft.serve.arena.leaderboard)

A battle takes one vote, once both sides have answered the same questions to the end. A second vote changes nothing. A vote
that was taken back stays in the record, marked as such, and cannot be cast again: the names are known by then. A vote is
acknowledged once it is on the disk. Votes on models that were named, or that named themselves, are kept and do not count.

The client of an anonymous side gets none of the worker's own bytes, but a new response: the text, the finish reason, and
errors in our own words. Battles live in memory: after a restart, open ones are gone, votes are not.
"""

import asyncio
import hashlib
import logging
import random
import re
import sqlite3
import sys
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.types import Message, Send

from fastft.serve.gateway.events import EventLog, ServedTurn, read_answers
from fastft.serve.gateway.pool import WorkerPool
from fastft.serve.protocol import ApiError, model_not_found, text_of

logger = logging.getLogger(__name__)

WINNERS = ("a", "b", "tie", "both_bad")
MOST_BATTLES = 10_000
"""In memory; the oldest are forgotten."""
OWN_ERRORS = {
    "no_worker": "no worker that serves this model can answer just now; try again soon",
    "worker_lost": "the worker that wrote this answer is gone; what came so far is all of it. Ask again",
    "queue_full": "this model's queue is full; try again soon",
    "shutting_down": "the server is shutting down",
    "context_length_exceeded": "the conversation is longer than this model can read",
    "content_flagged": "the moderation service refuses this message",
    "moderation_unavailable": "the moderation service cannot be reached, and nothing is answered without it",
}
FAMILIES = (
    "anthropic claude deepseek gemini gemma chatgpt gpt-3 gpt-4 gpt-5 llama mistral mixtral openai openassistant qwen smollm "
    "tinyllama vicuna alpaca koala"
).split()
"""Names that models give themselves, whatever name they are served under."""
COMMON_PARTS = {"model", "models", "instruct", "latest", "small", "large", "medium", "final", "preview", "quant"}
"""Parts of models' names that are ordinary words: an answer that contains them names no model."""


@dataclass(eq=False)
class Side:
    model: str
    turns: list[str] = field(default_factory=list)
    """Event ids of its answers, one for each of the user's messages."""
    asked: str = ""
    """Hash of the user's messages in its latest request."""
    running: bool = False
    whole: bool = False
    """Whether the latest answer is complete."""
    named: bool = False
    """Whether one of its answers named a model of the battle."""


@dataclass(eq=False)
class Battle:
    anonymous: bool
    sides: dict[str, Side]
    drawn_from: list[str]
    words: list[str]
    """Words, in lower case, that an answer must not contain."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    vote: dict[str, Any] | None = None
    written: asyncio.Future | None = None
    withdrawn: bool = False

    @property
    def models(self) -> dict[str, str]:
        return {name: side.model for name, side in self.sides.items()}


class Arena:
    """The battles and votes of a gateway. It is closed where nothing is recorded, because votes would be lost."""

    def __init__(self, pool: WorkerPool, record: EventLog | None, contestants: Callable[[], list[str]]):
        """`contestants`: names of the models that can answer just now, and may be drawn."""
        self.pool, self.record, self.contestants = pool, record, contestants
        self.battles: OrderedDict[str, Battle] = OrderedDict()
        self.random = random.SystemRandom()
        self.board: dict[str, Any] | None = None
        self.board_votes = -1
        self.votes = 0  # since the start
        self.computing = asyncio.Lock()

    def closed_because(self) -> str | None:
        """Why there is no arena; None if there is one."""
        if self.record is None:
            return "this server keeps no record, so votes would be lost; start it with --record DIR"
        if len(self.pool.names()) < 2:
            return "this server has one model; an arena needs two (fastft serve --model A --model B)"
        return None

    # Battles ---------------------------------------------------------------------------------------------------------

    def start(self, request: dict[str, Any], served: list[str]) -> dict[str, Any]:
        """Begin a battle. Raises ApiError."""
        if why := self.closed_because():
            raise ApiError(409, why, code="arena_closed")
        asked = request.get("models")
        drawn_from = [] if asked is not None else self.contestants()
        if asked is None:
            if len(drawn_from) < 2:
                message = "fewer than two models can answer just now; try again soon"
                raise ApiError(503, message, code="no_worker", kind="server_error", retry_after=2)
            asked = self.random.sample(drawn_from, 2)
        if not (isinstance(asked, list) and len(asked) == 2 and all(isinstance(name, str) for name in asked)):
            raise ApiError(400, "models must be the names of two models", "models", "invalid_value")
        for name in asked:
            if name not in served:
                raise model_not_found(name, served)
        # Of all models, because a virtual one answers by others.
        words = identity_words([*served, *(worker.model for worker in self.pool.workers.values())])
        battle = Battle(not request.get("models"), dict(zip("ab", map(Side, asked))), drawn_from, words)
        self.battles[battle.id] = battle
        while len(self.battles) > MOST_BATTLES:
            self.battles.popitem(last=False)
        return {"id": battle.id, "anonymous": battle.anonymous} | (
            {} if battle.anonymous else {"models": battle.models}
        )

    def find(self, battle_id: str) -> Battle:
        """Raises ApiError."""
        if battle := self.battles.get(battle_id):
            return battle
        message = "this battle is not known any more (the server has been restarted since); start a new round"
        raise ApiError(404, message, code="battle_unknown")

    def begin_answer(self, battle: Battle, name: str, request: dict[str, Any]) -> dict[str, Any]:
        """Mark a side as running until `ended`; return the battle's fields for the turn's event. Raises ApiError."""
        side = battle.sides[name]
        if battle.vote is not None:
            raise ApiError(409, "this battle has been decided; start a new round", code="battle_over")
        if side.running:
            raise ApiError(409, "this side is still answering", code="battle_running")
        texts = _questions(request.get("messages"))
        del side.turns[max(len(texts) - 1, 0) :]
        side.asked, side.running, side.whole = _hash(texts), True, False
        told = {"id": battle.id, "side": name, "anonymous": battle.anonymous}
        return told | ({"drawn_from": battle.drawn_from} if battle.anonymous else {})

    def release(self, battle: Battle, name: str) -> None:
        """Note that a side's request is over, also if it was refused before a turn began."""
        battle.sides[name].running = False

    def ended(self, turn: ServedTurn) -> None:
        """Note that a side's answer has ended, complete or not."""
        battle = self.battles.get(turn.battle["id"]) if turn.battle else None
        if battle is None:
            return
        side = battle.sides[turn.battle["side"]]
        side.running, side.whole = False, turn.outcome == "answered"
        side.turns.append(turn.id)
        answers, _ = read_answers(b"".join(turn.sent), turn.streamed)
        side.named = side.named or any(names_one(answer["content"], battle.words) for answer in answers)

    # Votes -----------------------------------------------------------------------------------------------------------

    async def vote(self, battle: Battle, winner: Any, key: str | None) -> dict[str, Any]:
        """Record a vote and return the models' names. Only the first vote on a battle counts. Raises ApiError."""
        if winner not in WINNERS:
            raise ApiError(400, f"winner must be one of {', '.join(WINNERS)}", "winner", "invalid_value")
        if battle.vote is None:
            await self._require_answers(battle)
        if battle.vote is None:  # asked again, because another vote may have come during the wait
            vote = self._vote(battle, winner, key)
            await self._write(battle, vote)
        elif battle.written is not None:
            await asyncio.wait({battle.written})
        if battle.vote is None:
            raise _vote_not_written()
        told = {name: battle.vote[name] for name in ("winner", "counted", "why_not", "models")}
        return told | {"withdrawn": battle.withdrawn}

    async def withdraw(self, battle: Battle, key: str | None) -> dict[str, Any]:
        """Take a vote back, so that it no longer counts. Raises ApiError."""
        if battle.vote is None or battle.written is None or not battle.written.done():
            raise ApiError(409, "there is no vote to take back", code="no_vote")
        if not battle.withdrawn:
            vote = battle.vote | {"at": time.time(), "winner": "withdrawn", "counted": False, "why_not": "taken back"}
            battle.withdrawn = True
            try:
                await asyncio.wrap_future(self.record.add_vote(vote | {"key": key}))
            except Exception as error:
                battle.withdrawn = False
                raise _not_written(error) from None
            self.votes += 1
        return {"withdrawn": True}

    async def _require_answers(self, battle: Battle) -> None:
        sides = battle.sides.values()
        for _ in range(40):  # the last byte reaches the client a moment before the turn has ended here
            if not any(side.running for side in sides):
                break
            await asyncio.sleep(0.05)
        one, other = sides
        if one.running or other.running or not (one.whole and other.whole):
            raise ApiError(409, "both answers have to be finished before you can vote", code="battle_unfinished")
        if one.asked != other.asked or len(one.turns) != len(other.turns):
            raise ApiError(409, "the two models were not asked the same", code="battle_unequal")

    def _vote(self, battle: Battle, winner: str, key: str | None) -> dict[str, Any]:
        why_not = None
        if not battle.anonymous:
            why_not = "the names were shown"
        elif any(side.named for side in battle.sides.values()):
            why_not = "an answer names a model"
        return {
            "battle": battle.id,
            "at": time.time(),
            "key": key,
            "anonymous": battle.anonymous,
            "winner": winner,
            "models": battle.models,
            "turns": {name: side.turns for name, side in battle.sides.items()},
            "question": battle.sides["a"].asked,
            "counted": why_not is None,
            "why_not": why_not,
        }

    async def _write(self, battle: Battle, vote: dict[str, Any]) -> None:
        battle.vote = vote
        battle.written = asyncio.wrap_future(self.record.add_vote(vote))
        try:
            await battle.written
        except Exception as error:
            battle.vote = battle.written = None
            raise _not_written(error) from None
        self.votes += 1

    # The leaderboard -------------------------------------------------------------------------------------------------

    async def leaderboard(self) -> dict[str, Any]:
        """The current ratings, computed in a separate process because that takes a second or more. Raises ApiError."""
        if self.record is None:
            raise ApiError(409, self.closed_because() or "", code="arena_closed")
        async with self.computing:
            if self.board_votes != self.votes:
                votes = self.votes
                self.board = orjson.loads(await self._compute())
                self.board_votes = votes
        return self.board

    async def _compute(self) -> bytes:
        command = (sys.executable, "-m", "fastft.serve.arena.leaderboard", str(self.record.directory))
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        try:
            out, said = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            raise
        if process.returncode:
            logger.error("the leaderboard could not be computed: %s", said.decode(errors="replace"))
            raise ApiError(500, "the leaderboard could not be computed; the server's log says why", kind="server_error")
        return out


def _not_written(error: Exception) -> Exception:
    """What to raise if writing a vote has failed with `error`: a bug stays what it is."""
    return _vote_not_written() if isinstance(error, sqlite3.Error) else error


def _vote_not_written() -> ApiError:
    message = "the vote could not be written to the record, so it does not count; try again"
    return ApiError(503, message, code="vote_not_written", kind="server_error")


def _questions(messages: Any) -> list[str]:
    """The user's messages, each as text."""
    found = []
    for each in messages if isinstance(messages, list) else []:
        if isinstance(each, dict) and each.get("role") == "user":
            text = text_of(content := each.get("content"))
            found.append(orjson.dumps(content).decode() if text is None else text)
    return found


def _hash(texts: list[str]) -> str:
    return hashlib.sha256(orjson.dumps(texts)).hexdigest()[:24]


# Names -----------------------------------------------------------------------------------------------------------------


def identity_words(names: list[str]) -> list[str]:
    """Words by which an answer would name one of the models: their names, long parts of them, and well-known families."""
    words = set(FAMILIES)
    for name in names:
        name = name.lower()
        if len(name) >= 4 and name not in COMMON_PARTS:
            words.add(name)
        parts = (part.strip("0123456789") for part in re.split(r"[^a-z0-9]+", name))
        words.update(part for part in parts if len(part) >= 5 and part not in COMMON_PARTS)
    return sorted(words)


def names_one(text: str, words: list[str]) -> bool:
    """Whether a text holds one of the words, at the beginning of a word."""
    text = text.lower()
    return any(re.search(rf"(?<!\w){re.escape(word)}", text) for word in words if word in text)


class HiddenAnswer:
    """A `send` that removes from a side's answer all that reveals its model: names, token counts, the wording of errors."""

    def __init__(self, send: Send):
        self.send, self.stream = send, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if not _tells(pair[0])]
            self.stream = any(value.startswith(b"text/event-stream") for _, value in kept)
            return await self.send(message | {"headers": kept})
        body = message["body"]
        if body:
            body = b"".join(map(self._line, body.splitlines(keepends=True))) if self.stream else _hidden(body)
        await self.send(message | {"body": body})

    def _line(self, line: bytes) -> bytes:
        if not line.startswith(b"data:"):
            # Comments keep the stream alive. The token counts in our workers' comments are only for the record.
            return b": waiting\n" if line.startswith(b":") else line if not line.strip() else b""
        if line[5:].strip() == b"[DONE]":
            return line
        return b"data: " + _hidden(line[5:]) + b"\n"


def _tells(header: bytes) -> bool:
    name = header.lower()
    return name == b"content-length" or (name.startswith(b"x-fastft-") and name != b"x-fastft-event")


def _hidden(content: bytes) -> bytes:
    """A chunk or an error, reduced to the fields that reveal no model."""
    try:
        chunk = orjson.loads(content)
    except orjson.JSONDecodeError:
        chunk = None
    if not isinstance(chunk, dict):
        return b'{"choices":[]}'
    if "error" in chunk:
        error = chunk["error"] if isinstance(chunk["error"], dict) else {}
        code = error.get("code") if error.get("code") in OWN_ERRORS else "model_failed"
        message = OWN_ERRORS.get(code, "this model could not answer")
        return orjson.dumps({"error": {"message": message, "type": "server_error", "param": None, "code": code}})
    choices = []
    for choice in chunk.get("choices") or ():
        said = choice.get("delta") or choice.get("message") or {}
        delta = {"content": said["content"]} if said.get("content") else {}
        choices.append({"index": choice.get("index", 0), "delta": delta, "finish_reason": choice.get("finish_reason")})
    return orjson.dumps({"choices": choices})
