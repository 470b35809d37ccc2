"""Define the one data type of the project, a conversation, and read and write its file: JSON Lines with a fixed schema.

    {"id": str, "source": str, "lang": str, "model": str, "part": 0, "parts": 1,
     "messages": [{"role": "system|user|assistant|tool", "content": str, "train": bool, "ends": bool}]}

The cleaner writes this file, and everything else reads it. `read_conversations` also takes plain `messages` (role,
content) and ShareGPT `conversations` (from, value), so that a file from elsewhere can be trained on as it is. `train`
marks the assistant messages to learn from. `ends` is false for an answer that was cut or
continues elsewhere: its text is learned, but not that it ends there.

Nothing that changes what is trained is dropped silently. A key of a message is one of four kinds:

- Read: role, content, `ends`, and the marks of fastft.data.marks, which say in many spellings whether an answer is to be
  learned, and whether it was cut. An answer with `ends` false is learned without its end, as the cleaner means it. An answer
  that only another tool's mark calls cut (by a limit, an error or a user) is not trained at all: the cleaner turns such a mark
  into `ends`, because its filters have checked the text; here nothing has checked it.
- Refused unless it is empty: text or calls that a chat template would show, but this type cannot hold (UNREAD).
- Ignored: what datasets note about a message, such as ids, names, times and ratings (ABOUT).
- Any other key is probably such a note, too, but this is not certain, so a warning names it once per file.

Two marks are read from the other columns of a record: a label for KTO, about the answers to the last question, and an ending
such as `finish_reason`, about the last answer. Columns that belong to the prompt (UNREAD_OF_RECORD) are refused, and so are
loss flags other than 1, which are supported at messages only. All other columns are ignored. Imports nothing heavy.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from fastft.common.records import read_records, repair_text
from fastft.data.marks import (
    LOSS_FLAGS,
    MARKS_OF_MESSAGE,
    PIECE_FLAGS,
    after_last_question,
    ending_of,
    ending_of_last,
    flag_weight,
    kind_of,
    label_against,
    loss_weight,
    shown,
)
from fastft.errors import UserError

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")

# The names of the four roles in dumps and datasets.
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

_CALLS = "write each call as text into its content (`python -m cleaning --without tool_session` does), or leave the record out"
_TOOLS = "write the tools as text into a system message, or leave the record out"
_THOUGHTS = "write it into 'content' as the model's template does (often <think>…</think>), or remove the key"
_TEXT_ONLY = "only text is learned; leave the record out"
_SYSTEM = "make it the first message, with the role system, or remove the key"

# Contents of a message that this type cannot represent, each with advice for the user.
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
    **dict.fromkeys(PIECE_FLAGS, "a message is learned as a whole or not at all; use 'train' instead"),
}
# The same for a record.
UNREAD_OF_RECORD = {
    **dict.fromkeys(("tools", "functions"), _TOOLS),
    **dict.fromkeys(("system", "system_prompt"), _SYSTEM),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _TEXT_ONLY),
    "documents": UNREAD["documents"],
}

_READ = frozenset(("role", "from", "content", "value", *MARKS_OF_MESSAGE))

# Notes of datasets about a message: author, time, origin, rating.
ABOUT = frozenset(
    """id uuid message_id parent_id parent index turn turn_id turn_identifier name author sender tool_call_id
    model lang language timestamp time date create_time created_at update_time updated_at
    score rating labels toxic redacted hashed_ip country state header tokens token_count""".split()
)


@dataclass(slots=True)
class Message:
    """One turn of a dialogue."""

    role: str  # one of ROLES
    content: str
    train: bool = False  # learn from it; assistant messages only
    ends: bool = True  # False if the text continues elsewhere, so that its end of turn is not learned


@dataclass(slots=True)
class Conversation:
    """A dialogue, or number `part` (from 0) of the `parts` into which a long one was split."""

    id: str
    messages: list[Message] = field(default_factory=list)
    source: str = ""
    lang: str = ""
    model: str = ""
    part: int = 0
    parts: int = 1

    def to_json(self) -> bytes:
        """Return one line of the file, without the line end. Every key is present, as the library `datasets` needs it."""
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
    """Build a Conversation from a record of the project's own schema, of `messages`, or of ShareGPT `conversations`.

    Text is repaired (`repair_text`) and otherwise unchanged. An assistant message without a mark is learned; a missing
    `ends` means true. Keys that are neither read nor known are ignored here (`read_conversations` names them). Raises
    UserError, which begins with `where` and says what is wrong.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, found {kind_of(record)}")
    turns = _turns(record)
    if turns is None:
        raise UserError(f"{where}: has neither 'messages' nor 'conversations' (keys: {', '.join(map(str, record))})")
    if not isinstance(turns, list):
        raise UserError(f"{where}: its turns are {kind_of(turns)}, not a list")
    _refuse_unread(record, UNREAD_OF_RECORD, where)
    if _at(where, flag_weight, record) not in (None, 1):
        raise UserError(f"{where}: {_flags(record)} of a record is not obeyed; put it at its messages, or remove it")
    messages = [_parse_message(turn, f"{where}, message {i}") for i, turn in enumerate(turns, 1)]
    _obey_marks_of_record(record, messages, where)
    return Conversation(
        id=_text(record.get("id"), ""),
        messages=messages,
        source=_text(record.get("source"), ""),
        lang=_text(record.get("lang"), ""),
        model=_text(record.get("model"), ""),
        part=_number(record.get("part"), 0, f"{where}: 'part'"),
        parts=_number(record.get("parts"), 1, f"{where}: 'parts'"),
    )


