"""What every reader of a dump produces, and the small pieces they share: roles, text, content parts, calls, times."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fastft.conversation import ROLE_NAMES
from fastft.records import parse_json, repair_text


class Rejection(Exception):  # noqa: N818  a rejection is an outcome, not an error
    """Why a record or a conversation is not kept: `reason` is what the ledger counts, `detail` what a person reads."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(slots=True)
class Turn:
    role: str  # one of fastft.conversation.ROLES
    text: str
    html: bool = False
    calls: bool = False  # asks for a tool


@dataclass(slots=True)
class RawConversation:
    """A conversation before conversion; `id`, `model` and `lang` are "" where the dump has none."""

    id: str
    model: str
    turns: list[Turn]
    lang: str = ""
    format: str = ""
    time: float = 0.0  # when it was last changed, in unix seconds; 0 where the dump does not say
    tree: bytes = b""  # the same for all branches of a tree that gave several
    # What the record says of the part that plugins and tools had in it: {name of the filter: complaint}.
    sessions: dict[str, str] = field(default_factory=dict)
    # What was left out or changed on the way here, by name: "dropped tool browser", "unescaped questions", …
    notes: Counter[str] = field(default_factory=Counter)


# More names than the contract's reader takes: dumps in the wild hold them, our own files do not.
ROLES_IN_DUMPS = {
    **ROLE_NAMES,
    "bot": "assistant",
    "function_call": "assistant",  # the assistant's turn that asks for a tool
    "tool_call": "assistant",
    "tool_response": "tool",
    "tool_result": "tool",
    "prompter": "user",
    "developer": "system",
}


_CALLS = ("function_call", "tool_call")  # ShareGPT's names for an assistant's turn that is nothing but a call


def read_turn(turn: Any, number: int, notes: Counter[str]) -> Turn:
    """A turn that names its role (`role`, `from` or `sender`) and its text (`content`, `value`, `text` or `markdown`).

    Calls of tools that stand beside an answer's text follow it, each on a line as ShareGPT's dumps write them:
    {"name": "…", "arguments": {…}}.
    """
    if not isinstance(turn, dict):
        raise Rejection("not_a_conversation", f"turn {number} is not an object but {shown(turn)}")
    name = first(turn, "role", "from", "sender")
    role = role_of(name, number)
    text = read_content(first(turn, "content", "value", "text", "markdown"), number, notes)
    calls = _calls(turn, number) if role == "assistant" else []
    if calls:
        text = "\n".join([text, *calls] if text.strip() else calls)
    return Turn(role, text, calls=bool(calls) or name.lower() in _CALLS)


def _calls(turn: dict, number: int) -> list[str]:
    """Of OpenAI's `tool_calls`, and of `function_call`, their name before 2023-11."""
    listed = turn.get("tool_calls") if isinstance(turn.get("tool_calls"), list) else []
    calls = [call.get("function") for call in listed if isinstance(call, dict)] + [turn.get("function_call")]
    return [_call(call, number) for call in calls if isinstance(call, dict) and text_of(call.get("name"))]


def _call(call: dict, number: int) -> str:
    """Arguments are JSON inside a string there; what is not JSON stays a string."""
    arguments = call.get("arguments")
    try:
        if isinstance(arguments, str):
            arguments = parse_json(repair_text(arguments).encode())
    except ValueError:
        pass
    try:
        text = json.dumps({"name": text_of(call["name"]), "arguments": arguments}, ensure_ascii=False)
    except RecursionError:
        raise Rejection("not_a_conversation", f"turn {number} calls a tool with arguments nested too deeply") from None
    return repair_text(text)


def role_of(name: Any, number: int) -> str:
    role = ROLES_IN_DUMPS.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Rejection("unknown_role", f"turn {number} is from {shown(name)}")
    return role


