"""The first pass: parse, convert, repair, filter and fingerprint every record, in worker processes.

A record becomes one or several outcomes: each is a conversation, or a rejection with its reason. `first_pass` cuts the
inputs into shards, has workers make outcomes of them (`convert_shard`) and logs these in order. Outcomes are sent between
processes and stored in the log as bytes (`pack`), which this process parses only when needed.
"""

import collections
from array import array
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from cleaning.filters.apply import apply_steps
from cleaning.html.markdown import UnreadableHtml, html_to_markdown
from cleaning.report.ledger import Report
from cleaning.run.workdir import Log
from cleaning.run.workers import Bar
from cleaning.settings import FilterSettings, RunSettings
from cleaning.sources.eras import looks_like_html
from cleaning.sources.formats import Reading, conversations_in
from cleaning.sources.inputs import Input
from cleaning.sources.turns import RawConversation, Rejection, Turn, id_in
from fastft.common.records import RawRecord, parsed, to_json
from fastft.common.workers import Pool, ordered_map
from fastft.data.conversation import Conversation, Message, parse_conversation
from fastft.data.dedup.contamination import Account, Hit, load_benchmarks
from fastft.data.dedup.duplicates import Fingerprint, Fingerprints, fingerprint

# A worker gets one shard at a time, and that is the most that an interruption can lose for each worker. 1 MiB is about
# 0.2 s of work.
SHARD_BYTES = 1 << 20
SHARD_RECORDS = 1024
MAX_NOTES = 50  # kinds of notes in the report; a dump can make up kinds of its own ("dropped tool NAME")
MAX_WARNINGS = 20  # broken records that the report's warnings mention; rejected.jsonl holds all of them


def first_pass(
    sources: list[Input],
    conversion: "Conversion",
    work: Path,
    report: Report,
    pool: Pool | None,
    loading: Future | None,
    bar: Bar,
) -> "Found":
    """Log the outcomes of every shard in `work`, sum them up in `report`, and return what the search for duplicates needs.

    Shards that an interrupted run has logged are not converted again. `loading` is what a worker loads first: see
    `ordered_map`.
    """
    found, remarks = Found(report, conversion.run_settings), []
    shards = _shards(sources, report, remarks, bar)
    with Log(work / "outcomes") as log:
        for frame in log.recover():
            bar.advance(0, found.add(unpack(frame)))
            next(shards, None)  # skips the records of that shard by reading them again, at 100 MB/s
        for frame in ordered_map(partial(convert_shard, conversion), shards, pool, loading):
            log.append(frame)
            bar.advance(0, found.add(unpack(frame)))
    found.finish(remarks)
    return found


class Found:
    """Collects from all outcomes what the search for duplicates needs (370 bytes a conversation) and sums for the report."""

    def __init__(self, report: Report, run_settings: RunSettings):
        self.report = report
        self.ids: list[str] = []
        self.parts = array("q")  # number of the part, where the input is the cleaner's own output; parts share an id
        self.fingerprints = Fingerprints()
        self.account = (
            Account(load_benchmarks(tuple(run_settings.against)).benchmarks) if run_settings.against else None
        )
        self.unmarked_html = 0
        self.formats, self.notes = collections.Counter(), collections.Counter()

    def add(self, outcomes: list["Outcome"]) -> int:
        """Count the outcomes of a shard and return their number."""
        report = self.report
        report.input += len(outcomes)
        for outcome in outcomes:
            report.files[outcome.source]["input"] += 1
            if outcome.reason == "broken_record" and len(report.warnings) < MAX_WARNINGS:
                report.warnings.append(f"{outcome.where}: {outcome.detail}")
            if outcome.hits:
                self.account.add(outcome.id, outcome.hits)
            self.unmarked_html += outcome.unmarked_html
            self.formats[outcome.format] += bool(outcome.format)
            self.notes.update(outcome.notes)
            if outcome.fingerprint is not None:
                self.ids.append(outcome.id)
                self.parts.append(outcome.part)
                self.fingerprints.append(outcome.fingerprint)
        return len(outcomes)

    def finish(self, remarks: list[str]) -> None:
        """Write the sums into the report."""
        self.report.formats = dict(sorted((+self.formats).items()))
        self.report.notes = dict(sorted(self.notes.most_common(MAX_NOTES)))
        self.report.contamination = self.account.to_report() if self.account else {}
        self.report.warnings += remarks
        if self.unmarked_html:
            self.report.warnings.append(
                f"{self.unmarked_html:,} answers look like HTML, but not certainly the page's; left as they are"
            )


