"""The first pass's work on records, done in worker processes: convert, repair, filter, fingerprint.

A record becomes one or several outcomes: a conversation, or a rejection with its reason.
"""

from dataclasses import dataclass, field

import orjson

from cleaning.contamination import Hit, load_benchmarks
from cleaning.duplicates import NEAR, Fingerprint, fingerprint
from cleaning.filters import Settings, apply_steps
from cleaning.markdown import html_to_markdown
from cleaning.sources import RawConversation, Reading, Rejection, conversations_in, looks_like_html
from fastft.conversation import Conversation, Message, parse_conversation
from fastft.records import parse_json


@dataclass(frozen=True)
class Choices:
    """What the user chose beside the filters; see `clean`."""

    max_tokens: int | None = None
    model: str | None = None
    template: str | None = None
    overlap_rounds: int = 0
    overlong: str = "cut"
    near: float = NEAR
    keep: str = "longest"
    against: tuple[str, ...] = ()
    contaminated: str = "reject"
    holdout: float = 0.0
    seed: int = 0


@dataclass(slots=True)
class Item:
    """A record on its way to a worker."""

    where: str
    source: int  # position among the inputs
    file: str
    fallback_id: str
    record: bytes  # JSON
    error: str | None


@dataclass(slots=True)
class Outcome:
    """A record after the first pass: rejected with a reason, or a conversation."""

    id: str
    where: str
    record: bytes = b""  # as it was read (a worker does not send it back); of a tree, this branch as `messages`
    reason: str = ""
    detail: str = ""
    conversation: bytes = b""
    fingerprint: Fingerprint | None = None
    hits: list[Hit] = field(default_factory=list)
    held_out: bool = False
    repairs: dict[str, int] = field(default_factory=dict)
    dropped: list[tuple[int, str, str, bytes]] = field(
        default_factory=list
    )  # (round, reason, detail, messages as JSON)
    answers: int = 0
    html_answers: int = 0
    unmarked_html: int = 0  # answers left as they are that look like HTML
    format: str = ""
    notes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """What a worker needs to know to turn records into outcomes."""

    settings: Settings
    readings: list[Reading]
    choices: Choices


def convert_batch(conversion: Conversion, batch: list[Item]) -> list[list[Outcome]]:
    outcomes = [_outcomes_of(item, conversion) for item in batch]
    if conversion.settings.moderation:
        _moderate([outcome for each in outcomes for outcome in each if not outcome.reason], conversion.settings)
    return outcomes


def _moderate(outcomes: list[Outcome], settings: Settings) -> None:
    from cleaning.filters.moderation import flagged  # sqlite and an HTTP client, for those who ask for it

    conversations = [parse_conversation(orjson.loads(outcome.conversation)) for outcome in outcomes]
    for outcome, complaint in zip(outcomes, flagged(conversations, settings)):
        if complaint is not None:
            outcome.reason, outcome.detail = "moderation", complaint
            outcome.conversation, outcome.fingerprint, outcome.dropped = b"", None, []


def _outcomes_of(item: Item, conversion: Conversion) -> list[Outcome]:
    """The outcomes of one record, at least one. Whatever the record holds, this does not raise."""
    try:
        if item.error is not None:
            raise Rejection("broken_record", item.error)
        found = conversations_in(parse_json(item.record), conversion.readings[item.source])
    except Rejection as rejection:
        return [Outcome(item.fallback_id, item.where, reason=rejection.reason, detail=rejection.detail)]
    except RecursionError:
        return [Outcome(item.fallback_id, item.where, reason="broken_record", detail="nested too deeply")]
    outcomes = []
    for number, raw in enumerate(found, start=1):
        id, where = item.fallback_id, item.where
        if number > 1:
            id, where = f"{id}-{number}", f"{where}, branch {number}"
        outcomes.append(_convert(raw, item.file, raw.id or id, where, conversion))
        if len(found) > 1:  # the whole tree with every branch would be quadratic in its size
            outcomes[-1].record = _as_messages(raw)
    return outcomes


def _as_messages(raw: RawConversation) -> bytes:
    messages = [{"role": turn.role, "content": turn.text} for turn in raw.turns]
    return orjson.dumps({"id": raw.id, "model": raw.model, "lang": raw.lang, "messages": messages})


def _convert(raw: RawConversation, file: str, id: str, where: str, conversion: Conversion) -> Outcome:
    """Whatever the conversation holds, this does not raise; a faulty filter of the user's does."""
    outcome = Outcome(id, where, format=raw.format, notes=dict(raw.notes))
    try:
        conversation = _to_conversation(raw, id, file)
        verdict = apply_steps(conversation, conversion.settings)
        if verdict.reason:
            raise Rejection(verdict.reason, verdict.detail)
        against = conversion.choices.against
        outcome.hits = load_benchmarks(against).hits(conversation) if against else []
        if outcome.hits and conversion.choices.contaminated == "reject":
            raise Rejection("contaminated", _about_hit(outcome.hits))
    except Rejection as rejection:
        outcome.reason, outcome.detail = rejection.reason, rejection.detail
        return outcome
    except RecursionError:
        outcome.reason, outcome.detail = "broken_record", "nested too deeply"
        return outcome
    outcome.repairs = dict(verdict.repairs)
    outcome.dropped = [(d.number, d.reason, d.detail, messages_json(d.messages)) for d in verdict.dropped]
    outcome.conversation = conversation.to_json()
    sketched = conversion.choices.near > 0 or conversion.choices.holdout > 0
    outcome.fingerprint = fingerprint(conversation, sketched, time=raw.time, tree=raw.tree)
    answers = [turn for turn in raw.turns if turn.role == "assistant"]
    outcome.answers, outcome.html_answers = len(answers), sum(turn.html for turn in answers)
    outcome.unmarked_html = sum(not turn.html and looks_like_html(turn.text) for turn in answers)
    return outcome


def _about_hit(hits: list[Hit]) -> str:
    first, more = hits[0], f" and {len(hits) - 1} more" if len(hits) > 1 else ""
    return f"turn {first.turn} ({first.role}) holds {first.rule} of {first.benchmark} {first.item}{more}: {first.excerpt!r}"


def _to_conversation(raw: RawConversation, id: str, source: str) -> Conversation:
    messages = []
    for number, turn in enumerate(raw.turns, start=1):
        try:
            text = html_to_markdown(turn.text) if turn.html else turn.text
        except ValueError as error:
            raise Rejection("unreadable_html", f"turn {number}: {error}") from None
        messages.append(Message(turn.role, text, train=turn.role == "assistant"))
    return Conversation(id, messages, source=source, lang=raw.lang, model=raw.model)


def messages_json(messages: list[Message]) -> bytes:
    return orjson.dumps({"messages": [{"role": m.role, "content": m.content} for m in messages]})
