"""The one data type of the project, a conversation, and its file: JSON Lines with a fixed schema.

    {"id": str, "source": str, "lang": str, "model": str, "part": 0, "parts": 1,
     "messages": [{"role": "system|user|assistant|tool", "content": str, "train": bool, "ends": bool}]}

The cleaner writes it, everything else reads it. `read_conversations` also takes plain `messages` (role, content) and
ShareGPT `conversations` (from, value), so that a file from elsewhere can be trained on as it is. `train` marks the
assistant messages to learn from. `ends` is false for an answer that goes on elsewhere (the cleaner cut it to fit the
window): its text is learned, that it ends there is not.

Nothing that changes what is trained is dropped without a word. A key of a message is one of four kinds:
- read: role, content, `ends`, and whether to learn from it, in any spelling (LOSS_FLAGS);
- refused unless it is empty: text or calls that a chat template would show, but that this type cannot hold (UNREAD);
- passed over: ids, names, times, ratings, what datasets note about a message (ABOUT);
- any other key: probably such a note, too, but nobody can be sure; it is named once per file, on standard error.
A record's other columns are the dataset's own business. Only those that belong into the prompt are refused
(UNREAD_OF_RECORD), and loss flags that say anything but 1, since flags are obeyed at messages. Imports nothing heavy.
"""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from fastft.common.records import read_records, repair_text
from fastft.errors import UserError

ROLES = ("system", "user", "assistant", "tool")

# The names that dumps and datasets in the wild give to the four roles.
ROLE_NAMES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name; most templates know only the older one, the others take either
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

_CALLS = "write each call as text into its content (`python -m cleaning --without tool_session` does), or leave the record out"
_TOOLS = "write the tools as text into a system message, or leave the record out"
_THOUGHTS = "write it into 'content' as the model's template does (often <think>…</think>), or remove the key"
_TEXT_ONLY = "only text is learned; leave the record out"
_SYSTEM = "make it the first message, with the role system, or remove the key"

# What a message can say besides its content, and what to do about it.
UNREAD = {
    **dict.fromkeys(("tool_calls", "function_call", "tool_call", "tool_responses"), _CALLS),
    **dict.fromkeys(("tools", "functions"), _TOOLS),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thought", "thoughts", "tool_plan"),
        _THOUGHTS,
    ),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _TEXT_ONLY),
    "documents": "write them as text into a message's content, or leave the record out",
    "refusal": "make it the message's content, or remove the key",
    **dict.fromkeys(
        ("train_detail", "training_detail"), "a message is learned as a whole or not at all; use 'train' instead"
    ),
}
UNREAD_OF_RECORD = {
    **dict.fromkeys(("tools", "functions"), _TOOLS),
    **dict.fromkeys(("system", "system_prompt"), _SYSTEM),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _TEXT_ONLY),
    "documents": UNREAD["documents"],
}

_READ = frozenset(("role", "from", "content", "value", "ends", *LOSS_FLAGS))

# What datasets note about a message: who, when, from where, how it was rated.
ABOUT = frozenset(
    """id uuid message_id parent_id parent index turn turn_id turn_identifier name author sender tool_call_id
    model lang language timestamp time date create_time created_at update_time updated_at
    score rating label labels toxic redacted hashed_ip country state header tokens token_count finish_reason stop_reason
    status metadata""".split()
)


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

    Text is repaired (`repair_text`), otherwise untouched. Without a loss flag an assistant message is learned; a missing
    `ends` means true. Keys that are neither read nor known are passed over (`read_conversations` names them).
    Raises UserError saying `where` and what is wrong.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, found {_kind(record)}")
    turns = _turns(record)
    if turns is None:
        raise UserError(f"{where}: has neither 'messages' nor 'conversations' (keys: {', '.join(map(str, record))})")
    if not isinstance(turns, list):
        raise UserError(f"{where}: its turns are {_kind(turns)}, not a list")
    _refuse_unread(record, UNREAD_OF_RECORD, where)
    if _loss_weight(record, where) not in (None, 1):
        raise UserError(f"{where}: {_flags(record)} of a record is not obeyed; put it at its messages, or remove it")
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

    Strict: raises UserError at the first record that is no conversation, or says what cannot be read, naming file and
    record. A missing id becomes the file's name and the record's number.
    """
    for number, record in enumerate(read_records(path)):
        if record.error:
            raise UserError(f"{record.where}: {record.error}")
        conversation = parse_conversation(record.value, record.where)
        for message, key in _unknown_keys(record.value):
            _note_once(os.fspath(path), key, f"{record.where}, message {message}")
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
    it can be obeyed. Raises UserError (without saying where) for a flag that is neither a truth value nor a number of 0
    or more, and for two flags that disagree.
    """
    if LOSS_FLAGS.keys().isdisjoint(turn):
        return None
    found: dict[str, float] = {}
    for key, positive in LOSS_FLAGS.items():
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or not 0 <= value <= (1e300 if positive else 1):
            raise UserError(f"{key!r} is {_shown(value)}; expected true or false, 1 or 0")
        found[key] = float(value if positive else 1 - value)
    if len(set(found.values())) > 1:
        flags = " and ".join(f"{key!r}: {_shown(turn[key])}" for key in found)
        raise UserError(f"{flags} contradict each other about whether it is learned; keep one of them")
    return next(iter(found.values()), None)


