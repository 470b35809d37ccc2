"""The second pass: split each conversation that is kept, in worker processes, and write the outputs.

`second_pass` goes through the log of outcomes in order, applies what was decided about duplicates, ids and held-out
conversations, and writes conversations.jsonl, conversations.holdout.jsonl and rejected.jsonl. After each shard it records
its progress. Conversations go to the workers and come back as bytes, as in the first pass; fastft.data.split does the
splitting.
"""

import collections
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from cleaning.first_pass import Outcome, messages_json, unpack
from cleaning.report.examples import pick_examples
from cleaning.report.ledger import Report
from cleaning.run.workdir import OUTPUTS, Log, load_progress, open_output
from cleaning.run.workers import Bar
from cleaning.settings import RunSettings
from cleaning.sources.formats import Reading
from fastft.common.files import write_whole
from fastft.common.workers import Pool, ordered_map
from fastft.data.conversation import Conversation, parse_conversation, rounds_of
from fastft.data.dedup.duplicates import Duplicate
from fastft.data.split import CheckPart, Cut, OverLimit, Shortened, split_conversation, token_counter
from fastft.errors import UserError


@dataclass
class Decisions:
    """What is decided between the passes. Conversations are named by position: their place among all of the first pass."""

    ids: list[str]  # by position, made unique
    duplicates: dict[int, Duplicate]  # position -> why it is removed
    held_out: set[int]  # positions


@dataclass(slots=True)
class Split:
    """One conversation after the splitter."""

    lines: list[bytes]  # the lines of conversations.jsonl, one for each part
    over_limit: list[tuple[int, str, bytes]]  # rounds that no part can hold: (number, detail, messages as JSON)
    shortened: list[tuple[int, str, bytes]]  # what was left out of long questions: (number of the round, detail, JSON)
    rounds_in: int
    rounds_kept: int
    unfinished: int = 0  # parts whose last answer continues in the next part
    refused: str = ""  # why the chat template cannot render the conversation; "" if it can


# The fields of the report that this pass counts. A run that continues an interrupted one restores them.
COUNTED = (
    "kept", "rejected", "parts", "unfinished_parts", "held_out", "repairs", "rounds", "answers", "marked", "examples",
)  # fmt: skip


def second_pass(
    work: Path,
    decisions: Decisions,
    run_settings: RunSettings,
    readings: list[Reading],
    report: Report,
    pool: Pool | None,
    bar: Bar,
) -> None:
    """Split and write the outcomes in the log, shard by shard. This begins where an interrupted run ended, if there was one."""
    splits = run_settings.max_tokens is not None
    bar.begin("splitting" if splits else "writing", report.input)
    split = partial(split_batch, run_settings) if splits else whole_batch
    pool = pool if splits else None  # workers have nothing to do where conversations stay whole
    progress = load_progress(work) or {"shards": 0, "sizes": dict.fromkeys(OUTPUTS[:3], 0), "ledger": {}}
    for name, value in progress["ledger"].items():
        setattr(report, name, value)
    with ExitStack() as files, Log(work / "outcomes") as log:
        outputs = [files.enter_context(open_output(work / name, size)) for name, size in progress["sizes"].items()]
        waiting: collections.deque[list[Outcome]] = collections.deque()  # shards that are being split, in order

        def batches() -> Iterator[list[bytes]]:
            positions = itertools.count()
            for number, frame in enumerate(log.frames()):
                batch = [_decided(each, positions, decisions) for each in unpack(frame)]
                if number < progress["shards"]:
                    bar.advance(len(batch), len(batch))
                    continue
                waiting.append(batch)
                yield [outcome.conversation for outcome in batch if not outcome.reason]

        for shards, splits in enumerate(ordered_map(split, batches(), pool), start=progress["shards"] + 1):
            batch = waiting.popleft()
            _write(batch, splits, readings, report, *outputs)
            for output in outputs:
                output.flush()
            sizes = {name: output.tell() for name, output in zip(OUTPUTS, outputs)}
            ledger = {name: getattr(report, name) for name in COUNTED}
            write_whole(work / "progress.json", orjson.dumps({"shards": shards, "sizes": sizes, "ledger": ledger}))
            bar.advance(len(batch), len(batch))
    report.rejected = dict(sorted(report.rejected.items()))
    report.repairs = dict(sorted(report.repairs.items()))


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
        report.rounds["rejected"] += len(result.over_limit)
        if result.over_limit and not result.lines:
            outcome.reason, outcome.detail = "over_window", result.over_limit[0][1]
        if result.refused:
            outcome.reason, outcome.detail = "refused_by_template", result.refused
        if outcome.reason:
            _count(report.rejected, outcome.reason)
            rejects.write(_rejected_line(outcome, outcome.reason, outcome.detail, None, outcome.record))
            continue
        for number, reason, detail, messages in outcome.dropped:
            rejects.write(_rejected_line(outcome, reason, detail, number, messages))
        for number, detail, messages in result.over_limit:
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


