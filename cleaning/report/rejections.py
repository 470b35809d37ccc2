"""Collect for report.html why conversations and rounds were rejected: each reason with its count and a few examples.

rejected.jsonl is read once, as a stream. For each reason, only the places of a few of its rows are remembered.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cleaning.filters.privacy import mask_text
from cleaning.filters.steps import STEPS
from cleaning.html.markdown import UnreadableHtml, html_to_markdown
from cleaning.report.ledger import reading_of
from cleaning.report.masking import excerpt
from cleaning.sources.formats import conversations_in
from cleaning.sources.rejected import Row, read_row
from cleaning.sources.turns import Rejection, Turn
from fastft.common.records import parse_json
from fastft.errors import UserError

SAMPLES = 3  # examples of each reason, drawn evenly from all of its rows
LONGEST = 280  # characters of a turn in a sample
LONGEST_PAGE = 200_000  # characters; the HTML of a longer answer is shown without converting it

# The meaning of the reasons given by readers, duplicate search and splitter. Filters describe themselves.
_OTHER_REASONS = {
    "broken_record": "not JSON, or bytes that are not UTF-8",
    "not_a_conversation": "not the shape of any known format",
    "unknown_role": "a turn's speaker is neither user, assistant, system nor tool",
    "unclear_loss_flag": "a mark that says whether to learn from an answer says neither yes nor no",
    "unreadable_html": "the HTML of an answer is nested too deeply, or ends inside a tag",
    "duplicate": "equal to a conversation that is kept",
    "duplicate_beginning": "the beginning of a conversation that is kept",
    "near_duplicate": "almost the same as a conversation that is kept",
    "contaminated": "shares text with a benchmark's questions",
    "moderation": "the endpoint flags a turn",
    "over_window": "a round has more tokens than --max_tokens",
    "shortened_question": "the middle of a question that did not fit into --max_tokens",
    "refused_by_template": "the chat template cannot render it",
}
DESCRIPTIONS = {step.name: step.description for step in STEPS} | _OTHER_REASONS


@dataclass
class _Sample:
    """Positions in the file of a few rows of one reason: a uniform sample of all its rows (reservoir sampling)."""

    count: int = 0
    places: list[tuple[int, int]] = field(default_factory=list)  # (offset, length)

    def offer(self, offset: int, length: int, chance: random.Random) -> None:
        self.count += 1
        if len(self.places) < SAMPLES:
            self.places.append((offset, length))
        elif (place := chance.randrange(self.count)) < SAMPLES:
            self.places[place] = (offset, length)


class Rejected:
    """The rows of rejected.jsonl by reason, with rows about whole conversations and rows about single rounds kept apart."""

    def __init__(self, directory: Path):
        self.path = directory / "rejected.jsonl"
        self.samples: dict[tuple[str, bool], _Sample] = defaultdict(_Sample)
        if not self.path.exists():
            raise UserError(f"{self.path}: no such file; the page is made from all outputs of a run")
        chance, offset = random.Random(0), 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    row = read_row(line)
                except UserError as error:
                    raise UserError(f"{self.path}: line {number}: {error}") from None
                self.samples[row.reason, row.round is not None].offer(offset, len(line), chance)
                offset += len(line)

    def reasons(self, ledger: dict[str, Any], of_rounds: bool) -> list[dict[str, Any]]:
        """Return the reasons, most frequent first. `share` is that of all conversations in the input; for rounds it is None."""
        found = [(name, sample) for (name, of_round), sample in self.samples.items() if of_round == of_rounds]
        total = None if of_rounds else ledger["input"]
        return [
            {
                "label": mask_text(name).replace("_", " "),
                "anchor": f"{'round' if of_rounds else 'reason'}-{number}",
                "description": DESCRIPTIONS.get(name, "a filter of your own"),
                "count": sample.count,
                "share": sample.count / total if total else None,
                "examples": [_example(row, ledger) for row in self._rows(sample)],
            }
            for number, (name, sample) in enumerate(sorted(found, key=lambda item: (-item[1].count, item[0])))
        ]

    def _rows(self, sample: _Sample) -> Iterator[Row]:
        with self.path.open("rb") as stream:
            for offset, length in sorted(sample.places):
                stream.seek(offset)
                yield read_row(stream.read(length))


def _example(row: Row, ledger: dict[str, Any]) -> dict[str, Any]:
    round = f", round {row.round}" if row.round is not None else ""
    return {
        "id": excerpt(row.id, 100),
        "where": excerpt(row.where, 200) + round,
        "detail": excerpt(row.detail, LONGEST),
        "turns": [(role, excerpt(text, LONGEST)) for role, text in _turns_of_interest(row, ledger)],
    }


def _turns_of_interest(row: Row, ledger: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (role, text) of the turns of the round that the row's detail names, or of the first round.

    For a record without turns, this is the text of the record itself.
    """
    as_text = row.record.decode(errors="replace")
    try:
        record = parse_json(row.record)
    except ValueError:  # somebody has edited the file
        return [("record", as_text)]
    if row.round is not None:
        return [(message["role"], message["content"]) for message in record["messages"]]
    try:
        turns = conversations_in(record, reading_of(ledger, row.where))[0].turns
    except (Rejection, RecursionError):
        return [("record", record if isinstance(record, str) else as_text)]
    named = re.match(r"turn (\d+)\b", row.detail)
    at = min(int(named[1]) - 1, len(turns) - 1) if named else 0
    at -= at > 0 and turns[at].role == "assistant"
    return [(turn.role, _as_markdown(turn)) for turn in turns[at : at + 2]]


def _as_markdown(turn: Turn) -> str:
    if not turn.html or len(turn.text) > LONGEST_PAGE:
        return turn.text
    try:
        return html_to_markdown(turn.text)
    except UnreadableHtml:
        return turn.text