def read_content(content: Any, number: int, notes: Counter[str]) -> str:
    """Text, or a list of parts: the texts are joined by line ends, anything else is counted by its type."""
    if content is None:
        return ""
    if isinstance(content, str):
        return repair_text(content)
    if not isinstance(content, list):
        raise Rejection("not_a_conversation", f"the content of turn {number} is not text but {shown(content)}")
    return "\n".join(_text_parts(content, notes))


def _text_parts(parts: Iterable[Any], notes: Counter[str]) -> Iterator[str]:
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        kind = first(part, "type", "content_type") if isinstance(part, dict) else None
        if isinstance(text, str) and kind in (None, "text", "input_text", "output_text", "audio_transcription"):
            if text:
                yield repair_text(text)
        elif part is not None:
            notes[f"dropped part {label(kind or type(part).__name__)}"] += 1


def first(record: dict, *keys: str) -> Any:
    """The value of the first of `keys` that is there and not null (a Parquet row has every column)."""
    for key in keys:
        value = record.get(key)
        if value is not None:
            return value
    return None


def id_in(record: Any) -> str:
    """What a record calls itself, also one that holds no conversation; "" for nothing."""
    keys = ("id", "conversation_id", "conversation_hash", "uuid", "message_tree_id")
    return text_of(first(record, *keys)) if isinstance(record, dict) else ""


def text_of(value: Any) -> str:
    """An id, a model's name: text or a number, as text; anything else is none."""
    if isinstance(value, str):
        return repair_text(value[:1000])
    return str(value) if isinstance(value, (int, float)) and number_of(value) is not None else ""


def number_of(value: Any) -> float | None:
    """A number that can be compared, or None (no NaN, nothing that a float cannot hold)."""
    if not isinstance(value, (int, float)) or value != value or not -1e300 < value < 1e300:
        return None
    return float(value)


_TIMES = ("update_time", "updated_at", "timestamp", "tstamp", "create_time", "created_at", "created_date")
_DATE = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d:\d\d)(\.\d+)?)?\s*(?:Z|UTC|([+-]\d\d):?(\d\d))?")


def time_in(record: dict) -> float:
    """When the record was last changed, in unix seconds, by the first of the usual keys that holds a time; else 0."""
    return next((time for key in _TIMES if (time := time_of(record.get(key)))), 0.0)


def time_of(value: Any) -> float:
    """Unix seconds of a number of seconds or milliseconds, or of an ISO 8601 date (UTC unless it says); else 0."""
    if isinstance(value, str) and (found := _DATE.fullmatch(value.strip()[:40])):
        date, clock, fraction, hours, minutes = found.groups()
        zone = f"{hours}:{minutes}" if hours else "+00:00"
        try:
            return max(
                0.0, datetime.fromisoformat(f"{date}T{clock or '00:00:00'}{zone}").timestamp() + float(fraction or 0)
            )
        except ValueError:  # the 31st of February
            return 0.0
    seconds = None if isinstance(value, bool) else number_of(value)
    if seconds is None or not 0 < seconds < 1e14:
        return 0.0
    return seconds / 1000 if seconds > 1e11 else seconds  # 1e11 seconds are the year 5138


def label(value: Any) -> str:
    """A name from the dump as part of a counter's name: short, so that no dump can fill the report."""
    return " ".join(text_of(value).split())[:40] or "unnamed"


def as_list(value: Any, what: str) -> list:
    if not isinstance(value, list):
        raise Rejection("not_a_conversation", f"its {what} are not a list but {shown(value)}")
    return value


def as_object(value: Any, what: str) -> dict:
    if not isinstance(value, dict):
        raise Rejection("not_a_conversation", f"{what} is not an object but {shown(value)}")
    return value


def keys_of(record: dict) -> str:
    return ", ".join(repr(label(key)) for key in list(record)[:8]) or "none"


def shown(value: Any) -> str:
    """A value as a message can show it: short, valid text, and no walk through what may be deep or huge."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    if isinstance(value, int) and number_of(value) is None:
        return "a huge number"
    text = repr(value[:100] if isinstance(value, str) else value)
    return repair_text(text if len(text) <= 60 else text[:57] + "...")
