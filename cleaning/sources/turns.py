"""What every reader of a dump produces, and the small pieces they share: roles, text, content parts."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastft.conversation import ROLE_NAMES
from fastft.records import repair_text


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


@dataclass(slots=True)
class RawConversation:
    """A conversation before conversion; `id`, `model` and `lang` are "" where the dump has none."""

    id: str
    model: str
    turns: list[Turn]
    lang: str = ""
    format: str = ""
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


def read_turn(turn: Any, number: int, notes: Counter[str]) -> Turn:
    """A turn that names its role (`role`, `from` or `sender`) and its text (`content`, `value`, `text` or `markdown`)."""
    if not isinstance(turn, dict):
        raise Rejection("not_a_conversation", f"turn {number} is not an object but {shown(turn)}")
    name = first(turn, "role", "from", "sender")
    return Turn(role_of(name, number), read_content(first(turn, "content", "value", "text", "markdown"), number, notes))


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
