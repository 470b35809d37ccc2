"""The types that every reader produces, and shared code for roles, texts, content parts, tool calls and times."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cleaning.sources.marks import (
    LABELLED,
    NOT_LEARNED,
    comes_to_its_end,
    is_learned,
    last_answer_is_cut,
    none_is_learned,
)
from fastft.common.records import parse_json, repair_text
from fastft.data.conversation import ROLE_NAMES
from fastft.data.marks import MARKS_OF_MESSAGE, MARKS_OF_RECORD, after_last_question, label_against
from fastft.errors import UserError


class Rejection(Exception):  # noqa: N818  a rejection is an outcome, not an error
    """A record or a conversation is not kept. The ledger counts by `reason`; `detail` is for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(slots=True)
class Turn:
    """One turn as a dump has it."""

    role: str  # one of fastft.data.conversation.ROLES
    text: str
    html: bool = False  # the text is HTML, which is converted later
    calls: bool = False  # the turn calls a tool
    train: bool = True  # whether to learn from it, if it is an answer
    ends: bool = True  # false for an answer that was cut


@dataclass(slots=True)
class RawConversation:
    """A conversation as a reader found it. `id`, `model` and `lang` are "" if the dump does not name them."""

    id: str
    model: str
    turns: list[Turn]
    lang: str = ""
    format: str = ""
    # These three are set only for conversations that the cleaner itself wrote.
    source: str = ""
    part: int = 0
    parts: int = 1
    time: float = 0.0  # when it was last changed, in unix seconds; 0 if the dump does not say
    tree: bytes = b""  # where a tree gave several conversations: a value that all of them share
    # Signs that plugins or tools took part, as {name of the filter that looks for them: its complaint}.
    sessions: dict[str, str] = field(default_factory=dict)
    # Counts of what was left out or changed while reading: "dropped tool browser", "unescaped questions", …
    notes: Counter[str] = field(default_factory=Counter)


# What dumps call the four roles. These are more names than the trainer's reader takes.
ROLES_IN_DUMPS = {
    **ROLE_NAMES,
    "bot": "assistant",
    "function_call": "assistant",  # the assistant's turn that calls a tool
    "tool_call": "assistant",
    "tool_response": "tool",
    "tool_result": "tool",
    "prompter": "user",
    "developer": "system",
}


_CALLS = ("function_call", "tool_call")  # roles in ShareGPT's format for an assistant's turn that is only a tool call


def read_turn(turn: Any, number: int, notes: Counter[str]) -> Turn:
    """Read a turn that names its role (`role`, `from` or `sender`) and its text (`content`, `value`, `text` or `markdown`).

    Tool calls beside an answer's text are added to the text, each on a line of its own, as dumps in ShareGPT's format write
    them: {"name": "…", "arguments": {…}}. Raises Rejection.
    """
    if not isinstance(turn, dict):
        raise Rejection("not_a_conversation", f"turn {number} is not an object but {shown(turn)}")
    name = first_of(turn, "role", "from", "sender")
    role = role_of(name, number)
    text = read_content(first_of(turn, "content", "value", "text", "markdown"), number, notes)
    calls = _calls(turn, number) if role == "assistant" else []
    if calls:
        text = "\n".join([text, *calls] if text.strip() else calls)
    return marked(Turn(role, text, calls=bool(calls) or name.lower() in _CALLS), turn, number, notes)


def marked(turn: Turn, message: dict, number: int, notes: Counter[str]) -> Turn:
    """Return `turn` with what its `message` says about an answer: whether it is to be learned, and whether it is complete."""
    if turn.role == "assistant" and not MARKS_OF_MESSAGE.isdisjoint(message):
        try:
            turn.train = is_learned(message, notes)
        except UserError as error:
            raise Rejection("unclear_loss_flag", f"turn {number}: {error}") from None
        turn.ends = comes_to_its_end(message, notes)
    return turn


def mark_by_record(conversation: RawConversation, record: dict) -> None:
    """Apply, in place, what a record says about all of its answers, or about those to its last question."""
    if MARKS_OF_RECORD.isdisjoint(record):
        return
    try:
        unwanted = label_against(record)
    except UserError as error:
        raise Rejection("unclear_loss_flag", str(error)) from None
    if none_is_learned(record):
        _unlearn(conversation.turns, conversation.notes, NOT_LEARNED)
    last = after_last_question(conversation.turns)
    if unwanted:
        _unlearn(last, conversation.notes, LABELLED)
    if last and last[0].role == "assistant" and last_answer_is_cut(record, conversation.notes):
        last[0].ends = False


def _unlearn(turns: list[Turn], notes: Counter[str], reason: str) -> None:
    for turn in turns:
        if turn.role == "assistant":
            notes[reason] += turn.train
            turn.train = False


def _calls(turn: dict, number: int) -> list[str]:
    """Return the calls in OpenAI's `tool_calls` and in `function_call`, which was the name before 2023-11."""
    listed = turn.get("tool_calls") if isinstance(turn.get("tool_calls"), list) else []
    calls = [call.get("function") for call in listed if isinstance(call, dict)] + [turn.get("function_call")]
    return [_call(call, number) for call in calls if isinstance(call, dict) and text_of(call.get("name"))]


def _call(call: dict, number: int) -> str:
    """Return a call as one line of JSON. OpenAI has the arguments as JSON in a string; a string that is not JSON stays one."""
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