def read_conversations(path: str | os.PathLike) -> Iterator[Conversation]:
    """Yield the conversations of a file, in any container that `read_records` knows.

    Raises UserError, with file and record, at the first record that is no conversation or has unreadable contents. A
    missing id is replaced by the file's name and the record's number.
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
    """Return (messages before the first question, rounds). A round begins at each user message."""
    first = next((i for i, message in enumerate(messages) if message.role == "user"), len(messages))
    rounds: list[list[Message]] = []
    for message in messages[first:]:
        if message.role == "user":
            rounds.append([])
        rounds[-1].append(message)
    return messages[:first], rounds


def _parse_message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: expected an object, found {kind_of(turn)}")
    _refuse_unread(turn, UNREAD, where)
    name = turn["role"] if turn.get("role") is not None else turn.get("from")
    role = ROLE_NAMES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{where}: unknown role {name!r} (known: {', '.join(ROLE_NAMES)})")
    weight = _at(where, loss_weight, turn)
    if weight not in (None, 0, 1):
        raise UserError(
            f"{where}: {_flags(turn)} gives it a weight of {weight:g}; only 1 (learned) and 0 (not) can be obeyed"
        )
    if weight and role != "assistant":
        raise UserError(f"{where}: {_flags(turn)} says that a {role} message is learned; only the assistant's are")
    ends = turn.get("ends")
    if not (ends is None or isinstance(ends, bool)) or (ends is False and role != "assistant"):
        raise UserError(f"{where}: 'ends' is {ends!r}; it is true or false, and false for assistant messages only")
    is_cut = role == "assistant" and ending_of(turn) != ""
    train = role == "assistant" and weight != 0 and not is_cut
    return Message(role, _content(turn, where), train, ends is not False and not is_cut)


def _obey_marks_of_record(record: dict[str, Any], messages: list[Message], where: str) -> None:
    """Apply, in place, what the record says about its last answers: a label for KTO, and how the last one ended."""
    last = after_last_question(messages)
    if _at(where, label_against, record):
        for message in last:
            message.train = False
    if last and last[0].role == "assistant" and ending_of_last(record):
        last[0].train = last[0].ends = False


def _content(turn: dict[str, Any], where: str) -> str:
    """Return the text of `content` or `value`. Parts are joined with nothing between them, as in OpenAI's API."""
    content, value = turn.get("content"), turn.get("value")
    if content is not None and value is not None and content != value:
        raise UserError(f"{where}: its 'content' and its 'value' differ; keep one of them")
    content = value if content is None else content
    if isinstance(content, list) and content:
        content = "".join(_text_of_part(part, f"{where}, part {i}") for i, part in enumerate(content, 1))
    if not isinstance(content, str):
        raise UserError(f"{where}: its content is {'an empty list' if content == [] else kind_of(content)}, not text")
    return repair_text(content)


def _text_of_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise UserError(f"{where}: expected an object with a text, found {kind_of(part)}")
    kind, text = part.get("type"), part.get("text")
    if kind not in (None, "text", "input_text", "output_text"):
        raise UserError(f"{where}: is of type {shown(kind)}, not text; {_TEXT_ONLY}")
    if not isinstance(text, str):
        raise UserError(f"{where}: its text is {kind_of(text)}, not text")
    return text


def _turns(record: dict[str, Any]) -> Any:
    """Return the value that should be the list of messages; None if the record has none."""
    return next((record[k] for k in ("messages", "conversations", "items") if record.get(k) is not None), None)


def _flags(turn: dict[str, Any]) -> str:
    """Return the names of the loss flags that a message or record has, for an error."""
    return " and ".join(repr(key) for key in LOSS_FLAGS if turn.get(key) is not None)


def _at(where: str, read: Callable[[dict], Any], values: dict[str, Any]) -> Any:
    """Return read(values). An error begins with `where`."""
    try:
        return read(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _refuse_unread(values: dict[str, Any], remedies: dict[str, str], where: str) -> None:
    key = next((key for key in values if key in remedies and not _is_empty(values[key])), None)
    if key is not None:
        raise UserError(f"{where}: {key!r} cannot be read, and is not dropped silently: {remedies[key]}")


def _is_empty(value: Any) -> bool:
    """Tell whether a value is empty. Tables have every column in every row, and some contain JSON as text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, (list, dict)):
        return not any(value.values() if isinstance(value, dict) else value)
    return not value


def _unknown_keys(record: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Yield (number of the message, key) for every key of a parsed record's messages whose meaning is not known."""
    for i, turn in enumerate(_turns(record), 1):
        for key in turn:
            is_value = isinstance(turn[key], (bool, int, float))  # false and 0 are values, too
            if key not in _READ and key not in ABOUT and (is_value or not _is_empty(turn[key])):
                yield i, key


_noted: set[tuple[str, str]] = set()  # (file, key) of all warnings so far; a run reads its files more than once


def _note_once(path: str, key: str, where: str) -> None:
    if (path, key) not in _noted:
        _noted.add((path, key))
        logger.warning("%s: the key %r is not read, here and wherever else the file has it", where, key[:60])


def _text(value: Any, default: str) -> str:
    return default if value is None else repair_text(str(value))


def _number(value: Any, default: int, what: str) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{what} is {kind_of(value)}, not a whole number")
    return value
