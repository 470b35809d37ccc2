"""From dumps to conversations.jsonl, with an account of what became of every record.

    read ──▶ convert, repair, filter (workers) ──▶ duplicates ──▶ split (workers) ──▶ write

Two passes. The first reads the dumps as a stream and leaves each record's outcome in a temporary file, keeping in
memory only the ids and fingerprints that duplicates need. The second goes through the outcomes in order and writes.
Order never depends on the workers. Everything is written under DIR/.partial and renamed at the end, report.json last:
where it stands, the files beside it are whole and belong to it.

    conversations.jsonl  the contract of fastft.conversation, one line a conversation or part
    conversations.holdout.jsonl  the same, of the conversations that were held out
    rejected.jsonl       {"id", "where", "reason", "detail", "round", "record"}, `record` as it was read (the raw text
                         where it could not be read); `round` is null, or the number of the one round that was rejected
                         while the rest of its conversation was kept (counted as `dropped_rounds:reason`, or by the
                         splitter as over the window)
    report.json          the ledger (`Report`)
"""

import collections
import fcntl
import hashlib
import itertools
import json
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import fastft
from cleaning.contamination import Account, Hit, load_benchmarks
from cleaning.duplicates import NEAR, SKETCHER, Duplicate, Fingerprint, clusters, families, find_duplicates, fingerprint
from cleaning.filters import Settings, apply_steps, check
from cleaning.markdown import html_to_markdown
from cleaning.sources import (
    ERAS,
    FORMATS,
    RawConversation,
    Reading,
    Rejection,
    conversations_in,
    looks_like_html,
    survey_dump,
)
from cleaning.sources.inputs import Input, open_inputs
from cleaning.split import rounds_of, split_conversation, token_counter
from fastft.conversation import Conversation, Message, parse_conversation
from fastft.records import Record, parse_json

BATCH_BYTES = 1 << 18  # what goes to a worker at a time: 256 KiB of records is about 0.2 s of work
BATCH_RECORDS = 256
WAITING = 32  # batches handed out and not yet written: enough for every worker, at most a few MiB
POOL_FROM = 1 << 20  # bytes of input below which the work is done sooner than worker processes start
MAX_NOTES = 50  # names of notes in the report: a dump chooses some of them
MAX_WARNINGS = 20  # broken records that are mentioned; all are in rejected.jsonl
# In the order in which they are published.
OUTPUTS = ("rejected.jsonl", "conversations.jsonl", "conversations.holdout.jsonl", "report.json")
SHOWN_CLUSTERS = 10  # of duplicates, in the report; every removal is in rejected.jsonl


@dataclass
class Report:
    """The ledger. `input` = `kept` + the sum of `rejected`; `rounds` likewise: in = kept + rejected.

    `input` counts conversations: those found in the dumps (a tree may give several), and as one each the records in
    which none was found.
    """

    input: int = 0
    kept: int = 0  # conversations
    rejected: dict[str, int] = field(default_factory=dict)  # by reason
    parts: int = 0  # lines of conversations.jsonl
    unfinished_parts: int = 0  # of those, parts that end before their answer does
    held_out: dict[str, int] = field(default_factory=lambda: {"conversations": 0, "parts": 0})  # conversations are kept
    duplicates: dict[str, Any] = field(default_factory=dict)  # how they were found, and the largest clusters
    contamination: dict[str, Any] = field(default_factory=dict)  # by benchmark
    repairs: dict[str, int] = field(default_factory=dict)  # turns changed, rounds dropped, in kept conversations
    rounds: dict[str, int] = field(default_factory=lambda: {"in": 0, "kept": 0, "rejected": 0})  # at the splitter
    answers: dict[str, int] = field(default_factory=lambda: {"html": 0, "as_is": 0})  # as shared, of kept conversations
    warnings: list[str] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)  # {"name", "bytes", "records", "input", "era"}
    formats: dict[str, int] = field(default_factory=dict)  # conversations found, by format
    notes: dict[str, int] = field(default_factory=dict)  # what readers left out or changed, in all conversations found
    settings: dict[str, Any] = field(default_factory=dict)
    version: str = fastft.__version__

    def check(self) -> None:
        """The books balance."""
        assert self.input == self.kept + sum(self.rejected.values()), self
        assert self.rounds["in"] == self.rounds["kept"] + self.rounds["rejected"], self
        assert self.input == sum(file["input"] for file in self.files), self


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