_TEXTS = (None, "text", "input_text", "output_text", "audio_transcription")


def role_of(name: Any, number: int) -> str:
    """Return the role that a dump calls `name`. Raises Rejection for an unknown one."""
    role = ROLES_IN_DUMPS.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Rejection("unknown_role", f"turn {number} is from {shown(name)}")
    return role


def read_content(content: Any, number: int, notes: Counter[str]) -> str:
    """Return the text of a turn's content, which is a text or a list of parts.

    Texts that follow each other are joined without a separator, because an API that attaches citations ends a part in the
    middle of a sentence. Parts of any other type are left out and counted by type; between two texts, a line end takes
    their place.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return repair_text(content)
    if not isinstance(content, list):
        raise Rejection("not_a_conversation", f"the content of turn {number} is not text but {shown(content)}")
    pieces = [""]
    for part in content:
        text, kind = _text_part(part)
        if text is not None:
            pieces[-1] += repair_text(text)
        elif part is not None:
            notes[f"dropped part {label(kind or type(part).__name__)}"] += 1
            pieces.append("")
    return "\n".join(piece for piece in pieces if piece)


def _text_part(part: Any) -> tuple[str | None, Any]:
    """Return (the text of a part, or None if it is something else; the part's type)."""
    if not isinstance(part, dict):
        return (part if isinstance(part, str) else None), None
    kind = first_of(part, "type", "content_type")
    text = first_of(part, "text", "value", "content")
    if isinstance(text, dict):  # OpenAI's Assistants API: {"type": "text", "text": {"value": "…"}}
        text = text.get("value")
    is_text = isinstance(text, str) and kind in _TEXTS
    return (text if is_text else None), kind


def first_of(record: dict, *keys: str) -> Any:
    """Return the first value under `keys` that is not null: a Parquet row has every column, most of them null."""
    for key in keys:
        value = record.get(key)
        if value is not None:
            return value
    return None


def id_in(record: Any) -> str:
    """Return the id of a record, even of one that holds no conversation; "" if it has none."""
    keys = ("id", "conversation_id", "conversation_hash", "uuid", "message_tree_id")
    return text_of(first_of(record, *keys)) if isinstance(record, dict) else ""


def text_of(value: Any) -> str:
    """Return an id or a model's name as text: a text or a number; "" for anything else."""
    if isinstance(value, str):
        return repair_text(value[:1000])
    return str(value) if isinstance(value, (int, float)) and number_of(value) is not None else ""


def number_of(value: Any) -> float | None:
    """Return a number as a float, or None for anything else, for NaN, and for what a float cannot hold."""
    if not isinstance(value, (int, float)) or value != value or not -1e300 < value < 1e300:
        return None
    return float(value)


_TIMES = ("update_time", "updated_at", "timestamp", "tstamp", "create_time", "created_at", "created_date")
_DATE = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d:\d\d)(\.\d+)?)?\s*(?:Z|UTC|([+-]\d\d):?(\d\d))?")


def time_in(record: dict) -> float:
    """Return when the record was last changed, in unix seconds, by the first of the usual keys that holds a time; else 0."""
    return next((time for key in _TIMES if (time := time_of(record.get(key)))), 0.0)


def time_of(value: Any) -> float:
    """Return the unix seconds of a number of seconds or milliseconds or of an ISO 8601 date (UTC by default); else 0."""
    if isinstance(value, str) and (found := _DATE.fullmatch(value.strip()[:40])):
        date, clock, fraction, hours, minutes = found.groups()
        zone = f"{hours}:{minutes}" if hours else "+00:00"
        try:
            return max(
                0.0, datetime.fromisoformat(f"{date}T{clock or '00:00:00'}{zone}").timestamp() + float(fraction or 0)
            )
        except ValueError:  # such as the 31st of February
            return 0.0
    seconds = None if isinstance(value, bool) else number_of(value)
    if seconds is None or not 0 < seconds < 1e14:
        return 0.0
    return seconds / 1000 if seconds > 1e11 else seconds  # 1e11 seconds would be the year 5138


def label(value: Any) -> str:
    """Return a name from the dump as part of a counter's name; it is short, so that no dump can fill the report."""
    return " ".join(text_of(value).split())[:40] or "unnamed"


def as_list(value: Any, what: str) -> list:
    """Return `value`. Raises Rejection unless it is a list; `what` is what the message calls it."""
    if not isinstance(value, list):
        raise Rejection("not_a_conversation", f"its {what} are not a list but {shown(value)}")
    return value


def as_object(value: Any, what: str) -> dict:
    """Return `value`. Raises Rejection unless it is an object; `what` is what the message calls it."""
    if not isinstance(value, dict):
        raise Rejection("not_a_conversation", f"{what} is not an object but {shown(value)}")
    return value


def keys_of(record: dict) -> str:
    """Return the first keys of a record, for a message."""
    return ", ".join(repr(label(key)) for key in list(record)[:8]) or "none"


def shown(value: Any) -> str:
    """Return a value as a message can show it: short and valid text, made without walking through a deep or huge value."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    if isinstance(value, int) and number_of(value) is None:
        return "a huge number"
    text = repr(value[:100] if isinstance(value, str) else value)
    return repair_text(text if len(text) <= 60 else text[:57] + "...")