def _shards(sources: list[Input], report: Report, remarks: list[str], bar: Bar) -> Iterator["Shard"]:
    """Cut each input into shards of about SHARD_BYTES. The cuts depend on the inputs alone. A fault of a file that leaves no
    record behind becomes a line of `remarks`.
    """
    for position, (source, file) in enumerate(zip(sources, report.files)):
        shard, size, done, packed = Shard(position, source.name, 0, []), 0, 0, source.packed
        for record in source.records():
            # In compressed files and tables `record.end` is not a byte position, so the bar counts the records' own bytes.
            bar.advance(len(record.text) if packed else record.end - done, 0)
            done = record.end
            if record.error is not None and not record.text:
                remarks.append(f"{record.where}: {record.error}")
                continue
            shard.records.append(record)
            file["records"] += 1
            size += len(record.text)
            if size >= SHARD_BYTES or len(shard.records) >= SHARD_RECORDS:
                yield shard
                shard, size = Shard(position, source.name, file["records"], []), 0
        if shard.records:
            yield shard


@dataclass(slots=True)
class Shard:
    """Consecutive records of one input, which one worker converts."""

    source: int  # position of the input among all inputs
    file: str  # name of the input
    preceding: int  # how many records of the input come before this shard's
    records: list[RawRecord]


@dataclass(slots=True)
class Outcome:
    """A record after the first pass: rejected with a reason, or a conversation."""

    id: str
    where: str
    source: int = 0  # position among the inputs
    record: bytes = b""  # one line of JSON: the record as read, or for a tree with several branches this branch alone
    reason: str = ""
    detail: str = ""
    conversation: bytes = b""
    fingerprint: Fingerprint | None = None
    hits: list[Hit] = field(default_factory=list)
    held_out: bool = False
    repairs: dict[str, int] = field(default_factory=dict)
    # Rounds that were dropped: (number, reason, detail, messages as JSON).
    dropped: list[tuple[int, str, str, bytes]] = field(default_factory=list)
    answers: int = 0
    html_answers: int = 0
    unmarked_html: int = 0  # answers that look like HTML but were not converted
    not_learned: int = 0  # answers with `train` false, after the filters
    cut: int = 0  # answers with `ends` false
    part: int = 0  # number of the part, where the input is the cleaner's own output
    format: str = ""
    notes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """What a worker needs to turn records into outcomes."""

    settings: FilterSettings
    readings: list[Reading]
    run_settings: RunSettings


def convert_shard(conversion: Conversion, shard: Shard) -> bytes:
    """Return the packed outcomes of a shard's records. This is what a worker does."""
    named = [(record, f"{shard.file}-{number}") for number, record in enumerate(shard.records, start=shard.preceding)]
    outcomes = outcomes_of(named, shard, conversion)
    if conversion.settings.moderation:
        _moderate([outcome for outcome in outcomes if not outcome.reason], conversion.settings)
    return pack(outcomes)


def _moderate(outcomes: list[Outcome], settings: FilterSettings) -> None:
    from cleaning.filters.moderation import flagged  # imports sqlite and an HTTP client, which few runs need

    conversations = [parse_conversation(orjson.loads(outcome.conversation)) for outcome in outcomes]
    for outcome, complaint in zip(outcomes, flagged(conversations, settings)):
        if complaint is not None:
            outcome.reason, outcome.detail = "moderation", complaint
            outcome.conversation, outcome.fingerprint, outcome.dropped = b"", None, []


@dataclass(slots=True)
class _Pending:
    """A conversation while its outcome is being determined."""

    outcome: Outcome
    raw: RawConversation | None = None  # None if the record could not be read
    file: str = ""
    conversation: Conversation | None = None


