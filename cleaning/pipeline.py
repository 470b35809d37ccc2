"""From dumps to conversations.jsonl, with an account of what became of every record.

    read ──▶ convert, repair, filter (workers) ──▶ duplicates ──▶ split (workers) ──▶ write

Two passes. The first reads the dumps as a stream and leaves the outcomes of each shard of records in a log, keeping in
memory only the ids and fingerprints that duplicates need. The second goes through the log in order and writes. Shards are
cut from the inputs alone, so the result depends neither on the workers nor on interruptions: killed at any moment, a run
goes on where it was when the same command is given again (cleaning.run.workdir). Everything is written under DIR/.partial and
renamed at the end, report.json last: where it stands, the files beside it are whole and belong to it.

    conversations.jsonl  the contract of fastft.data.conversation, one line a conversation or part
    conversations.holdout.jsonl  the same, of the conversations that were held out
    rejected.jsonl       {"id", "where", "reason", "detail", "round", "record"}, `record` as it was read (the raw text
                         where it could not be read); `round` is null, or the number of the one round that was rejected
                         while the rest of its conversation was kept (counted as `dropped_rounds:reason`, or by the
                         splitter as over the window), or of which the middle of the question was left out
    report.html          a page for people, made from the others (cleaning.report)
    report.json          the ledger (`Report`)
"""

import collections
import hashlib
import itertools
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from cleaning.dedup.contamination import Account, load_benchmarks
from cleaning.dedup.duplicates import NEAR, SKETCHER, Duplicate, Fingerprints, clusters, families, find_duplicates
from cleaning.filters import Settings, check
from cleaning.first_pass import Choices, Conversion, Outcome, Shard, convert_shard, unpack
from cleaning.report.examples import pick_examples
from cleaning.report.ledger import CHANGED_IDS, Report, versions
from cleaning.report.page import write_report
from cleaning.run.workdir import (
    OUTPUTS,
    Log,
    file_identity,
    load_progress,
    open_output,
    publish,
    working_directory,
)
from cleaning.run.workers import Bar, progress_bar, worker_pool
from cleaning.second_pass import Split, load_tokenizer, split_batch, whole_batch
from cleaning.sources import ERAS, FORMATS, Reading, survey_dump
from cleaning.sources.inputs import Input, open_inputs
from fastft.common.files import write_whole
from fastft.common.records import parsed
from fastft.common.workers import Pool, in_background, ordered_map
from fastft.data.conversation import parse_conversation
from fastft.errors import UserError