@dataclass(slots=True)
class Split:
    """What the splitter made of one conversation."""

    lines: list[bytes]  # of conversations.jsonl
    over_window: list[tuple[int, str, bytes]]  # (number of the round, detail, its messages as JSON)
    rounds_in: int
    rounds_kept: int
    unfinished: int = 0  # lines whose last answer goes on in the next
    refused: str = ""  # the template's reason for not rendering the conversation


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


def clean(
    inputs: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    max_tokens: int | None = None,
    model: str | None = None,
    template: str | None = None,
    overlap_rounds: int = 0,
    overlong: str = "cut",
    blocked_phrases: Iterable[str] = (),
    settings: Settings = Settings(),  # noqa: B008  frozen
    near: float = NEAR,
    keep: str = "longest",
    against: Sequence[str | os.PathLike] = (),
    contaminated: str = "reject",
    holdout: float = 0.0,
    seed: int = 0,
    workers: int | None = None,
    format: str | None = None,
    every_branch: bool = False,
    era: str = "auto",
) -> Report:
    """Clean the dumps `inputs` into `output_dir`; see this module's docstring for the files.

    `inputs` are files, "-" for standard input, or names of datasets on the Hub. `format` is one of
    `cleaning.sources.FORMATS` (None: recognised), `era` one of `cleaning.sources.ERAS`; with `every_branch`, a tree of
    messages gives a conversation for every leaf.
    With `max_tokens`, dialogues are split into parts of at most that many tokens of `model`'s tokenizer and chat
    template (or the template named); `overlap_rounds` and `overlong` as in cleaning.split. `near` and `keep` are explained
    in cleaning.duplicates. Conversations that share text with the benchmark files `against` are rejected, or with
    `contaminated` "flag" only reported. `holdout` is the share of conversations set aside, chosen by `seed` and their
    ids, with all that is alike on the same side. `settings` are the filters'; `blocked_phrases` are added to its own.
    `workers` is the number of processes, by default one a core; the result does not depend on it. If no conversation is
    left, there is no conversations.jsonl and `kept` is 0.

    Raises ValueError for inputs and settings that cannot be used, OSError when the output cannot be written; the
    outputs of an earlier run then stay as they were.
    """
    output_dir = Path(output_dir)
    phrases = tuple(p for p in (p.strip() for p in (*settings.blocked_phrases, *blocked_phrases)) if p)
    settings = replace(settings, blocked_phrases=phrases)
    choices = Choices(
        max_tokens=max_tokens,
        model=None if model is None else str(model),
        template=template,
        overlap_rounds=overlap_rounds,
        overlong=overlong,
        near=near,
        keep=keep,
        against=tuple(str(path) for path in against),
        contaminated=contaminated,
        holdout=holdout,
        seed=seed,
    )
    _check_arguments(inputs, output_dir, workers, format, era)
    _check_choices(choices)
    check(settings)
    if choices.against:
        load_benchmarks(choices.against)  # files and models that cannot be used are better known now than later
    if max_tokens is not None:
        token_counter(choices.model, template, max_tokens)

    chosen = {**asdict(choices), "format": format, "every_branch": every_branch, "era": era, **settings.chosen()}
    report = Report(settings={**chosen, "blocked_phrases": list(settings.blocked_phrases)})
    with open_inputs(inputs) as sources:
        reading = Reading(format, every_branch)
        eras = [survey_dump(source.records(), reading, era) for source in sources]
        report.files = [
            {"name": source.name, "bytes": source.size, "records": 0, "input": 0, "era": each.to_dict()}
            for source, each in zip(sources, eras)
        ]
        with _only_run_in(output_dir) as work:
            readings = [replace(reading, era=each) for each in eras]
            _run(sources, readings, work, output_dir, settings, choices, report, workers)
    return report


