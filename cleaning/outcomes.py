"""The first pass's work on records, done in worker processes: parse, convert, repair, filter, fingerprint.

A record becomes one or several outcomes: a conversation, or a rejection with its reason. `convert_shard` does so for a
shard of a dump, its records as they stand in the file, and returns the outcomes as bytes (`pack`): they go through a pipe
and into a file unopened, and no object of Python is ever loaded from there.
"""

from dataclasses import dataclass, field

import orjson

from cleaning.contamination import Hit, load_benchmarks
from cleaning.duplicates import NEAR, Fingerprint, fingerprint
from cleaning.filters import Settings, apply_steps
from cleaning.markdown import html_to_markdown
from cleaning.sources import RawConversation, Reading, Rejection, conversations_in, id_in, looks_like_html
from fastft.conversation import Conversation, Message, parse_conversation
from fastft.records import RawRecord, parsed, to_json


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
class Shard:
    """Records that stand together in an input, on their way to a worker."""

    source: int  # position among the inputs
    file: str  # its name
    first: int  # how many records of the input stand before
    records: list[RawRecord]


@dataclass(slots=True)
class Outcome:
    """A record after the first pass: rejected with a reason, or a conversation."""

    id: str
    where: str
    source: int = 0  # position among the inputs
    record: bytes = b""  # as it was read, JSON in one line; of a tree, this branch as `messages`
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


def convert_shard(conversion: Conversion, shard: Shard) -> bytes:
    outcomes = [
        outcome
        for number, record in enumerate(shard.records, start=shard.first)
        for outcome in outcomes_of(record, f"{shard.file}-{number}", shard, conversion)
    ]
    if conversion.settings.moderation:
        _moderate([outcome for outcome in outcomes if not outcome.reason], conversion.settings)
    return pack(outcomes)


def _moderate(outcomes: list[Outcome], settings: Settings) -> None:
    from cleaning.filters.moderation import flagged  # sqlite and an HTTP client, for those who ask for it

    conversations = [parse_conversation(orjson.loads(outcome.conversation)) for outcome in outcomes]
    for outcome, complaint in zip(outcomes, flagged(conversations, settings)):
        if complaint is not None:
            outcome.reason, outcome.detail = "moderation", complaint
            outcome.conversation, outcome.fingerprint, outcome.dropped = b"", None, []


def outcomes_of(record: RawRecord, fallback_id: str, shard: Shard, conversion: Conversion) -> list[Outcome]:
    """The outcomes of one record, at least one. Whatever the record holds, this does not raise."""
    read = parsed(record)
    line = b"null"
    try:
        line = to_json(read.value if read.error is None else read.raw)
        if read.error is not None:
            raise Rejection("broken_record", read.error)
        found = conversations_in(read.value, conversion.readings[shard.source])
    except Rejection as rejection:
        id = id_in(read.value) or fallback_id
        outcomes = [Outcome(id, record.where, reason=rejection.reason, detail=rejection.detail)]
    except RecursionError:
        id = id_in(read.value) or fallback_id
        outcomes = [Outcome(id, record.where, reason="broken_record", detail="nested too deeply")]
    else:
        outcomes = [
            _convert(raw, shard.file, fallback_id, record.where, number, conversion)
            for number, raw in enumerate(found, start=1)
        ]
    for position, outcome in enumerate(outcomes):
        outcome.source = shard.source
        # The whole tree with every branch would be quadratic in its size.
        outcome.record = _as_messages(found[position]) if len(outcomes) > 1 else line
    return outcomes


def _as_messages(raw: RawConversation) -> bytes:
    messages = [{"role": turn.role, "content": turn.text} for turn in raw.turns]
    return orjson.dumps({"id": raw.id, "model": raw.model, "lang": raw.lang, "messages": messages})


def _convert(
    raw: RawConversation, file: str, fallback_id: str, where: str, branch: int, conversion: Conversion
) -> Outcome:
    """Whatever the conversation holds, this does not raise; a faulty filter of the user's does."""
    if branch > 1:
        fallback_id, where = f"{fallback_id}-{branch}", f"{where}, branch {branch}"
    id = raw.id or fallback_id
    outcome = Outcome(id, where, format=raw.format, notes=dict(raw.notes))
    try:
        conversation = to_conversation(raw, id, file)
        verdict = apply_steps(conversation, conversion.settings, raw.sessions)
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


def to_conversation(raw: RawConversation, id: str, source: str) -> Conversation:
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


# --- as bytes ---------------------------------------------------------------------------------------------------------


def pack(outcomes: list[Outcome]) -> bytes:
    """The length of a JSON list, the list (a row an outcome, its texts by their lengths), and the texts."""
    rows, texts = [], []
    for each in outcomes:
        mark = each.fingerprint
        own = [
            each.record,
            each.conversation,
            *((mark.beginnings, mark.sketch, mark.tree) if mark else ()),
            *(d[3] for d in each.dropped),
        ]
        fields = [each.id, each.where, each.source, each.reason, each.detail, each.hits, each.repairs, each.answers,
                  each.html_answers, each.unmarked_html, each.format, each.notes]  # fmt: skip
        rows.append([fields, mark and [mark.length, mark.time], [d[:3] for d in each.dropped], [len(t) for t in own]])
        texts += own
    head = orjson.dumps(rows)
    return b"".join([len(head).to_bytes(8, "little"), head, *texts])


def unpack(data: bytes) -> list[Outcome]:
    """What was packed. Raises nothing for what `pack` made; never runs anything."""
    size = int.from_bytes(data[:8], "little")
    at, outcomes = 8 + size, []
    for fields, mark, dropped, sizes in orjson.loads(data[8:at]):
        texts = []
        for length in sizes:
            texts.append(data[at : at + length])
            at += length
        id, where, source, reason, detail, hits, repairs, answers, html_answers, unmarked_html, format, notes = fields
        outcome = Outcome(id, where, source, texts[0], reason, detail, texts[1], repairs=repairs, answers=answers,
                          html_answers=html_answers, unmarked_html=unmarked_html, format=format, notes=notes)  # fmt: skip
        outcome.hits = [Hit(**hit) for hit in hits]
        if mark:
            outcome.fingerprint = Fingerprint(texts[2], mark[0], texts[3], mark[1], texts[4])
        dropped_texts = texts[5:] if mark else texts[2:]
        outcome.dropped = [(*each, text) for each, text in zip(dropped, dropped_texts)]
        outcomes.append(outcome)
    return outcomes
