"""Measure the search for near duplicates on planted copies: how many are found, how many removals are right, how fast.

    python benchmarks/duplicates.py [DUMP]

Every conversation of the dump gets a copy in which 2, 5 or 10 % of the words are replaced, evenly at random. The result is
compared with the exact similarity of every pair: Jaccard's, of shingles of five words as text, for the whole conversation
or for the answers plus 0.1, whichever is less. The columns are

    found   of the pairs at or above the threshold, or at least 0.05 above it (the estimate's standard error is 0.035), the
            share that lost one of its two conversations
    right   of the near duplicates that were removed, the share whose exact similarity to the keeper is at least the
            threshold - 0.05
"""

import os
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cleaning.sources.formats import conversations_in
from fastft.common.command_line import option, parse, run
from fastft.common.records import read_records
from fastft.data.conversation import Conversation, Message
from fastft.data.dedup.duplicates import (
    ANSWERS_BELOW,
    SHINGLE,
    VALUES,
    Fingerprints,
    find_duplicates,
    fingerprint,
    rows_per_band,
)

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "chats"
WORD = re.compile(r"\w+")
THRESHOLDS, CHANGED = (0.5, 0.6, 0.7, 0.8, 0.9), (0.02, 0.05, 0.10)


def load(path: Path) -> list[Conversation]:
    """Read the first conversation of each record, without any cleaning."""
    conversations = []
    for number, record in enumerate(read_records(path)):
        turns = conversations_in(record.value)[0].turns
        conversations.append(Conversation(str(number), [Message(t.role, t.text) for t in turns]))
    return conversations


def changed_copy(conversation: Conversation, share: float, rng: random.Random) -> Conversation:
    """Return a copy with `share` of its words replaced by random ones."""
    swap = lambda found: f"w{rng.randrange(10**6)}" if rng.random() < share else found.group()  # noqa: E731
    return replace(conversation, messages=[Message(m.role, WORD.sub(swap, m.content)) for m in conversation.messages])


def exact_shingles(conversation: Conversation) -> tuple[set, set]:
    """Return the shingles, as text, of the whole conversation and of the answers."""
    sets = []
    for roles in ({"system", "user", "assistant", "tool"}, {"assistant"}):
        words = [w for m in conversation.messages if m.role in roles for w in WORD.findall(m.content.casefold())]
        size = min(SHINGLE, max(len(words), 1))
        sets.append({tuple(words[i : i + size]) for i in range(len(words) - size + 1)})
    return sets[0], sets[1]


def similarity(a: tuple[set, set], b: tuple[set, set]) -> float:
    """Return the exact similarity of two conversations by their shingles."""
    whole, answers = (len(x & y) / len(x | y) if x or y else 1.0 for x, y in zip(a, b))
    return min(whole, answers + ANSWERS_BELOW)


def percent(count: int, of: list) -> str:
    return f"{100 * count / len(of):.1f} %" if of else ""


@dataclass
class DuplicatesBenchmark:
    """What is measured."""

    dump: Path = option(DATA / "sharegpt_v3_sample.json", positional=True)
    """A dump that the cleaner reads; by default chats/sharegpt_v3_sample.json in $FASTFT_DATA."""


def main(argv: Sequence[str]) -> None:
    [config] = parse(
        argv, "duplicates.py", "Measure the search for near duplicates on planted copies.", DuplicatesBenchmark
    )
    path = config.dump
    originals, rng = load(path), random.Random(1)
    size = sum(len(m.content.encode()) for c in originals for m in c.messages) / 1e6
    started = time.process_time()
    prints = [fingerprint(c) for c in originals]
    seconds = time.process_time() - started
    exact = [exact_shingles(c) for c in originals]

    table = Table(title=f"{path.name}: {len(originals)} conversations, {size:.1f} MB, and a changed copy of each")
    for column in (
        "threshold",
        "bands",
        "changed",
        "median exact",
        "pairs",
        "found",
        "pairs + .05",
        "found",
        "removed",
        "right",
    ):
        table.add_column(column, justify="right")
    for share in CHANGED:
        copies = [changed_copy(c, share, rng) for c in originals]
        copy_prints, copy_exact = [fingerprint(c) for c in copies], [exact_shingles(c) for c in copies]
        planted = [similarity(a, b) for a, b in zip(exact, copy_exact)]
        both = exact + copy_exact
        for near in THRESHOLDS:
            removed = find_duplicates(Fingerprints(prints + copy_prints), near)
            near_ones = [(p, d.keeper) for p, d in removed.items() if d.reason == "near_duplicate"]
            cells = []
            for least in (near, near + 0.05):
                pairs = [i for i, exactly in enumerate(planted) if exactly >= least]
                cells += [
                    f"{len(pairs)}",
                    percent(sum(i in removed or i + len(exact) in removed for i in pairs), pairs),
                ]
            right = percent(sum(similarity(both[p], both[keeper]) >= near - 0.05 for p, keeper in near_ones), near_ones)
            rows, median = rows_per_band(near), sorted(planted)[len(planted) // 2]
            banding = f"{VALUES // rows} of {rows}"
            table.add_row(f"{near}", banding, f"{share:.0%}", f"{median:.2f}", *cells, f"{len(near_ones)}", right)
    console = Console(width=110)
    console.print(table)

    console.print(
        f"fingerprints: {len(originals) / seconds:,.0f} conversations/s, {size / seconds:.1f} MB/s on one core"
    )
    many = [replace(p, beginnings=bytes(16 - len(str(n))) + str(n).encode()) for n, p in product(range(40), prints)]
    started = time.process_time()
    find_duplicates(Fingerprints(many))
    seconds = time.process_time() - started
    console.print(f"linking, the worst case (each 40 times): {len(many) / seconds:,.0f} conversations/s")


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