def outcomes_of(named: list[tuple[RawRecord, str]], shard: Shard, conversion: Conversion) -> list[Outcome]:
    """Return the outcomes of records, at least one for each. `named` pairs a record with the id that its conversation gets
    if it has none of its own.

    This never raises because of a record, only because of a faulty filter of the user's. All records pass one step before
    any of them passes the next. This takes a tenth less time, because a step's code and tables stay in the processor's
    cache.
    """
    works = [work for record, name in named for work in _read(record, name, shard, conversion)]
    for step in (_convert, _filter, _compare_with_benchmarks, _describe, _take_fingerprint):
        for work in works:
            if work.outcome.reason:
                continue
            try:
                step(work, conversion)
            except Rejection as rejection:
                work.outcome.reason, work.outcome.detail = rejection.reason, rejection.detail
            except RecursionError:
                work.outcome.reason, work.outcome.detail = "broken_record", "nested too deeply"
    return [work.outcome for work in works]


def _read(record: RawRecord, name: str, shard: Shard, conversion: Conversion) -> list[_Pending]:
    read = parsed(record)
    line, found = b"null", []
    try:
        line = to_json(read.value if read.error is None else read.raw)
        if read.error is not None:
            raise Rejection("broken_record", read.error)
        found = conversations_in(read.value, conversion.readings[shard.source])
    except Rejection as rejection:
        reason, detail = rejection.reason, rejection.detail
    except RecursionError:
        reason, detail = "broken_record", "nested too deeply"
    if not found:
        id = id_in(read.value) or name
        return [_Pending(Outcome(id, record.where, shard.source, line, reason, detail))]
    works = []
    for branch, raw in enumerate(found, start=1):
        id, where = (name, record.where) if branch == 1 else (f"{name}-{branch}", f"{record.where}, branch {branch}")
        # A rejected branch is stored without the rest of its tree. Storing the whole tree with each branch would take
        # quadratic space.
        own = line if len(found) == 1 else _as_messages(raw)
        outcome = Outcome(raw.id or id, where, shard.source, own, format=raw.format, notes=dict(raw.notes))
        works.append(_Pending(outcome, raw, file=shard.file))
    return works


def _as_messages(raw: RawConversation) -> bytes:
    messages = [_as_read(turn, turn.text) for turn in raw.turns]
    return orjson.dumps({"id": raw.id, "model": raw.model, "lang": raw.lang, "messages": messages})


def _convert(work: _Pending, conversion: Conversion) -> None:
    work.conversation = to_conversation(work.raw, work.outcome.id, work.file)


def _filter(work: _Pending, conversion: Conversion) -> None:
    verdict = apply_steps(work.conversation, conversion.settings, work.raw.sessions)
    if verdict.reason:
        raise Rejection(verdict.reason, verdict.detail)
    work.outcome.repairs = dict(verdict.repairs)
    work.outcome.dropped = [(d.number, d.reason, d.detail, messages_json(d.messages)) for d in verdict.dropped]


def _compare_with_benchmarks(work: _Pending, conversion: Conversion) -> None:
    if not conversion.run_settings.against:
        return
    work.outcome.hits = load_benchmarks(tuple(conversion.run_settings.against)).hits(work.conversation)
    if work.outcome.hits and conversion.run_settings.contaminated == "reject":
        raise Rejection("contaminated", _about_hit(work.outcome.hits))


def _describe(work: _Pending, conversion: Conversion) -> None:
    """Count what the ledger says about a conversation that has been kept so far."""
    outcome, turns = work.outcome, work.raw.turns
    outcome.conversation = work.conversation.to_json()
    answers = [turn for turn in turns if turn.role == "assistant"]
    outcome.answers, outcome.html_answers = len(answers), sum(turn.html for turn in answers)
    outcome.unmarked_html = sum(not turn.html and looks_like_html(turn.text) for turn in answers)
    for message in work.conversation.messages:
        if message.role == "assistant":
            outcome.not_learned += not message.train
            outcome.cut += not message.ends
    outcome.part = work.conversation.part