@contextmanager
def _only_run_in(output_dir: Path) -> Iterator[Path]:
    """The run's working directory DIR/.partial, removed at the end. Raises ValueError while another run has it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{output_dir}: another run is writing there; wait for it or choose another -o") from None
    work = output_dir / ".partial"
    shutil.rmtree(work, ignore_errors=True)  # what a killed run left
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(descriptor)


def _run(
    sources: list[Input],
    readings: list[Reading],
    work: Path,
    output_dir: Path,
    settings: Settings,
    choices: Choices,
    report: Report,
    workers: int | None,
) -> None:
    if settings.moderation and settings.moderation_cache is None:  # outlives an interrupted run
        settings = replace(settings, moderation_cache=str(output_dir / "moderation.sqlite"))
    account = Account(load_benchmarks(choices.against).benchmarks) if choices.against else None
    with _pool(sources, workers) as pool, _progress(sources) as bar:
        convert = partial(_convert_batch, Conversion(settings, readings, choices))
        ids, fingerprints = _first_pass(sources, convert, work / "outcomes", account, report, pool, bar)
        duplicates = find_duplicates(fingerprints, choices.near, choices.keep)
        unique_ids = _unique_ids(ids, duplicates)
        held_out = _hold_out(fingerprints, unique_ids, choices.holdout, choices.seed)
        splits = choices.max_tokens is not None
        bar.begin("splitting" if splits else "writing", len(ids))
        splitters = pool if splits else None  # without a window there is nothing to share out
        split = partial(_split_batch, choices) if splits else _whole_batch
        _second_pass(work, duplicates, unique_ids, held_out, split, report, splitters, bar)
    report.duplicates = _about_duplicates(duplicates, ids, unique_ids)
    report.contamination = account.to_report() if account else {}
    report.check()
    _publish(work, output_dir, report)


def _check_arguments(
    inputs: Sequence[str | os.PathLike], output_dir: Path, workers: int | None, format: str | None, era: str
) -> None:
    if not inputs:
        raise ValueError("no input: name at least one file")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers is {workers}; it must be at least 1")
    if format is not None and format not in FORMATS:
        raise ValueError(f"--format is {format!r}; the formats are {', '.join(FORMATS)}")
    if era not in ERAS:
        raise ValueError(f"--era is {era!r}; it is one of {', '.join(ERAS)}")
    for path in map(Path, inputs):
        if path.resolve() in {(output_dir / name).resolve() for name in OUTPUTS}:
            raise ValueError(f"{path}: is an output of this run; choose another directory for -o")
        if (output_dir / ".partial").resolve() in path.resolve().parents:
            raise ValueError(f"{path}: lies where this run works; move it, or choose another directory for -o")


def _check_choices(choices: Choices) -> None:
    if choices.max_tokens is not None and choices.max_tokens < 1:
        raise ValueError(f"--max_tokens is {choices.max_tokens}; it must be at least 1")
    if choices.max_tokens is not None and choices.model is None:
        raise ValueError("--max_tokens needs --model: tokens are counted with its tokenizer and chat template")
    for name, values in (
        ("keep", ("longest", "newest")),
        ("contaminated", ("reject", "flag")),
        ("overlong", ("cut", "reject")),
    ):
        if getattr(choices, name) not in values:
            raise ValueError(f"--{name} is {getattr(choices, name)}; it is {' or '.join(values)}")
    if not (choices.near == 0 or 0.3 <= choices.near < 1):
        raise ValueError(f"--near is {choices.near}; it is a similarity from 0.3 to 1, or 0 for none")
    if not 0 <= choices.holdout < 1:
        raise ValueError(f"--holdout is {choices.holdout}; it is a share from 0 to 1")
    if choices.overlap_rounds < 0:
        raise ValueError(f"--overlap_rounds is {choices.overlap_rounds}; it must be at least 0")


# --- first pass -------------------------------------------------------------------------------------------------------


def _first_pass(
    sources: list[Input],
    convert: Callable[[list[Item]], list[list[Outcome]]],
    spool: Path,
    account: Account | None,
    report: Report,
    pool: ProcessPoolExecutor | None,
    bar: "_Bar",
) -> tuple[list[str], list[Fingerprint]]:
    """Write the outcome of every record to `spool`; return ids and fingerprints of the conversations among them."""
    ids, fingerprints, unmarked_html = [], [], 0
    formats, notes = collections.Counter(), collections.Counter()
    batches = _batches(_items(sources, report, bar))
    with spool.open("wb") as out:
        for batch, found in _ordered_map(convert, batches, lambda batch: batch, pool):
            assert len(found) == len(batch) and all(found)
            for item, outcomes in zip(batch, found):
                report.input += len(outcomes)
                report.files[item.source]["input"] += len(outcomes)
                for outcome in outcomes:
                    outcome.record = outcome.record or item.record
                    pickle.dump(outcome, out, protocol=pickle.HIGHEST_PROTOCOL)
                    unmarked_html += outcome.unmarked_html
                    if outcome.hits:
                        account.add(outcome.id, outcome.hits)
                    formats[outcome.format] += bool(outcome.format)
                    notes.update(outcome.notes)
                    if outcome.fingerprint is not None:
                        ids.append(outcome.id)
                        fingerprints.append(outcome.fingerprint)
                bar.advance(0, len(outcomes))
    report.formats = dict(sorted((+formats).items()))
    report.notes = dict(sorted(notes.most_common(MAX_NOTES)))
    if unmarked_html:
        report.warnings.append(f"{unmarked_html:,} answers look like HTML but not of the page; left as they are")
    return ids, fingerprints


def _items(sources: list[Input], report: Report, bar: "_Bar") -> Iterator[Item]:
    for position, (source, file) in enumerate(zip(sources, report.files)):
        done = 0
        for record in source.records():
            bar.advance(record.end - done, 0)
            done = record.end
            remark = record.error is not None and not record.raw  # on the file (it was cut short), not a record
            if remark or (record.error is not None and len(report.warnings) < MAX_WARNINGS):
                report.warnings.append(f"{record.where}: {record.error}")
            if remark:
                continue
            yield _item(record, position, source.name, file["records"])
            file["records"] += 1


def _item(record: Record, source: int, file: str, number: int) -> Item:
    value, error = (record.value, None) if record.error is None else (record.raw, record.error)
    try:
        data = _to_json(value)
    except RecursionError:
        data, error = b"null", "nested too deeply"
    return Item(record.where, source, file, f"{file}-{number}", data, error)


def _to_json(value: Any) -> bytes:
    """JSON of anything that `parse_json` returns; lone surrogates stay as escapes, NaN becomes null."""
    try:
        return orjson.dumps(value, default=str)  # str: dates, decimals and bytes of a Parquet file
    except TypeError:
        text = json.dumps(value, default=str)
        if "NaN" in text or "Infinity" in text:
            text = json.dumps(json.loads(text, parse_constant=lambda name: None))
        return text.encode()


def _batches(items: Iterable[Item | Outcome]) -> Iterator[list]:
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += len(item.record)
        if size >= BATCH_BYTES or len(batch) >= BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class Conversion:
    """What a worker needs to know to turn records into outcomes."""

    settings: Settings
    readings: list[Reading]
    choices: Choices


def _convert_batch(conversion: Conversion, batch: list[Item]) -> list[list[Outcome]]:
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
    outcome.dropped = [(d.number, d.reason, d.detail, _messages_json(d.messages)) for d in verdict.dropped]
    outcome.conversation = conversation.to_json()
    sketched = conversion.choices.near > 0 or conversion.choices.holdout > 0
    outcome.fingerprint = fingerprint(conversation, sketched)
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


# --- second pass ------------------------------------------------------------------------------------------------------


def _outcomes(spool: Path) -> Iterator[tuple[int | None, Outcome]]:
    """(position among the conversations or None, outcome), in the order of the input."""
    positions = itertools.count()
    with spool.open("rb") as stream:
        while stream.peek(1):
            outcome = pickle.load(stream)
            yield (next(positions) if outcome.fingerprint is not None else None), outcome


def _hold_out(fingerprints: list[Fingerprint], ids: dict[int, str], share: float, seed: int) -> set[int]:
    """Positions of the conversations that are set aside: whole families, chosen by the id of their first member."""
    if not share:
        return set()
    positions = sorted(ids)
    roots = families(fingerprints, positions)
    return {p for p, root in zip(positions, roots) if _fraction(f"{seed}\0{ids[positions[root]]}") < share}


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / (1 << 48)


def _about_duplicates(duplicates: dict[int, Duplicate], ids: list[str], unique_ids: dict[int, str]) -> dict[str, Any]:
    found = clusters(duplicates)
    shown = [
        {
            "kept": unique_ids[keeper],
            "removed": len(positions),
            "examples": [
                {"id": ids[p], "reason": duplicates[p].reason, "similarity": duplicates[p].similarity}
                for p in positions[:SHOWN_CLUSTERS]
            ],
        }
        for keeper, positions in itertools.islice(found.items(), SHOWN_CLUSTERS)
    ]
    return {"sketches": SKETCHER, "clusters": len(found), "largest": shown}


def _unique_ids(ids: list[str], duplicates: dict[int, Duplicate]) -> dict[int, str]:
    """{position: id} of the conversations that are no duplicates; the second `a` becomes `a-2`.

    An id that occurs in the dump is never given to another conversation.
    """
    kept = {position: id for position, id in enumerate(ids) if position not in duplicates}
    taken, seen, unique = set(kept.values()), collections.Counter(), {}
    for position, id in kept.items():
        seen[id] += 1
        name = id
        while seen[id] > 1 and name in taken:
            name = f"{id}-{seen[id]}"
            seen[id] += name in taken
        taken.add(name)
        unique[position] = name
    return unique


def _second_pass(
    work: Path,
    duplicates: dict[int, Duplicate],
    ids: dict[int, str],
    held_out: set[int],
    split: Callable[[list[bytes]], list[Split]],
    report: Report,
    pool: ProcessPoolExecutor | None,
    bar: "_Bar",
) -> None:
    judged = (
        _judged(position, outcome, duplicates, ids, position in held_out)
        for position, outcome in _outcomes(work / "outcomes")
    )
    rejected, repairs = collections.Counter(), collections.Counter()
    with ExitStack() as files:
        rejects, conversations, held = (files.enter_context((work / name).open("wb")) for name in OUTPUTS[:3])
        for batch, results in _ordered_map(split, _batches(judged), _kept, pool):
            splits = iter(results)
            for outcome in batch:
                result = Split([], [], 0, 0) if outcome.reason else next(splits)
                report.rounds["in"] += result.rounds_in
                report.rounds["kept"] += result.rounds_kept
                report.rounds["rejected"] += len(result.over_window)
                if result.over_window and not result.lines:
                    outcome.reason, outcome.detail = "over_window", result.over_window[0][1]
                if result.refused:
                    outcome.reason, outcome.detail = "refused_by_template", result.refused
                if outcome.reason:
                    rejected[outcome.reason] += 1
                    rejects.write(_rejected_line(outcome, outcome.reason, outcome.detail, None, outcome.record))
                    continue
                for number, reason, detail, messages in outcome.dropped:
                    rejects.write(_rejected_line(outcome, reason, detail, number, messages))
                for number, detail, messages in result.over_window:
                    rejects.write(_rejected_line(outcome, "over_window", detail, number, messages))
                (held if outcome.held_out else conversations).writelines(result.lines)
                repairs.update(outcome.repairs)
                report.answers["html"] += outcome.html_answers
                report.answers["as_is"] += outcome.answers - outcome.html_answers
                report.kept += 1
                if outcome.held_out:
                    report.held_out["conversations"] += 1
                    report.held_out["parts"] += len(result.lines)
                else:
                    report.parts += len(result.lines)
                    report.unfinished_parts += result.unfinished
            bar.advance(len(results), len(results))
    report.rejected = dict(sorted(rejected.items()))
    report.repairs = dict(sorted(repairs.items()))


def _judged(
    position: int | None, outcome: Outcome, duplicates: dict[int, Duplicate], ids: dict[int, str], held_out: bool
) -> Outcome:
    """The outcome once duplicates are known."""
    outcome.held_out = held_out
    if position is None:
        return outcome
    if position in duplicates:
        found = duplicates[position]
        outcome.reason, outcome.detail = found.reason, f"kept as {ids[found.keeper]}"
        if found.similarity < 1 or found.reason == "near_duplicate":
            outcome.detail += f", similarity {found.similarity:.2f}"
    elif ids[position] != outcome.id:
        outcome.id = ids[position]
        conversation = parse_conversation(orjson.loads(outcome.conversation))
        conversation.id = outcome.id
        outcome.conversation = conversation.to_json()
    return outcome


def _kept(batch: list[Outcome]) -> list[bytes]:
    return [outcome.conversation for outcome in batch if not outcome.reason]


def _whole_batch(conversations: list[bytes]) -> list[Split]:
    """Without a window: each conversation is one part."""
    messages = (orjson.loads(line)["messages"] for line in conversations)
    counts = (sum(message["role"] == "user" for message in each) for each in messages)
    return [Split([line + b"\n"], [], count, count) for line, count in zip(conversations, counts)]


def _split_batch(choices: Choices, conversations: list[bytes]) -> list[Split]:
    max_tokens = choices.max_tokens
    split = partial(
        split_conversation,
        max_tokens=max_tokens,
        count_tokens=token_counter(choices.model, choices.template, max_tokens),
        overlap_rounds=choices.overlap_rounds,
        overlong=choices.overlong,
    )
    return [_split(parse_conversation(orjson.loads(line)), max_tokens, split) for line in conversations]


def _split(conversation: Conversation, max_tokens: int, split: Callable) -> Split:
    try:
        parts, over = split(conversation)
    except ValueError as error:  # a template that cannot hold it, say one that knows no system message
        return Split([], [], 0, 0, refused=str(error))
    over_window = [
        (
            each.number,
            f"round {each.number} of {each.rounds} has {each.tokens} tokens, the window {max_tokens}"
            + (", which leaves no room for what it goes on from" if each.tokens <= max_tokens else ""),
            _messages_json(each.messages),
        )
        for each in over
    ]
    rounds, unfinished = len(rounds_of(conversation.messages)[1]), sum(not part.messages[-1].ends for part in parts)
    return Split([part.to_json() + b"\n" for part in parts], over_window, rounds, rounds - len(over), unfinished)


def _messages_json(messages: list[Message]) -> bytes:
    return orjson.dumps({"messages": [{"role": m.role, "content": m.content} for m in messages]})


def _rejected_line(outcome: Outcome, reason: str, detail: str, round: int | None, record: bytes) -> bytes:
    fields = {"id": outcome.id, "where": outcome.where, "reason": reason, "detail": detail, "round": round}
    return orjson.dumps({**fields, "record": orjson.Fragment(record)}) + b"\n"


def _publish(work: Path, output_dir: Path, report: Report) -> None:
    """Rename the finished files into place. An old report.json goes first: it must not stand beside new files."""
    (work / "report.json").write_bytes(orjson.dumps(asdict(report), option=orjson.OPT_INDENT_2) + b"\n")
    for name in ("conversations.jsonl", "conversations.holdout.jsonl"):
        if not (work / name).stat().st_size:
            (work / name).unlink()
    (output_dir / "report.json").unlink(missing_ok=True)
    for name in OUTPUTS:
        if (work / name).exists():
            os.replace(work / name, output_dir / name)
        else:
            (output_dir / name).unlink(missing_ok=True)


# --- workers and progress ---------------------------------------------------------------------------------------------


@contextmanager
def _pool(sources: list[Input], workers: int | None) -> Iterator[ProcessPoolExecutor | None]:
    """Worker processes, or None where this process alone is as fast."""
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1 or (all(source.path for source in sources) and sum(s.size for s in sources) < POOL_FROM):
        yield None
        return
    # "spawn": a forked child of a process with threads (torch, tokenizers, the progress bar) can hang. Ctrl-C is the
    # parent's to handle.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: a worker whose parent was killed would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _ordered_map(
    function: Callable, batches: Iterable[list], payload: Callable, pool: ProcessPoolExecutor | None
) -> Iterator[tuple[list, list]]:
    """(batch, function(payload(batch))) in order; at most WAITING batches are under way, so memory stays small."""
    if pool is None:
        for batch in batches:
            yield batch, function(payload(batch))
        return
    waiting: collections.deque = collections.deque()
    for batch in batches:
        waiting.append((batch, pool.submit(function, payload(batch))))
        if len(waiting) >= WAITING:
            batch, future = waiting.popleft()
            yield batch, future.result()
    while waiting:
        batch, future = waiting.popleft()
        yield batch, future.result()


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        count = task.fields["conversations"]
        return Text(f"{count:,} conversations, {count / task.elapsed:,.0f}/s" if task.elapsed else "")


class _Bar:
    """The progress bar of one pass after the other."""

    def __init__(self, progress: Progress):
        self.progress, self.task, self.conversations = progress, None, 0

    def begin(self, label: str, total: int | None) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task, self.conversations = self.progress.add_task(label, total=total, conversations=0), 0

    def advance(self, amount: int, conversations: int) -> None:
        self.conversations += conversations
        self.progress.update(self.task, advance=amount, conversations=self.conversations)


@contextmanager
def _progress(sources: list[Input]) -> Iterator[_Bar]:
    """A bar on stderr, drawn on a terminal if there is much to do. It begins with the bytes of the inputs."""
    console = Console(stderr=True)
    size = sum(source.size for source in sources)
    packed = any(source.packed for source in sources)
    columns = (TextColumn("{task.description}"), BarColumn(), _Speed(), TimeRemainingColumn())
    hidden = not console.is_terminal or (size < POOL_FROM and not packed)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        bar = _Bar(progress)
        bar.begin("cleaning", None if packed else size)
        yield bar


def print_ledger(report: Report, console: Console) -> None:
    """The funnel as a table: what came in, what went for which reason, what is kept."""
    table = Table(title="Cleaning", title_justify="left", show_header=False, title_style="bold")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")

    def share(count: int) -> str:
        return f"{100 * count / report.input:.1f} %" if report.input else ""

    table.add_row("conversations in", f"{report.input:,}", "")
    for reason, count in sorted(report.rejected.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(f"  - {reason}", f"{count:,}", share(count), style="yellow")
    table.add_row("conversations kept", f"{report.kept:,}", share(report.kept), style="bold green")
    if report.settings.get("max_tokens"):
        table.add_row(f"parts of at most {report.settings['max_tokens']:,} tokens", f"{report.parts:,}", "")
        table.add_row("parts that end before their answer", f"{report.unfinished_parts:,}", "", style="dim")
        table.add_row("rounds over the window", f"{report.rounds['rejected']:,}", "")
    if report.held_out["conversations"]:
        count = report.held_out["conversations"]
        table.add_row("conversations held out", f"{count:,}", share(count))
    for name, found in report.contamination.items():
        hit = f"benchmark {name}: {found['items_hit']:,} of {found['items']:,} items found, in conversations"
        table.add_row(hit, f"{found['conversations']:,}", share(found["conversations"]))
    for name, count in report.repairs.items():
        table.add_row(f"turns repaired: {name}", f"{count:,}", "", style="dim")
    table.add_row("answers converted from HTML", f"{report.answers['html']:,}", "", style="dim")
    table.add_row("answers left as they were", f"{report.answers['as_is']:,}", "", style="dim")
    console.print(table)
