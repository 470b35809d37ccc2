"""From dumps to conversations.jsonl, with an account of what happened to every record.

    read ──▶ convert, repair, filter (workers) ──▶ duplicates ──▶ split (workers) ──▶ write

There are two passes. The first reads the dumps as a stream and writes the outcomes of each shard of records to a log. In
memory it keeps only ids and fingerprints, by which duplicates are then found. The second reads the log in order, splits
and writes. Where shards are cut depends on the inputs alone, so the result depends neither on the workers nor on
interruptions: a run that is killed at any moment continues when the same command is given again (cleaning.run.workdir).
Everything is written under DIR/.partial and renamed at the end, report.json last. So where report.json exists, the files
beside it are complete and belong to it.

    conversations.jsonl  what training reads (fastft.data.conversation): a line for each conversation, or part of one
    conversations.holdout.jsonl  the same, of the conversations that were held out
    rejected.jsonl       {"id", "where", "reason", "detail", "round", "record"}. `record` is the record as it was read, or
                         its raw text if it could not be read. `round` is null for a conversation that was rejected as a
                         whole. Otherwise the rest of the conversation was kept, and it is the number of a round that was
                         rejected or whose question was shortened
    report.html          a page for people, made from the other files (cleaning.report.page)
    report.json          the ledger (cleaning.report.ledger.Report)
"""

import collections
import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import orjson

from cleaning.filters.chosen import check
from cleaning.first_pass import SHARD_BYTES, SHARD_RECORDS, Conversion, Found, first_pass
from cleaning.report.ledger import CHANGED_IDS, Report, versions
from cleaning.report.page import write_report
from cleaning.run.workdir import OUTPUTS, file_identity, publish, working_directory
from cleaning.run.workers import Bar, progress_bar, worker_pool
from cleaning.second_pass import Decisions, load_tokenizer, second_pass
from cleaning.settings import FilterSettings, RunSettings
from cleaning.sources.eras import ERAS
from cleaning.sources.formats import FORMATS, Reading, survey_dump
from cleaning.sources.inputs import Input, open_inputs
from fastft.common.files import write_whole
from fastft.common.records import parsed
from fastft.common.workers import Pool, in_background
from fastft.data.dedup.contamination import load_benchmarks
from fastft.data.dedup.duplicates import SKETCHER, Duplicate, Fingerprints, clusters, families, find_duplicates
from fastft.errors import UserError

logger = logging.getLogger(__name__)

SHOWN_IDS = 3  # changed ids that are listed
SHOWN_CLUSTERS = 10  # of duplicates, in the report; every removal is in rejected.jsonl


def clean(
    inputs: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    run_settings: RunSettings = RunSettings(),  # noqa: B008  frozen
    settings: FilterSettings = FilterSettings(),  # noqa: B008  frozen
    blocked_phrases: Iterable[str] = (),
    format: str | None = None,
    every_branch: bool = False,
    era: str = "auto",
    workers: int | None = None,
    ray: str | None = None,
    **changes: Any,
) -> Report:
    """Clean the dumps `inputs` into `output_dir`; this module's docstring lists the files.

        clean(["dump.json"], "out", max_tokens=2048, model="Qwen/Qwen2.5-0.5B", holdout=0.01)

    `inputs` are files, "-" for standard input, or names of datasets on the Hub. `changes` are fields of `RunSettings` given
    one by one. `settings` are those of the filters, to which `blocked_phrases` are added.

    `format` is a name in `cleaning.sources.formats.FORMATS` (None: recognised record by record), and `era` one of
    `cleaning.sources.eras.ERAS`; with `every_branch`, a tree of messages gives a conversation for every leaf. `workers` is the
    number of processes, by default one a core; with `ray`, the address of a Ray cluster ("" starts one on this machine),
    the cluster's cores do the work. The result depends on neither. If no conversation is left, there is no
    conversations.jsonl and `kept` is 0.

    Raises UserError for inputs and settings that cannot be used, and when a worker is killed or memory runs out; OSError
    when the output cannot be written. The outputs of an earlier run then stay as they were. After any interruption the
    same call continues where it was.
    """
    output_dir = Path(output_dir)
    run_settings = _as_text(replace(run_settings, **changes))
    phrases = tuple(p for p in (p.strip() for p in (*settings.blocked_phrases, *blocked_phrases)) if p)
    settings = replace(settings, blocked_phrases=phrases)
    _check_arguments(inputs, output_dir, workers, format, era)
    run_settings.check()
    check(settings)
    if run_settings.against:
        # Checked now, so that an unusable file is reported before the work begins.
        load_benchmarks(tuple(run_settings.against))

    chosen = {**asdict(run_settings), "format": format, "every_branch": every_branch, "era": era, **settings.chosen()}
    chosen["blocked_phrases"] = list(settings.blocked_phrases)
    report = Report(settings=chosen)
    with open_inputs(inputs) as sources, working_directory(output_dir, _identity(sources, report)) as (work, changed):
        if changed:
            logger.info("%s: an interrupted run with other %s was there; begun anew", work, ", ".join(changed))
        elif changed == []:
            logger.info("%s: going on with an interrupted run", output_dir)
        if not (work / "report.json").exists():
            if settings.moderation and settings.moderation_cache is None:
                settings = replace(settings, moderation_cache=str(output_dir / "moderation.sqlite"))
            with worker_pool(sources, workers, ray, _preloaded(run_settings)) as pool, progress_bar(sources) as bar:
                _run(
                    sources,
                    Conversion(settings, [], run_settings),
                    Reading(format, every_branch),
                    era,
                    work,
                    report,
                    pool,
                    bar,
                )
                ledger = orjson.dumps(asdict(report), option=orjson.OPT_INDENT_2) + b"\n"
                bar.begin("report", None)
                # The machines of a Ray cluster do not have the files that the page is made from.
                write_report(work, orjson.loads(ledger), pool if ray is None else None)
            write_whole(work / "report.json", ledger)
        else:  # an earlier run was interrupted while it published its outputs
            report = Report(**orjson.loads((work / "report.json").read_bytes()))
        publish(work, output_dir, _empty_outputs(report))
    return report


