"""Tell what a cleaning run did to one conversation, step by step.

    python -m cleaning -o DIR --explain ID

The verdict is read from the outputs of the finished run. The steps that led to it are repeated with the run's own settings.
The record for that comes from rejected.jsonl, or, if the conversation was kept, from the dump.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cleaning.filters.steps import STEPS
from cleaning.first_pass import Conversion, Outcome, Shard, outcomes_of
from cleaning.report.ledger import read_ledger, reading_of, versions
from cleaning.settings import FilterSettings, RunSettings
from cleaning.sources.inputs import open_inputs
from cleaning.sources.rejected import Row, read_row
from fastft.common.records import RawRecord
from fastft.errors import UserError

SHOWN = 5  # duplicates whose ids are listed
# Reasons of the splitter, and of the search for duplicates.
OF_SPLIT = ("over_window", "shortened_question")
DUPLICATE = ("duplicate", "duplicate_beginning", "near_duplicate")


@dataclass
class Story:
    """What the outputs say about one conversation with the id that was asked for. Several conversations of a dump can
    have the same id."""

    parts: list[tuple[str, int, dict]] = field(default_factory=list)  # if kept: (output, line number, the line's JSON)
    rejected: Row | None = None  # if it was rejected as a whole
    rounds: list[Row] = field(default_factory=list)  # its rounds that were rejected while the rest was kept
    duplicates: list[Row] = field(default_factory=list)  # conversations that were removed as duplicates of it


def explain(directory: Path, id: str, console: Console) -> None:
    """Print the story of every conversation with this id. Raises UserError if there is none, or no finished run."""
    ledger = read_ledger(directory)
    stories = list(_stories(directory, id))
    if not stories:
        raise UserError(f"{directory}: no conversation has the id {id!r}; ids are in its .jsonl files")
    if ledger["versions"] != versions():
        console.print(
            "note: other versions made this run; the steps are those of the versions installed here", style="dim"
        )
    for story in stories:
        table = Table(title=Text(_plain(id)), title_justify="left", show_header=False, title_style="bold")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for step, text in _steps(story, id, ledger):
            table.add_row(step, Text(_plain(text)))
        console.print(table)


def _stories(directory: Path, id: str) -> Iterator[Story]:
    quoted = orjson.dumps(id)
    kept, kept_as = Story(), f"kept as {id}"
    for name in ("conversations.jsonl", "conversations.holdout.jsonl"):
        for number, line in _lines_with(directory / name, b'"id":' + quoted):
            part = orjson.loads(line)
            if part["id"] == id:
                kept.parts.append((name, number, part))
    rejected = []
    for _, line in _lines_with(directory / "rejected.jsonl", quoted[1:-1]):
        row = read_row(line)
        if row.id == id and row.round is None:
            rejected.append(Story(rejected=row))
        elif row.id == id:
            kept.rounds.append(row)
        elif row.reason in DUPLICATE and row.detail.partition(", similarity")[0] == kept_as:
            kept.duplicates.append(row)
    if kept.parts:
        # Duplicates with the same id belong to this story too, and also get stories of their own.
        same_id = [
            story.rejected for story in rejected if story.rejected.detail.partition(", similarity")[0] == kept_as
        ]
        kept.duplicates += same_id
        yield kept
    yield from rejected


def _lines_with(path: Path, text: bytes) -> Iterator[tuple[int, bytes]]:
    if path.exists():
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if text in line)


def _steps(story: Story, id: str, ledger: dict[str, Any]) -> Iterator[tuple[str, str]]:
    outcome = _read_again(story, id, ledger)
    if outcome is None:
        yield "read", "the dump is no longer where it was, or has changed; what follows is from the outputs alone"
    else:
        if id.startswith(f"{outcome.id}-"):
            yield "id", f"was {outcome.id!r} in the dump, which is the id of another conversation"
        yield from _of_outcome(outcome, story, ledger)
    row = story.rejected
    if row is not None:
        yield "verdict", f"rejected: {row.reason}" + (f" ({row.detail})" if row.detail else "")
        return
    if outcome is None:
        for each in story.rounds:
            if each.reason not in OF_SPLIT:
                yield "filters", f"{each.reason}: round {each.round} rejected ({each.detail})"
    names = ", ".join(each.id for each in story.duplicates[:SHOWN])
    yield "duplicates", f"{len(story.duplicates):,} removed in its favour: {names}" if names else "none"
    if ledger["settings"]["max_tokens"]:
        yield from _of_split(story, ledger)
    name, number, first = story.parts[0]
    language = f", language {first['lang']}" if first.get("lang") else ""
    side = "held out, " if name == "conversations.holdout.jsonl" else ""
    yield (
        "verdict",
        f"kept: {side}{name}, line {number}"
        + (f" and {len(story.parts) - 1} more" if len(story.parts) > 1 else "")
        + language,
    )


def _of_outcome(outcome: Outcome, story: Story, ledger: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "read", f"{outcome.where}, as {outcome.format or 'no known format'}"
    era = reading_of(ledger, outcome.where).era
    if outcome.html_answers or "unescaped questions" in outcome.notes or "branch counters removed" in outcome.notes:
        yield "era", "; ".join((era.name, *era.reasons))
    for note, count in outcome.notes.items():
        yield "read", f"{note}: {count:,}"
    if outcome.answers:
        yield "converted", f"{outcome.html_answers:,} of {outcome.answers:,} answers from HTML"
    dropped = defaultdict(list)
    for number, reason, detail, _ in outcome.dropped:
        dropped[reason].append(f"round {number} rejected ({detail})")
    found = [(name, f"{name}: {count:,}") for name, count in outcome.repairs.items() if ":" not in name]
    found += [(name, f"{name}: {'; '.join(rounds)}") for name, rounds in dropped.items()]
    order = {step.name: place for place, step in enumerate(STEPS)}
    for _, text in sorted(found, key=lambda each: order.get(each[0], len(order))):
        yield "filters", text
    if not found and not outcome.reason:
        yield "filters", "no changes, no complaints"
    for hit in outcome.hits:
        yield (
            "benchmarks",
            f"turn {hit.turn} ({hit.role}) holds {hit.rule} of {hit.benchmark} {hit.item}: {hit.excerpt!r}",
        )


def _of_split(story: Story, ledger: dict[str, Any]) -> Iterator[tuple[str, str]]:
    limit = ledger["settings"]["max_tokens"]
    yield "split", f"{len(story.parts)} part{'s' * (len(story.parts) > 1)} of at most {limit:,} tokens"
    if len(story.parts) > 1:
        for name, number, part in story.parts:
            messages = part["messages"]
            context = sum(not m.get("train", True) for m in messages if m["role"] == "assistant")
            rounds = sum(m["role"] == "assistant" for m in messages) - context
            size = sum(len(m["content"]) for m in messages)
            also = f", after {context} as context" if context else ""
            yield "", f"{name}, line {number}: answers to learn: {rounds}{also}; {size:,} characters"
    for row in story.rounds:
        if row.reason in OF_SPLIT:
            yield "split", f"round {row.round}: {row.reason} ({row.detail})"


def _read_again(story: Story, id: str, ledger: dict[str, Any]) -> Outcome | None:
    """Return what the first pass makes of the record today; None if the record can no longer be found."""
    row, settings = story.rejected, ledger["settings"]
    against = tuple(path for path in settings["against"] if Path(path).exists())
    run_settings = {each.name: settings[each.name] for each in fields(RunSettings)} | {
        "against": against,
        "contaminated": "flag",
    }
    chosen = {each.name: settings[each.name] for each in fields(FilterSettings) if each.name in settings}
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    # The moderation endpoint is not asked again, because the row has its verdict.
    conversion = Conversion(replace(FilterSettings(**chosen), moderation=None), [], RunSettings(**run_settings))
    if row is not None:
        record = RawRecord(row.where, row.line, 0)
        found = _outcomes(record, id, row.where, conversion, ledger)
        return next((each for each in found if each.id == id), found[0])
    source = story.parts[0][2].get("source", "")
    openings = {_opening(message) for _, _, part in story.parts for message in part["messages"]}
    for file in ledger["files"]:
        if file["name"] == source and file["path"] and Path(file["path"]).exists():
            return next(_matching(file, id, openings, conversion, ledger), None)
    return None


def _opening(message: dict[str, Any]) -> tuple[str, str]:
    """Return a turn's role and first characters, which the splitter never changes."""
    return message["role"], message["content"][:100]


