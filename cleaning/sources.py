"""A record of a dump to a conversation as it was shared: one small reader per shape of dump.

    ShareGPT         {"id", "conversations" or "items": [{"from": "human", "value": "…"}, …], "model"?}
    OpenAI style     {"id"?, "messages": [{"role": "user", "content": "…"}, …], "model"?}

ShareGPT's `value` is the page's HTML in an assistant turn and plain text in a human turn, so text is converted by role:
a human turn never passes an HTML parser (one would eat `vector<int>`). Not every dump that looks like ShareGPT still
holds HTML: many are markdown already, and an answer may itself be a piece of HTML that was asked for. `mark_html` says
how the two are told apart; in doubt the text stays as it is, because unconverted HTML can still be converted.
"""

import re
from dataclasses import dataclass
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
    """A conversation before conversion; `id` is "" where the dump has none."""

    id: str
    model: str
    turns: list[Turn]


def read_conversation(record: Any) -> RawConversation:
    """Raises Rejection (`not_a_conversation`, `unknown_role`) for a record that is none."""
    if not isinstance(record, dict):
        raise Rejection("not_a_conversation", f"expected an object, found {_shown(record)}")
    turns = next((record[key] for key in ("messages", "conversations", "items") if record.get(key) is not None), None)
    if turns is None:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise Rejection("not_a_conversation", repair_text(f"no 'conversations', 'items' or 'messages'; keys: {keys}"))
    if not isinstance(turns, list):
        raise Rejection("not_a_conversation", f"its turns are not a list but {_shown(turns)}")
    conversation = RawConversation(
        id=_text(record.get("id")),
        model=_text(record.get("model")),
        turns=[_read_turn(turn, number) for number, turn in enumerate(turns, start=1)],
    )
    mark_html(conversation.turns)
    return conversation


def _read_turn(turn: Any, number: int) -> Turn:
    if not isinstance(turn, dict):
        raise Rejection("not_a_conversation", f"turn {number} is not an object but {_shown(turn)}")
    name = turn.get("role", turn.get("from"))
    role = ROLE_NAMES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise Rejection("unknown_role", f"turn {number} is from {_shown(name)}")
    text = turn.get("content", turn.get("value"))
    if text is not None and not isinstance(text, str):
        raise Rejection("not_a_conversation", f"the content of turn {number} is not text but {_shown(text)}")
    return Turn(role, repair_text(text or ""))


# The page's own wrapper of an answer, 2022-12 to 2024. Nobody writes this class by hand.
_PAGE_WRAPPER = re.compile(r'\s*<div[^>]*\sclass="[^"]*\bmarkdown\b[^"]*\b(?:prose|break-words)\b')
# What a sanitiser left of it: a bare <div> and, without a space, a block. People write <div> with line ends.
_BARE_WRAPPER = re.compile(r"<div><(?:p|pre|ol|ul|h[1-6]|table|blockquote|hr)\b[\s\S]*</div>\s*\Z")


def mark_html(turns: list[Turn]) -> None:
    """Set `html` on the assistant turns that are HTML of the page.

    Evidence: the page's own wrapper, which is certain; or a bare `<div>` that begins with a block, if every answer of
    the conversation that is not empty has one of the two.
    """
    answers = [turn for turn in turns if turn.role == "assistant" and turn.text.strip()]
    certain = [bool(_PAGE_WRAPPER.match(turn.text)) for turn in answers]
    bare = [bool(_BARE_WRAPPER.match(turn.text)) for turn in answers]
    bare_is_page = all(c or b for c, b in zip(certain, bare))
    for turn, is_certain, is_bare in zip(answers, certain, bare):
        turn.html = is_certain or (is_bare and bare_is_page)


def looks_like_html(text: str) -> bool:
    """True for text that begins and ends with a tag. Not evidence enough to convert it, but enough to mention it."""
    return re.match(r"\s*<[a-z][a-z0-9]*[ >]", text) is not None and text.rstrip().endswith(">")


def _text(value: Any) -> str:
    return "" if value is None else repair_text(str(value))


def _shown(value: Any) -> str:
    """A value as a message can show it: short, and valid text."""
    shown = repr(value)
    return repair_text(shown if len(shown) <= 60 else shown[:57] + "...")