def _decided(outcome: Outcome, positions: Iterator[int], decisions: Decisions) -> Outcome:
    """Apply the decisions to an outcome. `positions` gives the next position to each outcome that is a conversation."""
    if outcome.fingerprint is None:
        return outcome
    position = next(positions)
    outcome.held_out = position in decisions.held_out
    if position in decisions.duplicates:
        found = decisions.duplicates[position]
        outcome.reason, outcome.detail = found.reason, f"kept as {decisions.ids[found.keeper]}"
        if found.similarity < 1 or found.reason == "near_duplicate":
            outcome.detail += f", similarity {found.similarity:.2f}"
    elif decisions.ids[position] != outcome.id:
        outcome.id = decisions.ids[position]
        conversation = parse_conversation(orjson.loads(outcome.conversation))
        conversation.id = outcome.id
        outcome.conversation = conversation.to_json()
    return outcome


def _rejected_line(outcome: Outcome, reason: str, detail: str, round: int | None, record: bytes) -> bytes:
    fields = {"id": outcome.id, "where": outcome.where, "reason": reason, "detail": detail, "round": round}
    return orjson.dumps({**fields, "record": orjson.Fragment(record)}) + b"\n"


def whole_batch(conversations: list[bytes]) -> list[Split]:
    """Return each conversation as one part, for runs without --max_tokens."""
    messages = (orjson.loads(line)["messages"] for line in conversations)
    counts = (sum(message["role"] == "user" for message in each) for each in messages)
    return [Split([line + b"\n"], [], [], count, count) for line, count in zip(conversations, counts)]


def load_tokenizer(run_settings: RunSettings) -> None:
    """Load the tokenizer and its template, which this process then keeps. Raises UserError if they cannot be used."""
    token_counter(run_settings.model, run_settings.template)


def split_batch(run_settings: RunSettings, conversations: list[bytes]) -> list[Split]:
    """Split each conversation into parts of at most `max_tokens` tokens that the trainer's template can render."""
    max_tokens = run_settings.max_tokens
    count, most, check = token_counter(run_settings.model, run_settings.template)
    split = partial(
        split_conversation,
        max_tokens=max_tokens,
        count_tokens=count,
        most_tokens=most,
        overlap_rounds=run_settings.overlap_rounds,
        overlong=run_settings.overlong,
    )
    # All conversations pass one step before any of them passes the next, as in cleaning.first_pass.outcomes_of.
    whole = [parse_conversation(orjson.loads(line)) for line in conversations]
    made = [_tried(split, conversation) for conversation in whole]
    checked = [each if isinstance(each, str) else _tried(_check_parts, check, each) for each in made]
    return [
        Split([], [], [], 0, 0, refused=each) if isinstance(each, str) else _described(conversation, max_tokens, *each)
        for conversation, each in zip(whole, checked)
    ]


def _tried(function: Callable, *arguments: Any) -> Any:
    """Return function(*arguments), or a text with the reason why the template refuses, such as a system message."""
    try:
        return function(*arguments)
    except UserError as error:
        return str(error)


def _check_parts(check: CheckPart, made: Cut) -> Cut:
    for part in made[0]:
        check(part.messages)
    return made


def _described(
    conversation: Conversation,
    max_tokens: int,
    parts: list[Conversation],
    over: list[OverLimit],
    shortened: list[Shortened],
) -> Split:
    over_limit = [
        (
            each.number,
            f"round {each.number} of {each.rounds} has {each.tokens} tokens, more than {max_tokens}"
            + (", which leaves no room for what it goes on from" if each.tokens <= max_tokens else ""),
            messages_json(each.messages),
        )
        for each in over
    ]
    left_out = [
        (
            each.number,
            f"{len(each.message.content):,} of the question's {each.characters:,} characters are left out",
            messages_json([each.message]),
        )
        for each in shortened
    ]
    lines = [part.to_json() + b"\n" for part in parts]
    rounds, unfinished = len(rounds_of(conversation.messages)[1]), sum(not part.messages[-1].ends for part in parts)
    return Split(lines, over_limit, left_out, rounds, rounds - len(over), unfinished)
