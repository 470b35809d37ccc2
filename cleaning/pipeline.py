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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from cleaning.contamination import Account, load_benchmarks
from cleaning.duplicates import NEAR, SKETCHER, Duplicate, Fingerprint, clusters, families, find_duplicates
from cleaning.filters import Settings, check
from cleaning.ledger import Report
from cleaning.outcomes import Choices, Conversion, Item, Outcome, convert_batch, messages_json
from cleaning.sources import (
    ERAS,
    FORMATS,
    Reading,
    survey_dump,
)
from cleaning.sources.inputs import Input, open_inputs
from cleaning.split import rounds_of, split_conversation, token_counter
from cleaning.workers import Bar, ordered_map, progress_bar, worker_pool
from fastft.conversation import Conversation, parse_conversation
from fastft.records import Record

BATCH_BYTES = 1 << 18  # what goes to a worker at a time: 256 KiB of records is about 0.2 s of work
BATCH_RECORDS = 256
MAX_NOTES = 50  # names of notes in the report: a dump chooses some of them
MAX_WARNINGS = 20  # broken records that are mentioned; all are in rejected.jsonl
# In the order in which they are published.
OUTPUTS = ("rejected.jsonl", "conversations.jsonl", "conversations.holdout.jsonl", "report.json")
SHOWN_CLUSTERS = 10  # of duplicates, in the report; every removal is in rejected.jsonl


@dataclass(slots=True)
class Split:
    """What the splitter made of one conversation."""

    lines: list[bytes]  # of conversations.jsonl
    over_window: list[tuple[int, str, bytes]]  # (number of the round, detail, its messages as JSON)
    rounds_in: int
    rounds_kept: int
    unfinished: int = 0  # lines whose last answer goes on in the next
    refused: str = ""  # the template's reason for not rendering the conversation


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
    with worker_pool(sources, workers) as pool, progress_bar(sources) as bar:
        convert = partial(convert_batch, Conversion(settings, readings, choices))
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
    bar: Bar,
) -> tuple[list[str], list[Fingerprint]]:
    """Write the outcome of every record to `spool`; return ids and fingerprints of the conversations among them."""
    ids, fingerprints, unmarked_html = [], [], 0
    formats, notes = collections.Counter(), collections.Counter()
    batches = _batches(_items(sources, report, bar))
    with spool.open("wb") as out:
        for batch, found in ordered_map(convert, batches, lambda batch: batch, pool):
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


def _items(sources: list[Input], report: Report, bar: Bar) -> Iterator[Item]:
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
    bar: Bar,
) -> None:
    judged = (
        _judged(position, outcome, duplicates, ids, position in held_out)
        for position, outcome in _outcomes(work / "outcomes")
    )
    rejected, repairs = collections.Counter(), collections.Counter()
    with ExitStack() as files:
        rejects, conversations, held = (files.enter_context((work / name).open("wb")) for name in OUTPUTS[:3])
        for batch, results in ordered_map(split, _batches(judged), _kept, pool):
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
            messages_json(each.messages),
        )
        for each in over
    ]
    rounds, unfinished = len(rounds_of(conversation.messages)[1]), sum(not part.messages[-1].ends for part in parts)
    return Split([part.to_json() + b"\n" for part in parts], over_window, rounds, rounds - len(over), unfinished)


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
