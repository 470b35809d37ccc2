"""Read a record of a dump as the conversations in it, as they were shared: the table of formats, and how each is recognised.

    conversations_in(record)                      every conversation of a record, its format recognised by its shape
    conversations_in(record, Reading(format="oasst", every_branch=True))

`FORMATS` is the table. To read another format, write its reader and list it there; `recognise` finds it by a record's keys.

In ShareGPT's format, `value` is the page's HTML in an assistant turn and plain text in a human turn. Text is therefore
converted by role, and a human turn never goes through an HTML parser, which would remove the `<int>` of `vector<int>`. Not
every dump in this format still holds HTML: many hold markdown, and an answer may itself be a piece of HTML that was asked
for. `cleaning.sources.eras` says how these are told apart and what sharegpt.com did to human turns; in doubt the text stays
as it is. All other formats hold text, except for pages saved from the browser. A row of the cleaner's own rejected.jsonl is
read as the record in it (`cleaning.sources.rejected`).
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cleaning.sources import lists, pages, prompted, trees
from cleaning.sources.eras import SAMPLE_BYTES, SAMPLE_RECORDS, UNDECIDED, EraDecision, apply_era, decide, survey
from cleaning.sources.rejected import is_row, unwrap
from cleaning.sources.turns import RawConversation, Rejection, as_list, first_of, keys_of, shown
from fastft.common.records import Record


@dataclass(frozen=True)
class Format:
    """A format of dumps and its reader."""

    read: Callable[[Any, bool], list[RawConversation]]
    """Takes the record, and whether to read every branch of a tree."""
    description: str
    """For --help."""
    of_sharegpt: bool = False
    """Whether the texts passed through sharegpt.com: then answers may be HTML, and eras matter."""


def _one(read: Callable[[dict], RawConversation]) -> Callable[[Any, bool], list[RawConversation]]:
    """Make a `Format.read` of a reader for records that hold one conversation."""
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
    """How the records of one dump are read."""

    format: str | None = None  # None: the format of each record is recognised by its shape
    every_branch: bool = False  # whether a tree gives all branches, or only the one that was shown last or ranked best
    era: EraDecision = UNDECIDED


def conversations_in(record: Any, reading: Reading | None = None) -> list[RawConversation]:
    """Return the conversations of a record, at least one.

    Raises Rejection (`not_a_conversation`, `unknown_role`, `unclear_loss_flag`, `broken_record`) for a record without any.
    """
    reading = reading or Reading()
    conversations = as_shared(record, reading)
    for conversation in conversations:
        if FORMATS[conversation.format].of_sharegpt:
            apply_era(conversation, reading.era)
        conversation.notes = +conversation.notes  # drops the zeros
    if len(conversations) > 1:
        shown_first = "\0".join([conversations[0].id, *(turn.text for turn in conversations[0].turns)])
        tree = hashlib.blake2b(shown_first.encode(), digest_size=8).digest()
        for conversation in conversations:
            conversation.tree = tree
    return conversations


def survey_dump(records: Iterable[Record], reading: Reading, era: str = "auto") -> EraDecision:
    """Decide the eras of a dump from its first records."""
    return decide(survey(_sample(records, reading)), era)


def _sample(records: Iterable[Record], reading: Reading) -> Iterator[RawConversation]:
    """Yield the conversations of ShareGPT's formats among the first records; give up after 100 records without any."""
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
    """Return the conversations of a record as `conversations_in` does, but without undoing what sharegpt.com did to them."""
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
    """Return the name of a record's format. Raises Rejection for a shape that no format has."""
    if isinstance(record, str) and record.lstrip("\ufeff \t\r\n")[:1] == "<":
        return "sharegpt_page" if pages.is_sharegpt_page(record) else "chatgpt_page"
    if not isinstance(record, dict):
        raise Rejection("not_a_conversation", f"expected an object, found {shown(record)}")
    if isinstance(record.get("mapping"), dict):
        return "chatgpt_export"
    if record.get("chat_messages") is not None:
        return "claude_export"
    if prompted.is_preference(record):  # tested first, because such a record may also have `messages`
        return "preference"
    if record.get("messages") is not None:
        return "messages"
    if first_of(record, "conversations", "items") is not None:
        return "sharegpt"
    if isinstance(record.get("prompt"), dict) or (record.get("replies") is not None and "role" in record):
        return "oasst"
    if record.get("conversation") is not None:
        turns = as_list(record["conversation"], "turns")
        is_pair = turns and isinstance(turns[0], dict) and not {"role", "from", "content", "value"} & set(turns[0])
        return "pairs" if is_pair else "chat_log"
    if record.get("instruction") is not None and first_of(record, "output", "response") is not None:
        return "alpaca"
    if isinstance(record.get("text"), str) and re.match(r"\s*<\|\w+\|>:", record["text"]):
        return "marked_text"
    if prompted.is_completion(record):
        return "completion"
    if record.get("message_tree_id") is not None:
        raise Rejection("not_a_conversation", "one message of a tree: take OpenAssistant's *.trees.jsonl.gz instead")
    raise Rejection("not_a_conversation", f"no format has this shape (--format names one); keys: {keys_of(record)}")
