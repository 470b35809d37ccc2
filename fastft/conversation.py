"""The one data type of the project, a conversation, and its file: JSON Lines with a fixed schema.

    {"id": str, "source": str, "lang": str, "model": str, "part": 0, "parts": 1,
     "messages": [{"role": "system|user|assistant|tool", "content": str, "train": bool, "ends": bool}]}

The cleaner writes it, everything else reads it. `read_conversations` also takes plain `messages` (role, content) and
ShareGPT `conversations` (from, value), so that a file from elsewhere can be trained on as it is. `train` marks the
assistant messages to learn from. `ends` is false for an answer that goes on elsewhere (the cleaner cut it to fit the
window): its text is learned, that it ends there is not. Imports nothing heavy.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from fastft.records import read_records, repair_text

ROLES = ("system", "user", "assistant", "tool")

# The names that dumps and datasets in the wild give to the four roles.
ROLE_NAMES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}

# The keys by which datasets say whether an answer is learned, each with whether true (or 1) means that it is.
LOSS_FLAGS = {
    "train": True,  # our own, and one of axolotl's
    "training": True,
    "trainable": True,
    "weight": True,  # OpenAI, Mistral, Together
    "loss": True,  # ms-swift, XTuner
    "loss_weight": True,  # LLaMA-Factory
    "loss_scale": True,
    "mask": False,
    "masked": False,  # torchtune
}


@dataclass(slots=True)
class Message:
    role: str
    content: str
    train: bool = False
    ends: bool = True


@dataclass(slots=True)
class Conversation:
    """A dialogue, or part `part` of the `parts` into which a long one was split."""

    id: str
    messages: list[Message] = field(default_factory=list)
    source: str = ""
    lang: str = ""
    model: str = ""
    part: int = 0
    parts: int = 1

    def to_json(self) -> bytes:
        """One line of the file, without the line end. Every key is always present (datasets casts by schema)."""
        return orjson.dumps(
            {
                "id": self.id,
                "source": self.source,
                "lang": self.lang,
                "model": self.model,
                "part": self.part,
                "parts": self.parts,
                "messages": [
                    {"role": m.role, "content": m.content, "train": m.train, "ends": m.ends} for m in self.messages
                ],
            }
        )


def parse_conversation(record: Any, where: str = "record") -> Conversation:
    """Build a Conversation from the project's own schema, `messages`, or ShareGPT `conversations`.

    Text is repaired (`repair_text`), otherwise untouched. A missing `train` means true for assistant messages,
    a missing `ends` true.
    Raises ValueError saying `where` and what is wrong.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, found {_kind(record)}")
    turns = next((record[k] for k in ("messages", "conversations", "items") if record.get(k) is not None), None)
    if turns is None:
        raise ValueError(f"{where}: has neither 'messages' nor 'conversations' (keys: {', '.join(map(str, record))})")
    if not isinstance(turns, list):
        raise ValueError(f"{where}: its turns are {_kind(turns)}, not a list")
    return Conversation(
        id=_text(record.get("id"), ""),
        messages=[_parse_message(turn, f"{where}, message {i}") for i, turn in enumerate(turns)],
        source=_text(record.get("source"), ""),
        lang=_text(record.get("lang"), ""),
        model=_text(record.get("model"), ""),
        part=_number(record.get("part"), 0, f"{where}: 'part'"),
        parts=_number(record.get("parts"), 1, f"{where}: 'parts'"),
    )


def read_conversations(path: str | os.PathLike) -> Iterator[Conversation]:
    """Yield the conversations of a file (any container of `read_records`).

    Strict: raises ValueError at the first record that is no conversation, naming file and record. A missing id becomes
    the file's name and the record's number.
    """
    for number, record in enumerate(read_records(path)):
        if record.error:
            raise ValueError(f"{record.where}: {record.error}")
        conversation = parse_conversation(record.value, record.where)
        conversation.id = conversation.id or f"{Path(path).name}-{number}"
        yield conversation


def rounds_of(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """(what stands before the first question, rounds); a round begins at each user message."""
    first = next((i for i, message in enumerate(messages) if message.role == "user"), len(messages))
    rounds: list[list[Message]] = []
    for message in messages[first:]:
        if message.role == "user":
            rounds.append([])
        rounds[-1].append(message)
    return messages[:first], rounds


def loss_weight(turn: dict[str, Any]) -> float | None:
    """How much a message counts in the loss by whichever of LOSS_FLAGS it carries: 0 for not at all, 1 for fully.

    None where it carries none, or only nulls. A fraction is returned as it stands: it is for the caller to say whether
    it can be obeyed. Raises ValueError (without saying where) for a flag that is neither a truth value nor a number of 0
    or more, and for two flags that disagree.
    """
    found: dict[str, float] = {}
    for key, positive in LOSS_FLAGS.items():
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or not 0 <= value <= (1e300 if positive else 1):
            raise ValueError(f"{key!r} is {_shown(value)}; expected true or false, 1 or 0")
        found[key] = float(value if positive else 1 - value)
    if len(set(found.values())) > 1:
        flags = " and ".join(f"{key!r}: {_shown(turn[key])}" for key in found)
        raise ValueError(f"{flags} contradict each other about whether it is learned; keep one of them")
    return next(iter(found.values()), None)


def _parse_message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{where}: expected an object, found {_kind(turn)}")
    name = turn.get("role", turn.get("from"))
    role = ROLE_NAMES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"{where}: unknown role {name!r} (known: {', '.join(ROLE_NAMES)})")
    content = turn.get("content", turn.get("value"))
    if not isinstance(content, str):
        raise ValueError(f"{where}: its content is {_kind(content)}, not text")
    train = turn.get("train")
    if train not in (True, False, None) or (train and role != "assistant"):
        raise ValueError(f"{where}: 'train' is {train!r}; it is true or false, and true for assistant messages only")
    ends = turn.get("ends")
    if ends not in (True, False, None) or (ends is False and role != "assistant"):
        raise ValueError(f"{where}: 'ends' is {ends!r}; it is true or false, and false for assistant messages only")
    return Message(role, repair_text(content), role == "assistant" if train is None else train, ends is not False)


def _text(value: Any, default: str) -> str:
    return default if value is None else repair_text(str(value))


def _number(value: Any, default: int, what: str) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{what} is {_kind(value)}, not a whole number")
    return value


def _shown(value: Any) -> str:
    """A value as its file writes it, where it is short; otherwise what it is."""
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 10**18):
        return json.dumps(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and len(value) <= 40 else _kind(value)


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