def _as_text(run_settings: RunSettings) -> RunSettings:
    """Return `run_settings` with texts in the place of path objects, as report.json needs them."""
    model = None if run_settings.model is None else str(run_settings.model)
    return replace(run_settings, model=model, against=[str(path) for path in run_settings.against])


def _preloaded(run_settings: RunSettings) -> tuple[str, ...]:
    """The modules that worker processes need: those of the passes, and where conversations are split, the tokenizer's."""
    of_passes = (first_pass.__module__, second_pass.__module__)
    if run_settings.max_tokens is None:
        return of_passes
    return *of_passes, "fastft.data.template.chat_template", "transformers.models.auto.tokenization_auto"


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
        raise UserError(f"--era is {era!r}; it must be one of {', '.join(ERAS)}")
    for path in map(Path, inputs):
        if path.resolve() in {(output_dir / name).resolve() for name in OUTPUTS}:
            raise UserError(f"{path}: is an output of this run; choose another directory for -o")
        if (output_dir / ".partial").resolve() in path.resolve().parents:
            raise UserError(f"{path}: is in the directory where this run works; move it, or choose another -o")


def _identity(sources: list[Input], report: Report) -> dict[str, Any]:
    """Return everything that the result depends on. While all of it is the same, an interrupted run continues."""
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
    """Decide how each input is read and list the inputs in the report."""
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
    reading: Reading,
    era: str,
    work: Path,
    report: Report,
    pool: Pool | None,
    bar: Bar,
) -> None:
    """Run both passes, and decide between them about duplicates, ids and held-out conversations."""
    run_settings = conversion.run_settings
    loading = None
    if run_settings.max_tokens is not None and pool:
        # A tokenizer that cannot be used is reported before most of the work. Loading it takes seconds, so a worker does
        # that while this process begins with the first pass.
        loading = in_background(pool, load_tokenizer, run_settings)
    conversion = replace(conversion, readings=_survey(sources, reading, era, report))
    if run_settings.max_tokens is not None and not pool:
        load_tokenizer(run_settings)
    decisions = _decide(first_pass(sources, conversion, work, report, pool, loading, bar), run_settings, report)
    second_pass(work, decisions, run_settings, conversion.readings, report, pool, bar)
    report.check()


def _decide(found: Found, run_settings: RunSettings, report: Report) -> Decisions:
    """Find duplicates, make ids unique and hold conversations out."""
    duplicates = find_duplicates(found.fingerprints, run_settings.near, run_settings.keep)
    _note_changed_ids(_make_unique(found.ids, found.parts, duplicates), report)
    held_out = _hold_out(found.fingerprints, found.ids, duplicates, run_settings.holdout, run_settings.seed)
    report.duplicates = _about_duplicates(duplicates, found.ids)
    return Decisions(found.ids, duplicates, held_out)


def _hold_out(
    fingerprints: Fingerprints, ids: list[str], duplicates: dict[int, Duplicate], share: float, seed: int
) -> set[int]:
    """Return the positions of the conversations that are set aside.

    Conversations of one family (similar ones) are all set aside or all trained on; the id of the first one decides.
    """
    if not share:
        return set()
    positions = [position for position in range(len(ids)) if position not in duplicates]
    roots = families(fingerprints, positions)
    return {p for p, root in zip(positions, roots) if _fraction(f"{seed}\0{ids[positions[root]]}") < share}


def _fraction(text: str) -> float:
    """Return a number from 0 to below 1, drawn evenly by a hash of `text`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / (1 << 48)


def _about_duplicates(duplicates: dict[int, Duplicate], ids: list[str]) -> dict[str, Any]:
    """Return the largest clusters of duplicates, for the report."""
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
    """Make the ids of the conversations that are kept unique, in place: the second `a` becomes `a-2`.

    An id that occurs in the dump is never given to another conversation. The parts of one conversation share theirs.
    Returns (old id, new id) of those that were changed.
    """
    taken: dict[int, set[str]] = {}  # number of the part -> ids that occur
    again = []  # positions of conversations whose id has occurred before
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
