"""Apply the chosen filters and repairs to a conversation, in the order of the table: what is changed, dropped or rejected.

verdict = apply_steps(conversation, settings)    # repairs `conversation` in place
verdict.reason                                   # the filter that rejects it, or "" if it is kept
"""

import collections
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cleaning.filters import structure
from cleaning.filters.base import Repair, TurnFilter
from cleaning.filters.chosen import chosen_steps
from cleaning.settings import FilterSettings
from fastft.data.continue_requests import is_continue
from fastft.data.conversation import Conversation, Message, rounds_of
from fastft.data.language import detect_language


@dataclass(slots=True)
class DroppedRound:
    """A round that is rejected while the rest of its conversation is kept."""

    number: int  # among the rounds as shared, from 1
    reason: str
    detail: str
    messages: list[Message]


@dataclass(slots=True)
class Verdict:
    """What the steps decided about a conversation."""

    reason: str = ""  # the filter that rejects it; "" if it is kept
    detail: str = ""
    repairs: collections.Counter = field(default_factory=collections.Counter)  # turns changed, rounds dropped, by name
    dropped: list[DroppedRound] = field(default_factory=list)


def apply_steps(
    conversation: Conversation, settings: FilterSettings, said: Mapping[str, str] = MappingProxyType({})
) -> Verdict:
    """Repair `conversation` in place, drop rounds, and decide whether it is kept. This also sets its `lang`.

    `said` holds complaints that the reader has found in the record already, as {name of the filter: complaint}
    (`RawConversation.sessions`). They count as complaints of that filter.
    """
    verdict = Verdict()
    # A complaint gives the number that a turn has in the dump, whatever was dropped before it. Turns are known by their
    # id(), which is unique because this list keeps every one of them alive.
    as_shared = list(conversation.messages)
    numbers = {id(message): number for number, message in enumerate(as_shared, start=1)}
    for step in chosen_steps(settings):
        detail = None
        if step.name == "other_language":
            # What the dump says about the language has priority.
            conversation.lang = conversation.lang or detect_language(conversation)
        if isinstance(step, Repair):
            verdict.repairs[step.name] += step.apply(conversation.messages, settings)
        elif isinstance(step, TurnFilter):
            detail = _drop_rounds(conversation, step, settings, numbers, verdict)
        else:
            detail = said.get(step.name) or step.complaint(conversation, settings)
        if detail is not None:
            verdict.reason, verdict.detail = step.name, detail
            break
    questions = [id(message) for message in as_shared if message.role == "user"]
    for dropped in verdict.dropped:
        dropped.number = questions.index(id(dropped.messages[0])) + 1
    verdict.repairs = +verdict.repairs  # without the zeros
    return verdict


def _drop_rounds(
    conversation: Conversation, step: TurnFilter, settings: FilterSettings, numbers: dict[int, int], verdict: Verdict
) -> str | None:
    """Drop the rounds with a turn that `step` complains about. Returns the complaint if no round would be left."""
    # This check is the fastest, and nearly always there is no complaint.
    if not any(map(step.complaint, conversation.messages, itertools.repeat(settings))):
        return None
    before, rounds = rounds_of(conversation.messages)
    details: dict[int, str] = {}  # position of a round that is dropped -> the complaint
    for position, messages in enumerate(rounds[:1] if step.first_only else rounds):
        for message in messages:
            complaint = step.complaint(message, settings)
            if complaint is not None and not (step.asked_for and step.asked_for(_question(rounds, position))):
                details.setdefault(position, f"turn {numbers[id(message)]} {complaint}")
                # A banner in the place of a question ("Too many requests") is what the page gave as the answer to the
                # question before it. That question is a round of its own, without an answer, and is dropped too.
                if message is messages[0] and position and len(rounds[position - 1]) == 1:
                    details.setdefault(position - 1, details[position])
    if not details:
        return None
    # A `continue` means nothing without the round before it.
    for position in range(1, len(rounds)):
        if position - 1 in details and structure.leans_on_the_answer_before(rounds[position][0].content):
            details.setdefault(position, details[position - 1])
    if len(details) == len(rounds):
        return details[min(details)]
    for position, detail in sorted(details.items()):
        verdict.dropped.append(DroppedRound(0, step.name, detail, rounds[position]))
    verdict.repairs[f"dropped_rounds:{step.name}"] += len(details)
    kept = [messages for position, messages in enumerate(rounds) if position not in details]
    conversation.messages[:] = before + [message for messages in kept for message in messages]
    return None


def _question(rounds: list[list[Message]], position: int) -> str:
    """Return the question that a round answers. If it only says `continue`, this is the last real question before it."""
    questions = [messages[0].content for messages in rounds[: position + 1]]
    return next((text for text in reversed(questions) if not is_continue(text)), questions[0])