# What goes to a worker at a time, and what an interruption costs at most for each: 1 MiB is about 0.2 s of work.
SHARD_BYTES = 1 << 20
SHARD_RECORDS = 1024
MAX_NOTES = 50  # names of notes in the report: a dump chooses some of them
MAX_WARNINGS = 20  # broken records that are mentioned; all are in rejected.jsonl
SHOWN_IDS = 3  # of those that were changed
SHOWN_CLUSTERS = 10  # of duplicates, in the report; every removal is in rejected.jsonl


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
    ray: str | None = None,
) -> Report:
    """Clean the dumps `inputs` into `output_dir`; see this module's docstring for the files.

    `inputs` are files, "-" for standard input, or names of datasets on the Hub. `format` is one of
    `cleaning.sources.FORMATS` (None: recognised), `era` one of `cleaning.sources.ERAS`; with `every_branch`, a tree of
    messages gives a conversation for every leaf.
    With `max_tokens`, dialogues are split into parts of at most that many tokens of `model`'s tokenizer and chat
    template (or the template named); `overlap_rounds` and `overlong` as in fastft.data.split. `near` and `keep` are explained
    in cleaning.dedup.duplicates. Conversations that share text with the benchmark files `against` are rejected, or with
    `contaminated` "flag" only reported. `holdout` is the share of conversations set aside, chosen by `seed` and their
    ids, with all that is alike on the same side. `settings` are the filters'; `blocked_phrases` are added to its own.
    `workers` is the number of processes, by default one a core; with `ray`, a Ray cluster's address ("" starts one on this
    machine), its cores do the work. The result depends on neither. If no conversation is left, there is no
    conversations.jsonl and `kept` is 0.

    Raises UserError for inputs and settings that cannot be used, OSError when the output cannot be written; the
    outputs of an earlier run then stay as they were. Interrupted in any way, the same call goes on where it was.
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

    chosen = {**asdict(choices), "format": format, "every_branch": every_branch, "era": era, **settings.chosen()}
    chosen["blocked_phrases"] = list(settings.blocked_phrases)
    report = Report(settings=chosen)
    with open_inputs(inputs) as sources, working_directory(output_dir, _identity(sources, report)) as (work, changed):
        if not (work / "report.json").exists():
            needed = (
                ("fastft.data.template.chat_template", "transformers.models.auto.tokenization_auto")
                if max_tokens is not None
                else ()
            )
            with worker_pool(sources, workers, ray, needed) as pool, progress_bar(sources) as bar:
                # A tokenizer that cannot be used is better known now than later. Loading it takes seconds: a worker begins,
                # while this process begins with the work.
                loading = in_background(pool, load_tokenizer, choices) if pool and max_tokens is not None else None
                readings = _survey(sources, Reading(format, every_branch), era, report)
                if settings.moderation and settings.moderation_cache is None:
                    settings = replace(settings, moderation_cache=str(output_dir / "moderation.sqlite"))
                conversion = Conversion(settings, readings, choices)
                if changed:
                    bar.say(f"{work}: an interrupted run with other {', '.join(changed)} was there; begun anew")
                elif changed == []:
                    bar.say(f"{output_dir}: going on with an interrupted run")
                if max_tokens is not None and not pool:
                    load_tokenizer(choices)
                _run(sources, conversion, work, report, pool, loading, bar)
                ledger = orjson.dumps(asdict(report), option=orjson.OPT_INDENT_2) + b"\n"
                bar.begin("report", None)
                write_report(work, orjson.loads(ledger), pool if ray is None else None)  # another machine has no files
            write_whole(work / "report.json", ledger)
        else:  # interrupted while it was published
            report = Report(**orjson.loads((work / "report.json").read_bytes()))
        publish(work, output_dir, _empty_outputs(report))
    return report


def _identity(sources: list[Input], report: Report) -> dict[str, Any]:
    """What a run depends on: with all of it the same, an interrupted run goes on."""
    chosen = report.settings
    own = [spec.rpartition(":")[0] for spec in chosen.get("own_filters", ())]
    files = [path for path in (*own, *chosen["against"], chosen["model"], chosen["template"]) if path]
    return {
        "inputs": [source.identity() for source in sources],
        "settings": chosen,
        "files": [file_identity(Path(path)) for path in files if Path(path).exists()],
        "versions": versions(),
        "shards": [SHARD_BYTES, SHARD_RECORDS],
    }


def _survey(sources: list[Input], reading: Reading, era: str, report: Report) -> list[Reading]:
    """How each input is read, its era decided; listed in the report."""
    eras = [survey_dump(map(parsed, source.records()), reading, era) for source in sources]
    report.files = [
        {"name": source.name, "path": source.place, "bytes": source.size}
        | {"records": 0, "input": 0, "era": each.to_dict()}
        for source, each in zip(sources, eras)
    ]
    return [replace(reading, era=each) for each in eras]


def _empty_outputs(report: Report) -> set[str]:
    empty = {"conversations.jsonl"} if not report.parts else set()
    return empty | ({"conversations.holdout.jsonl"} if not report.held_out["parts"] else set())


def _run(
    sources: list[Input],
    conversion: Conversion,
    work: Path,
    report: Report,
    pool: Pool | None,
    loading: Future | None,
    bar: Bar,
) -> None:
    choices = conversion.choices
    account = Account(load_benchmarks(choices.against).benchmarks) if choices.against else None
    ids, parts, fingerprints = _first_pass(sources, conversion, work, account, report, pool, loading, bar)
    duplicates = find_duplicates(fingerprints, choices.near, choices.keep)
    _note_changed_ids(_make_unique(ids, parts, duplicates), report)
    held_out = _hold_out(fingerprints, ids, duplicates, choices.holdout, choices.seed)
    del fingerprints  # 370 bytes a conversation
    report.duplicates = _about_duplicates(duplicates, ids)
    report.contamination = account.to_report() if account else {}
    splits = choices.max_tokens is not None
    bar.begin("splitting" if splits else "writing", report.input)
    split = partial(split_batch, choices) if splits else whole_batch
    splitters = pool if splits else None  # without a window there is nothing to share out
    _second_pass(work, duplicates, ids, held_out, split, conversion.readings, report, splitters, bar)
    report.check()


def _check_arguments(
    inputs: Sequence[str | os.PathLike], output_dir: Path, workers: int | None, format: str | None, era: str
) -> None:
    if not inputs:
        raise UserError("no input: name at least one file")
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    if format is not None and format not in FORMATS:
        raise UserError(f"--format is {format!r}; the formats are {', '.join(FORMATS)}")
    if era not in ERAS:
        raise UserError(f"--era is {era!r}; it is one of {', '.join(ERAS)}")
    for path in map(Path, inputs):
        if path.resolve() in {(output_dir / name).resolve() for name in OUTPUTS}:
            raise UserError(f"{path}: is an output of this run; choose another directory for -o")
        if (output_dir / ".partial").resolve() in path.resolve().parents:
            raise UserError(f"{path}: lies where this run works; move it, or choose another directory for -o")


def _check_choices(choices: Choices) -> None:
    if choices.max_tokens is not None and choices.max_tokens < 1:
        raise UserError(f"--max_tokens is {choices.max_tokens}; it must be at least 1")
    if choices.max_tokens is not None and choices.model is None:
        raise UserError("--max_tokens needs --model: tokens are counted with its tokenizer and chat template")
    for name, values in (
        ("keep", ("longest", "newest")),
        ("contaminated", ("reject", "flag")),
        ("overlong", ("cut", "reject")),
    ):
        if getattr(choices, name) not in values:
            raise UserError(f"--{name} is {getattr(choices, name)}; it is {' or '.join(values)}")
    if not (choices.near == 0 or 0.3 <= choices.near < 1):
        raise UserError(f"--near is {choices.near}; it is a similarity from 0.3 to 1, or 0 for none")
    if not 0 <= choices.holdout < 1:
        raise UserError(f"--holdout is {choices.holdout}; it is a share from 0 to 1")
    if choices.overlap_rounds < 0:
        raise UserError(f"--overlap_rounds is {choices.overlap_rounds}; it must be at least 0")


# --- first pass -------------------------------------------------------------------------------------------------------


def _first_pass(
    sources: list[Input],
    conversion: Conversion,
    work: Path,
    account: Account | None,
    report: Report,
    pool: Pool | None,
    loading: Future | None,
    bar: Bar,
) -> tuple[list[str], Sequence[int], Fingerprints]:
    """Log the outcomes of every shard; return ids, numbers of parts and fingerprints of the conversations among them."""
    tally, remarks = _Tally(report, account), []
    shards = _shards(sources, report, remarks, bar)
    with Log(work / "outcomes") as log:
        for frame in log.recover():
            bar.advance(0, tally.add(unpack(frame)))
            next(shards, None)  # reads what is done already again, which costs little: 100 MB/s
        for frame in ordered_map(partial(convert_shard, conversion), shards, pool, loading):
            log.append(frame)
            bar.advance(0, tally.add(unpack(frame)))
    tally.finish(remarks)
    return tally.ids, tally.parts, tally.fingerprints


class _Tally:
    """What the first pass finds, summed up in the report, and what is remembered of each conversation."""

    def __init__(self, report: Report, account: Account | None):
        self.report, self.account = report, account
        self.ids: list[str] = []
        self.parts = array("q")  # of which part each id is: parts of one conversation share theirs
        self.fingerprints = Fingerprints()
        self.unmarked_html = 0
        self.formats, self.notes = collections.Counter(), collections.Counter()

    def add(self, outcomes: list[Outcome]) -> int:
        """Returns their number."""
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
        self.report.formats = dict(sorted((+self.formats).items()))
        self.report.notes = dict(sorted(self.notes.most_common(MAX_NOTES)))
        self.report.warnings += remarks
        if self.unmarked_html:
            self.report.warnings.append(
                f"{self.unmarked_html:,} answers look like HTML, but not certainly the page's; left as they are"
            )


def _shards(sources: list[Input], report: Report, remarks: list[str], bar: Bar) -> Iterator[Shard]:
    """The inputs in pieces of SHARD_BYTES, each of one input; cut by what they hold and nothing else."""
    for position, (source, file) in enumerate(zip(sources, report.files)):
        shard, size, done, packed = Shard(position, source.name, 0, []), 0, 0, source.packed
        for record in source.records():
            # The end of a row of a table is its number: what it holds is counted there.
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


# --- second pass ------------------------------------------------------------------------------------------------------


def _hold_out(
    fingerprints: Fingerprints, ids: list[str], duplicates: dict[int, Duplicate], share: float, seed: int
) -> set[int]:
    """Positions of the conversations that are set aside: whole families, chosen by the id of their first member."""
    if not share:
        return set()
    positions = [position for position in range(len(ids)) if position not in duplicates]
    roots = families(fingerprints, positions)
    return {p for p, root in zip(positions, roots) if _fraction(f"{seed}\0{ids[positions[root]]}") < share}


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / (1 << 48)


def _about_duplicates(duplicates: dict[int, Duplicate], ids: list[str]) -> dict[str, Any]:
    found = clusters(duplicates)
    shown = [
        {
            "kept": ids[keeper],
            "removed": len(positions),
            "examples": [
                {"id": ids[p], "reason": duplicates[p].reason, "similarity": duplicates[p].similarity}
                for p in positions[:SHOWN_CLUSTERS]
            ],
        }
        for keeper, positions in itertools.islice(found.items(), SHOWN_CLUSTERS)
    ]
    return {"sketches": SKETCHER, "clusters": len(found), "largest": shown}


def _make_unique(ids: list[str], parts: Sequence[int], duplicates: dict[int, Duplicate]) -> list[tuple[str, str]]:
    """Change the ids of conversations that are no duplicates, in place: the second `a` becomes `a-2`. Returns (old, new).

    An id that occurs in the dump is never given to another conversation. The parts of one keep theirs.
    """
    taken, again = {}, []  # by the number of the part
    for position, (id, part) in enumerate(zip(ids, parts)):
        if position not in duplicates:
            names = taken.setdefault(part, set())
            if id in names:
                again.append(position)
            names.add(id)
    seen, changed = collections.Counter(), []
    for position in again:
        id = name = ids[position]
        part = parts[position]
        names = taken[part]
        seen[id, part] = max(seen[id, part], 1) + 1
        while name in names:
            name = f"{id}-{seen[id, part]}"
            seen[id, part] += name in names
        names.add(name)
        ids[position] = name
        changed.append((id, name))
    return changed


def _note_changed_ids(changed: list[tuple[str, str]], report: Report) -> None:
    if changed:
        shown = ", ".join(f"{id[:40]!r} is now {name[-40:]!r}" for id, name in changed[:SHOWN_IDS])
        report.warnings.append(f"{len(changed):,} conversations had the id of another one, and got their own: {shown}")
        report.notes = dict(sorted([*report.notes.items(), (CHANGED_IDS, len(changed))]))


def _second_pass(
    work: Path,
    duplicates: dict[int, Duplicate],
    ids: list[str],
    held_out: set[int],
    split: Callable[[list[bytes]], list[Split]],
    readings: list[Reading],
    report: Report,
    pool: Pool | None,
    bar: Bar,
) -> None:
    """Split and write the outcomes in the log, shard by shard."""
    progress = load_progress(work) or {"shards": 0, "sizes": dict.fromkeys(OUTPUTS[:3], 0), "ledger": {}}
    for name, value in progress["ledger"].items():
        setattr(report, name, value)
    with ExitStack() as files, Log(work / "outcomes") as log:
        outputs = [files.enter_context(open_output(work / name, size)) for name, size in progress["sizes"].items()]
        judged: collections.deque[list[Outcome]] = collections.deque()  # handed out, and not yet written

        def batches() -> Iterator[list[bytes]]:
            positions = itertools.count()
            for number, frame in enumerate(log.frames()):
                batch = [_judged(each, positions, duplicates, ids, held_out) for each in unpack(frame)]
                if number < progress["shards"]:
                    bar.advance(len(batch), len(batch))
                    continue
                judged.append(batch)
                yield [outcome.conversation for outcome in batch if not outcome.reason]

        for shards, splits in enumerate(ordered_map(split, batches(), pool), start=progress["shards"] + 1):
            batch = judged.popleft()
            _write(batch, splits, readings, report, *outputs)
            for output in outputs:
                output.flush()
            sizes = {name: output.tell() for name, output in zip(OUTPUTS, outputs)}
            ledger = {name: getattr(report, name) for name in _COUNTED}
            write_whole(work / "progress.json", orjson.dumps({"shards": shards, "sizes": sizes, "ledger": ledger}))
            bar.advance(len(batch), len(batch))
    report.rejected = dict(sorted(report.rejected.items()))
    report.repairs = dict(sorted(report.repairs.items()))


# What the second pass counts in the report.
_COUNTED = (
    "kept",
    "rejected",
    "parts",
    "unfinished_parts",
    "held_out",
    "repairs",
    "rounds",
    "answers",
    "marked",
    "examples",
)


def _write(
    batch: list[Outcome],
    splits: list[Split],
    readings: list[Reading],
    report: Report,
    rejects: BinaryIO,
    conversations: BinaryIO,
    held: BinaryIO,
) -> None:
    results = iter(splits)
    for outcome in batch:
        result = Split([], [], [], 0, 0) if outcome.reason else next(results)
        report.rounds["in"] += result.rounds_in
        report.rounds["kept"] += result.rounds_kept
        report.rounds["rejected"] += len(result.over_window)
        if result.over_window and not result.lines:
            outcome.reason, outcome.detail = "over_window", result.over_window[0][1]
        if result.refused:
            outcome.reason, outcome.detail = "refused_by_template", result.refused
        if outcome.reason:
            _count(report.rejected, outcome.reason)
            rejects.write(_rejected_line(outcome, outcome.reason, outcome.detail, None, outcome.record))
            continue
        for number, reason, detail, messages in outcome.dropped:
            rejects.write(_rejected_line(outcome, reason, detail, number, messages))
        for number, detail, messages in result.over_window:
            rejects.write(_rejected_line(outcome, "over_window", detail, number, messages))
        for number, detail, messages in result.shortened:
            rejects.write(_rejected_line(outcome, "shortened_question", detail, number, messages))
        report.rounds["shortened"] += len(result.shortened)
        (held if outcome.held_out else conversations).writelines(result.lines)
        for name, count in outcome.repairs.items():
            _count(report.repairs, name, count)
        report.answers["html"] += outcome.html_answers
        report.answers["as_is"] += outcome.answers - outcome.html_answers
        report.marked["not_learned"] += outcome.not_learned
        report.marked["cut"] += outcome.cut
        report.kept += 1
        pick_examples(report, outcome, readings[outcome.source])
        if outcome.held_out:
            report.held_out["conversations"] += 1
            report.held_out["parts"] += len(result.lines)
        else:
            report.parts += len(result.lines)
            report.unfinished_parts += result.unfinished


def _count(counts: dict[str, int], name: str, count: int = 1) -> None:
    counts[name] = counts.get(name, 0) + count


def _judged(
    outcome: Outcome,
    positions: Iterator[int],
    duplicates: dict[int, Duplicate],
    ids: list[str],
    held_out: set[int],
) -> Outcome:
    """The outcome once duplicates are known. `positions` numbers the conversations."""
    if outcome.fingerprint is None:
        return outcome
    position = next(positions)
    outcome.held_out = position in held_out
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


def _rejected_line(outcome: Outcome, reason: str, detail: str, round: int | None, record: bytes) -> bytes:
    fields = {"id": outcome.id, "where": outcome.where, "reason": reason, "detail": detail, "round": round}
    return orjson.dumps({**fields, "record": orjson.Fragment(record)}) + b"\n"