def _parse_message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: expected an object, found {_kind(turn)}")
    _refuse_unread(turn, UNREAD, where)
    name = turn["role"] if turn.get("role") is not None else turn.get("from")
    role = ROLE_NAMES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{where}: unknown role {name!r} (known: {', '.join(ROLE_NAMES)})")
    weight = _loss_weight(turn, where)
    if weight not in (None, 0, 1):
        raise UserError(
            f"{where}: {_flags(turn)} gives it a weight of {weight:g}; only 1 (learned) and 0 (not) can be obeyed"
        )
    if weight and role != "assistant":
        raise UserError(f"{where}: {_flags(turn)} says that a {role} message is learned; only the assistant's are")
    ends = turn.get("ends")
    if not (ends is None or isinstance(ends, bool)) or (ends is False and role != "assistant"):
        raise UserError(f"{where}: 'ends' is {ends!r}; it is true or false, and false for assistant messages only")
    train = role == "assistant" if weight is None else weight == 1
    return Message(role, _content(turn, where), train, ends is not False)


def _content(turn: dict[str, Any], where: str) -> str:
    """The text of `content` or `value`; parts are joined without anything between them, as the API means them."""
    content, value = turn.get("content"), turn.get("value")
    if content is not None and value is not None and content != value:
        raise UserError(f"{where}: its 'content' and its 'value' differ; keep one of them")
    content = value if content is None else content
    if isinstance(content, list) and content:
        content = "".join(_text_of_part(part, f"{where}, part {i}") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise UserError(f"{where}: its content is {'an empty list' if content == [] else _kind(content)}, not text")
    return repair_text(content)


def _text_of_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise UserError(f"{where}: expected an object with a text, found {_kind(part)}")
    kind, text = part.get("type"), part.get("text")
    if kind not in (None, "text", "input_text", "output_text"):
        raise UserError(f"{where}: is of type {_shown(kind)}, not text; {_TEXT_ONLY}")
    if not isinstance(text, str):
        raise UserError(f"{where}: its text is {_kind(text)}, not text")
    return text


def _turns(record: dict[str, Any]) -> Any:
    return next((record[k] for k in ("messages", "conversations", "items") if record.get(k) is not None), None)


def _flags(turn: dict[str, Any]) -> str:
    return " and ".join(repr(key) for key in LOSS_FLAGS if turn.get(key) is not None)


def _loss_weight(turn: dict[str, Any], where: str) -> float | None:
    try:
        return loss_weight(turn)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _refuse_unread(values: dict[str, Any], remedies: dict[str, str], where: str) -> None:
    key = next((key for key in values if key in remedies and not _is_empty(values[key])), None)
    if key is not None:
        raise UserError(f"{where}: {key!r} cannot be read, and is not dropped silently: {remedies[key]}")


def _is_empty(value: Any) -> bool:
    """Whether a value says nothing; tables hold every column in every row, and some hold JSON as text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, (list, dict)):
        return not any(value.values() if isinstance(value, dict) else value)
    return not value


def _unknown_keys(record: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """(number of the message, key) for every key of a parsed record's messages that may mean anything."""
    for i, turn in enumerate(_turns(record)):
        for key in turn:
            if key not in _READ and key not in ABOUT and not _is_empty(turn[key]):
                yield i, key


_noted: set[tuple[str, str]] = set()  # a run reads its files more than once


def _note_once(path: str, key: str, where: str) -> None:
    if (path, key) not in _noted:
        _noted.add((path, key))
        logging.getLogger(__name__).warning(
            "note: %s: the key %s is not read, here and wherever else the file has it", where, repr(key[:60])
        )


def _text(value: Any, default: str) -> str:
    return default if value is None else repair_text(str(value))


def _number(value: Any, default: int, what: str) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{what} is {_kind(value)}, not a whole number")
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
