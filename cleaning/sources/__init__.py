"""A record of a dump to conversations as they were shared: one small reader per format.

    conversations_in(record)                      every conversation of a record, its format recognised by its shape
    conversations_in(record, Reading(format="oasst", every_branch=True))

`FORMATS` lists the formats. ShareGPT's `value` is the page's HTML in an assistant turn and plain text in a human turn, so
text is converted by role: a human turn never passes an HTML parser (one would eat `vector<int>`). Not every dump that
looks like ShareGPT still holds HTML: many are markdown already, and an answer may itself be a piece of HTML that was
asked for. `cleaning.sources.eras` says how they are told apart, and what sharegpt.com did to human turns; in doubt the
text stays as it is. All other formats hold text, except pages saved from the browser. A row of the cleaner's own
rejected.jsonl is read as the record in it (`cleaning.sources.rejected`).
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cleaning.sources import lists, pages, prompted, trees
from cleaning.sources.eras import (
    ERAS,
    SAMPLE_BYTES,
    SAMPLE_RECORDS,
    UNDECIDED,
    Era,
    decide,
    looks_like_html,
    mark_html,
    settle,
    survey,
)  # fmt: skip
from cleaning.sources.rejected import is_row, unwrap
from cleaning.sources.turns import RawConversation, Rejection, Turn, as_list, first, id_in, keys_of, shown
from fastft.common.records import Record

__all__ = [
    "ERAS", "FORMATS", "Era", "RawConversation", "Reading", "Rejection", "Turn", "as_shared", "conversations_in", "id_in",
    "looks_like_html", "mark_html", "read_conversation", "recognise", "survey_dump",
]  # fmt: skip


@dataclass(frozen=True)
class Format:
    read: Callable[[Any, bool], list[RawConversation]]  # (record, every branch of a tree)
    description: str  # for --help
    of_sharegpt: bool = False  # its values passed through sharegpt.com: answers may be HTML, eras matter


def _one(read: Callable[[dict], RawConversation]) -> Callable[[Any, bool], list[RawConversation]]:
    return lambda record, every_branch: [read(record)]


FORMATS: dict[str, Format] = {
    "sharegpt": Format(_one(lists.read_sharegpt), "ShareGPT: conversations or items of from/value", True),
    "sharegpt_page": Format(_one(pages.read_sharegpt_page), "a page of sharegpt.com saved as HTML", True),
    "messages": Format(_one(lists.read_messages), "OpenAI style: messages of role/content"),
    "chatgpt_page": Format(pages.read_chatgpt_page, "a ChatGPT page saved from the browser"),
    "chatgpt_export": Format(trees.read_chatgpt_export, "the official ChatGPT data export"),
    "claude_export": Format(_one(lists.read_claude_export), "the official Claude data export"),
    "chat_log": Format(_one(lists.read_chat_log), "WildChat, LMSYS-Chat-1M: conversation of role/content"),
    "oasst": Format(trees.read_oasst, "OpenAssistant message trees"),
    "pairs": Format(_one(lists.read_pairs), "conversation of human/assistant rounds"),
    "marked_text": Format(_one(lists.read_marked_text), "text with <|user|>: and <|bot|>: before each turn"),
    "alpaca": Format(_one(lists.read_alpaca), "instruction, input, output"),
    "completion": Format(_one(prompted.read_completion), "prompt and completion, question and answer"),
    "preference": Format(_one(prompted.read_preference), "chosen and rejected answers, of which the chosen is learned"),
}


@dataclass(frozen=True)
class Reading:
    """How the records of one dump are read. `format` None: each record is recognised by its shape."""

    format: str | None = None
    every_branch: bool = False  # of a tree; otherwise the one that was shown last or ranked best
    era: Era = UNDECIDED


def conversations_in(record: Any, reading: Reading | None = None) -> list[RawConversation]:
    """At least one conversation. Raises Rejection (`not_a_conversation`, `unknown_role`) for a record that has none."""
    reading = reading or Reading()
    conversations = as_shared(record, reading)
    for conversation in conversations:
        if FORMATS[conversation.format].of_sharegpt:
            settle(conversation, reading.era)
        conversation.notes = +conversation.notes  # without the zeros
    if len(conversations) > 1:
        shown_first = "\0".join([conversations[0].id, *(turn.text for turn in conversations[0].turns)])
        tree = hashlib.blake2b(shown_first.encode(), digest_size=8).digest()
        for conversation in conversations:
            conversation.tree = tree
    return conversations


def read_conversation(record: Any) -> RawConversation:
    """The first conversation of a record."""
    return conversations_in(record)[0]


def survey_dump(records: Iterable[Record], reading: Reading, era: str = "auto") -> Era:
    """Decide the eras of a dump from its first records."""
    return decide(survey(_sample(records, reading)), era)


def _sample(records: Iterable[Record], reading: Reading) -> Iterator[RawConversation]:
    seen = 0
    for number, record in enumerate(records):
        if number >= SAMPLE_RECORDS or record.end > SAMPLE_BYTES or (number >= 100 and not seen):
            return
        try:
            found = as_shared(record.value, reading) if record.error is None else []
        except (Rejection, RecursionError):
            continue
        for conversation in found:
            if FORMATS[conversation.format].of_sharegpt:
                seen += 1
                yield conversation


def as_shared(record: Any, reading: Reading) -> list[RawConversation]:
    """As `conversations_in`, but nothing is decided yet about what sharegpt.com did to the text."""
    row = unwrap(record) if is_row(record) else None
    record = row.record if row else record
    named = None if row and row.written_here else reading.format
    name = named or recognise(record)
    if not isinstance(record, str if name.endswith("_page") else dict):
        raise Rejection("not_a_conversation", f"expected an object, found {shown(record)}")
    conversations = FORMATS[name].read(record, reading.every_branch)
    for number, conversation in enumerate(conversations, start=1):
        conversation.format = name
        if row:
            conversation.id = conversation.id or (row.id if number == 1 else f"{row.id}-{number}")
            conversation.notes["single rounds of rejected conversations"] += row.single_round
    return conversations


def recognise(record: Any) -> str:
    """The name of a record's format. Raises Rejection for a shape that no format has."""
    if isinstance(record, str) and record.lstrip("\ufeff \t\r\n")[:1] == "<":
        return "sharegpt_page" if pages.is_sharegpt_page(record) else "chatgpt_page"
    if not isinstance(record, dict):
        raise Rejection("not_a_conversation", f"expected an object, found {shown(record)}")
    if isinstance(record.get("mapping"), dict):
        return "chatgpt_export"
    if record.get("chat_messages") is not None:
        return "claude_export"
    if prompted.is_preference(record):  # before its prompt is taken for the whole
        return "preference"
    if record.get("messages") is not None:
        return "messages"
    if first(record, "conversations", "items") is not None:
        return "sharegpt"
    if isinstance(record.get("prompt"), dict) or (record.get("replies") is not None and "role" in record):
        return "oasst"
    if record.get("conversation") is not None:
        turns = as_list(record["conversation"], "turns")
        is_pair = turns and isinstance(turns[0], dict) and not {"role", "from", "content", "value"} & set(turns[0])
        return "pairs" if is_pair else "chat_log"
    if record.get("instruction") is not None and first(record, "output", "response") is not None:
        return "alpaca"
    if isinstance(record.get("text"), str) and re.match(r"\s*<\|\w+\|>:", record["text"]):
        return "marked_text"
    if prompted.is_completion(record):
        return "completion"
    if record.get("message_tree_id") is not None:
        raise Rejection("not_a_conversation", "one message of a tree: take OpenAssistant's *.trees.jsonl.gz instead")
    raise Rejection("not_a_conversation", f"no format has this shape (--format names one); keys: {keys_of(record)}")