def _take_fingerprint(work: _Pending, conversion: Conversion) -> None:
    sketched = conversion.run_settings.near > 0 or conversion.run_settings.holdout > 0
    work.outcome.fingerprint = fingerprint(work.conversation, sketched, time=work.raw.time, tree=work.raw.tree)


def _about_hit(hits: list[Hit]) -> str:
    first, more = hits[0], f" and {len(hits) - 1} more" if len(hits) > 1 else ""
    return f"turn {first.turn} ({first.role}) holds {first.rule} of {first.benchmark} {first.item}{more}: {first.excerpt!r}"


def to_conversation(raw: RawConversation, id: str, source: str) -> Conversation:
    """Return a conversation as it was read, with its HTML converted to markdown. Raises Rejection (`unreadable_html`)."""
    messages = []
    for number, turn in enumerate(raw.turns, start=1):
        try:
            text = html_to_markdown(turn.text) if turn.html else turn.text
        except UnreadableHtml as error:
            raise Rejection("unreadable_html", f"turn {number}: {error}") from None
        answers = turn.role == "assistant"
        messages.append(Message(turn.role, text, train=answers and turn.train, ends=turn.ends or not answers))
    return Conversation(id, messages, raw.source or source, raw.lang, raw.model, raw.part, raw.parts)


def messages_json(messages: list[Message]) -> bytes:
    """Return messages as a record of rejected.jsonl."""
    return orjson.dumps({"messages": [_as_read(m, m.content) for m in messages]})


def _as_read(said: Turn | Message, text: str) -> dict[str, Any]:
    """Return a turn in the form of rejected.jsonl, which gives the same turn when it is read again."""
    read: dict[str, Any] = {"role": said.role, "content": text}
    if said.role == "assistant":
        read |= {name: False for name in ("train", "ends") if not getattr(said, name)}
    return read


def pack(outcomes: list[Outcome]) -> bytes:
    """Return outcomes as bytes, so that their long texts are copied and not parsed.

    First come 8 bytes, the length of a JSON list. The list follows, with a row for each outcome: its short fields, and the
    lengths of its texts. Then come the texts of all outcomes, one after the other.
    """
    rows, texts = [], []
    for each in outcomes:
        found = each.fingerprint
        own = [
            each.record,
            each.conversation,
            *((found.beginnings, found.sketch, found.tree) if found else ()),
            *(d[3] for d in each.dropped),
        ]
        fields = [each.id, each.where, each.source, each.reason, each.detail, each.hits, each.repairs, each.answers,
                  each.html_answers, each.unmarked_html, each.format, each.notes,
                  each.not_learned, each.cut, each.part]  # fmt: skip
        rows.append(
            [fields, found and [found.length, found.time], [d[:3] for d in each.dropped], [len(t) for t in own]]
        )
        texts += own
    head = orjson.dumps(rows)
    return b"".join([len(head).to_bytes(8, "little"), head, *texts])


def unpack(data: bytes) -> list[Outcome]:
    """Return the outcomes that `pack` was given."""
    size = int.from_bytes(data[:8], "little")
    at, outcomes = 8 + size, []
    for fields, found, dropped, sizes in orjson.loads(data[8:at]):
        texts = []
        for length in sizes:
            texts.append(data[at : at + length])
            at += length
        (id, where, source, reason, detail, hits, repairs, answers, html_answers, unmarked_html, format, notes,
         not_learned, cut, part) = fields  # fmt: skip
        outcome = Outcome(id, where, source, texts[0], reason, detail, texts[1], repairs=repairs, answers=answers,
                          html_answers=html_answers, unmarked_html=unmarked_html, format=format, notes=notes,
                          not_learned=not_learned, cut=cut, part=part)  # fmt: skip
        outcome.hits = [Hit(**hit) for hit in hits]
        if found:
            outcome.fingerprint = Fingerprint(texts[2], found[0], texts[3], found[1], texts[4])
        dropped_texts = texts[5:] if found else texts[2:]
        outcome.dropped = [(*each, text) for each, text in zip(dropped, dropped_texts)]
        outcomes.append(outcome)
    return outcomes
