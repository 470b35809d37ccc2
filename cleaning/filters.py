"""What makes a conversation unfit to learn from, one small function per reason; and the repairs that come first.

A filter looks at one conversation and returns the detail of its complaint, or None. FILTERS is the list of them: its
names are the reasons in report.json and rejected.jsonl, its order is the order of judgement, and the first complaint
decides. To add one, write the function and list it. A repair changes the turns and says how many it changed; REPAIRS
lists them, and the report counts what each did.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastft.conversation import Conversation, Message


@dataclass(frozen=True)
class Settings:
    """What the user chose, for all filters."""

    blocked_phrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Filter:
    name: str
    complaint: Callable[[Conversation, Settings], str | None]
    description: str
    before_repairs: bool = False  # looks at the turns as they were shared


@dataclass(frozen=True)
class Repair:
    name: str
    apply: Callable[[list[Message]], int]  # turns changed
    description: str


def judge(conversation: Conversation, settings: Settings, before_repairs: bool) -> tuple[str, str] | None:
    """(reason, detail) of the first complaint among the filters of that stage, or None."""
    for each in FILTERS:
        if each.before_repairs == before_repairs:
            detail = each.complaint(conversation, settings)
            if detail is not None:
                return each.name, detail
    return None


def repair(conversation: Conversation) -> dict[str, int]:
    """Apply all repairs in their order; return how many turns each changed, without the zeros."""
    changed = {each.name: each.apply(conversation.messages) for each in REPAIRS}
    return {name: count for name, count in changed.items() if count}


# What the page showed instead of an answer, and the extension that shared pages saved as one. Whole turns only: an
# answer may well speak of such messages.
_BUSY = re.compile(r"!?Too many requests in 1 hour\. Try again later\.")
_BANNERS = (
    re.compile(r"!?Too many requests, please slow down\.?"),
    re.compile(r"Our systems are a bit busy at the moment, please take a break and try again soon\."),
    re.compile(
        r"Only one message at a time\. Please allow any other responses to complete before sending another message.*"
    ),
    re.compile(r"network error\.?", re.IGNORECASE),
    re.compile(r"Something went wrong\.?"),
    re.compile(r"Something went wrong, please try reloading the conversation\."),
    re.compile(r"(?:Something went wrong|An error occurred)\. .*\bhelp\.openai\.com\.?"),
    re.compile(r"There was an error generating a response\.?"),
    re.compile(r"The server had an error while processing your request\. Sorry about that!"),
)


def error_banner(conversation: Conversation, settings: Settings) -> str | None:
    for number, message in enumerate(conversation.messages, start=1):
        text = message.content.strip()
        # The page put its "too many requests" in the place of either turn; the others are things a user may say.
        banners = (_BUSY, *_BANNERS) if message.role == "assistant" else (_BUSY,)
        if len(text) < 400 and any(banner.fullmatch(text) for banner in banners):
            return f"turn {number} is {text!r}"
    return None


def too_short(conversation: Conversation, settings: Settings) -> str | None:
    roles = [message.role for message in conversation.messages]
    if "assistant" not in roles:
        return "has no answer" if roles else "has no turns"
    if "user" not in roles:
        return "has no question"
    return None


def wrong_role_order(conversation: Conversation, settings: Settings) -> str | None:
    """After an optional system message: user, assistant, user, assistant, …"""
    messages = conversation.messages
    start = 1 if messages and messages[0].role == "system" else 0
    for number, message in enumerate(messages[start:]):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            return f"turn {start + number + 1} is from {message.role}, expected {expected}"
    return None


def empty_turn(conversation: Conversation, settings: Settings) -> str | None:
    return _empty(conversation, "user")


def empty_answer(conversation: Conversation, settings: Settings) -> str | None:
    return _empty(conversation, "assistant")


def _empty(conversation: Conversation, role: str) -> str | None:
    for number, message in enumerate(conversation.messages, start=1):
        if message.role == role and not _visible(message.content):
            return f"turn {number} ({role}) is empty"
    return None


def _visible(text: str) -> bool:
    """False for white space and invisible format characters alone (the zero-width space of an answer not begun)."""
    return any(not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf") for c in text)


def blocked_phrase(conversation: Conversation, settings: Settings) -> str | None:
    if not settings.blocked_phrases:
        return None
    for number, message in enumerate(conversation.messages, start=1):
        folded = message.content.casefold()
        for phrase in settings.blocked_phrases:
            # `in` runs at 12 MB/s for 200 phrases, an alternation of them at 0.6.
            if phrase.casefold() in folded and _as_words(phrase).search(folded):
                return f"turn {number} holds {phrase!r}"
    return None


def _as_words(phrase: str) -> re.Pattern:
    """`phrase` between word boundaries; scripts that write no spaces (wide characters) have none."""
    phrase = phrase.casefold()
    before = r"(?<!\w)" if _is_narrow_word(phrase[0]) else ""
    after = r"(?!\w)" if _is_narrow_word(phrase[-1]) else ""
    return re.compile(before + re.escape(phrase) + after)


def _is_narrow_word(character: str) -> bool:
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"


FILTERS: Sequence[Filter] = (
    Filter("error_banner", error_banner, "an error message of the page stands for a turn", before_repairs=True),
    Filter("too_short", too_short, "no question or no answer"),
    Filter("wrong_role_order", wrong_role_order, "user and assistant do not take turns, beginning with the user"),
    Filter("empty_turn", empty_turn, "a question without visible text"),
    Filter("empty_answer", empty_answer, "an answer without visible text"),
    Filter("blocked_phrase", blocked_phrase, "a phrase from --blocked_phrases, at word boundaries, in any turn"),
)


def drop_leading_assistant(messages: list[Message]) -> int:
    """An answer to a question that is not there teaches nothing."""
    start = 1 if messages and messages[0].role == "system" else 0
    stop = start
    while stop < len(messages) and messages[stop].role == "assistant":
        stop += 1
    del messages[start:stop]
    return stop - start


def merge_assistant_turns(messages: list[Message]) -> int:
    """Answers in a row become one, a blank line between them: the page saved continued answers so."""
    merged: list[Message] = []
    for message in messages:
        if message.role == "assistant" and merged and merged[-1].role == "assistant":
            merged[-1].content = "\n\n".join(text for text in (merged[-1].content, message.content) if text)
        else:
            merged.append(message)
    count = len(messages) - len(merged)
    messages[:] = merged
    return count


def trim_last_question(messages: list[Message]) -> int:
    """A last question that was never answered; not the only one, which is a conversation without an answer."""
    dangling = len(messages) > 2 and messages[-1].role == "user" and messages[-2].role == "assistant"
    if dangling:
        messages.pop()
    return int(dangling)


REPAIRS: Sequence[Repair] = (
    Repair("dropped_leading_assistant", drop_leading_assistant, "answers before the first question are dropped"),
    Repair("merged_assistant_turns", merge_assistant_turns, "answers in a row become one"),
    Repair("trimmed_last_question", trim_last_question, "a last question without an answer is dropped"),
)