def _matching(
    file: dict[str, Any], id: str, openings: set[tuple[str, str]], conversion: Conversion, ledger: dict[str, Any]
) -> Iterator[Outcome]:
    """Yield the outcomes of the dump's records that can have become the conversation `id`: those with one of the `openings`."""
    # In the dump, the conversation `a-2` may be called `a`: it is the second conversation with that id, or the second
    # branch of a tree with it. Both may have happened to `a-2-2`.
    bases = {id, id.rpartition("-")[0]} - {""}
    bases |= {base.rpartition("-")[0] for base in bases} - {""}
    as_written = re.fullmatch(r"[\w.-]+", id, re.ASCII)  # other characters may be escaped in JSON
    with open_inputs([file["path"]]) as [source]:
        for number, record in enumerate(each for each in source.records() if each.text or each.error is None):
            fallback_id = f"{file['name']}-{number}"
            if fallback_id not in bases and as_written and not any(base.encode() in record.text for base in bases):
                continue
            for outcome in _outcomes(record, fallback_id, file["name"], conversion, ledger):
                if outcome.id in bases and outcome.conversation:
                    found = {_opening(message) for message in orjson.loads(outcome.conversation)["messages"]}
                    if found & openings:
                        yield outcome


def _outcomes(
    record: RawRecord, fallback_id: str, where: str, conversion: Conversion, ledger: dict[str, Any]
) -> list[Outcome]:
    conversion = replace(conversion, readings=[reading_of(ledger, where)])
    return outcomes_of([(record, fallback_id)], Shard(0, where.partition(": ")[0], 0, []), conversion)


def _plain(text: str) -> str:
    """Return `text` with each character that would control the terminal replaced by �."""
    return "".join(character if character.isprintable() else "�" for character in text)
