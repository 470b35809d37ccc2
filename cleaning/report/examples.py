"""Pick the turns that report.html shows before and after conversion: at most one of each kind in `KINDS`.

An answer that fits is preferred to one that must be clipped. Of two equally good ones the earlier is taken, so the choice
depends on the order of the input alone. The examples are kept in `Report.examples` as plain JSON, from which an interrupted
run continues.
"""

from collections.abc import Iterator

import orjson

from cleaning.filters.privacy import mask_text
from cleaning.first_pass import Outcome
from cleaning.html.markdown import html_to_markdown
from cleaning.report.ledger import Report
from cleaning.sources.formats import Reading, as_shared, conversations_in
from cleaning.sources.turns import Rejection
from fastft.common.records import parse_json

LONGEST = 2_000  # characters of a text that are kept
AMONG = 20_000  # answers from HTML among which examples are searched for

# What the HTML of an answer must contain to be an example of its kind.
_HOLDS = {"code": "<pre", "table": "<table", "formula": "application/x-tex", "list": "<li"}
_QUESTION = "question"  # the kind of a question from which sharegpt.com's escapes or branch counter were removed
KINDS = (*_HOLDS, _QUESTION)
_REPAIRED = {"unescaped questions", "branch counters removed"}


def pick_examples(report: Report, outcome: Outcome, reading: Reading) -> None:
    """Put turns of a kept `outcome` into `report.examples` if they are better than what is there. `reading` is its input's."""
    clipped = {example["kind"]: example["clipped"] for example in report.examples}
    wanted = {kind for kind, html in _HOLDS.items() if clipped.get(kind, True) and html.encode() in outcome.record}
    if not outcome.html_answers or report.answers["html"] > AMONG:
        wanted = set()
    if _QUESTION not in clipped and not _REPAIRED.isdisjoint(outcome.notes):
        wanted.add(_QUESTION)
    if not wanted:
        return
    kept = {message["content"] for message in orjson.loads(outcome.conversation)["messages"]}
    for turn, kinds, before, after in _changed_turns(outcome, reading):
        fits = max(len(before), len(after)) <= LONGEST
        kind = next((kind for kind in KINDS if kind in wanted & kinds and (fits or kind not in clipped)), None)
        if kind is None or after not in kept:
            continue
        example = {"kind": kind, "id": outcome.id, "where": outcome.where, "turn": turn, "clipped": not fits}
        report.examples = [each for each in report.examples if each["kind"] != kind]
        report.examples.append({**example, "before": _shown(before), "after": _shown(after)})
        clipped[kind] = not fits
        wanted -= {kind} if fits else set()
    report.examples.sort(key=lambda example: KINDS.index(example["kind"]))


def _changed_turns(outcome: Outcome, reading: Reading) -> Iterator[tuple[int, set[str], str, str]]:
    """Yield (number of the turn, the kinds that it is an example of, its text as shared, its text as converted)."""
    try:
        record = parse_json(outcome.record)
        shared, settled = as_shared(record, reading)[0].turns, conversations_in(record, reading)[0].turns
    except Rejection:  # the record of a branch of a tree was rewritten as `messages`, which is not the dump's format
        return
    for number, (before, after) in enumerate(zip(shared, settled), start=1):
        if after.html:
            kinds = {kind for kind, html in _HOLDS.items() if html in after.text}
            yield number, kinds, after.text, html_to_markdown(after.text) if kinds else ""
        elif before.text != after.text:
            yield number, {_QUESTION}, before.text, after.text


def _shown(text: str) -> str:
    """Return a text masked and then clipped.

    If it were clipped first, half of a key could remain, which no pattern would recognise.
    """
    return mask_text(text[: 2 * LONGEST])[:LONGEST]
