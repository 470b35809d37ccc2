"""Conversations that share text with the questions of a benchmark: a model trained on them would be judged on them.

A conversation, in user and assistant turns alike (people paste the question, answers repeat it), hits an item of a
benchmark when a turn holds

    words        13 of its words in a row, or 20 characters in a row where a script writes no spaces (about as many
                 words): what GPT-3's and most later reports used
    characters   50 of its letters and digits in a row, whatever stands between them: catches other punctuation, line
                 breaks and spacing (GPT-4's rule; there three runs drawn at random, here all)
    whole item   all of a shorter item, in a row; and if it has less than 6 words (10 characters), as the whole turn:
                 "What is 2 + 2?" occurs inside much that is no benchmark question

Case and punctuation never count. A run that more than 10 items of a benchmark share is its prompt template, and no
evidence; an item all of whose runs are such is left with nothing to find, and counted (`common`).

An item is a record of a JSON or JSON Lines file; its texts are the fields `question`, `prompt`, `turns`, `text`,
`instruction` and `input`, each a text or a list of texts. Answers and choices are not looked at.

    benchmarks = load_benchmarks(("mt_bench.jsonl",))
    for hit in benchmarks.hits(conversation): ...
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cleaning.dedup.shingles import SEPARATOR, Runs, Words, slices
from fastft.common.records import read_records, repair_text
from fastft.data.conversation import Conversation
from fastft.errors import UserError

FIELDS = ("question", "prompt", "turns", "text", "instruction", "input")
NAMES = ("question_id", "task_id", "id", "uid")
LONGEST_ITEM = 1 << 16  # characters that are indexed

RUN, WIDE_RUN = 13, 20
CHARACTERS = 50
CONTAINED, WIDE_CONTAINED = 6, 10  # items of fewer must be the whole turn
COMMON = 10
OVERLAP = 4096  # characters that neighbouring slices of a turn share; no run is longer
EXCERPT = 120  # characters


@dataclass(frozen=True, slots=True)
class Hit:
    benchmark: str
    item: str
    rule: str  # "words", "characters", "whole item"
    turn: int  # from 1
    role: str
    excerpt: str  # of the turn, folded, from where the shared text begins


@dataclass(slots=True)
class Benchmark:
    name: str
    items: int = 0
    common: int = 0  # items that nothing can hit, because others of the benchmark share all of their text


class Benchmarks:
    """The runs of all items of some benchmarks, sorted, and which item each comes from."""

    def __init__(self, items: Sequence[tuple[str, str, list[str]]]):
        """`items`: (benchmark, name of the item, its texts)."""
        self.items = [(benchmark, name) for benchmark, name, _ in items]
        self.benchmarks = {benchmark: Benchmark(benchmark) for benchmark, _, _ in items}
        found: dict[tuple[str, int], list[tuple[np.ndarray, int]]] = {}  # (rule, length) -> hashes, item
        for number, (benchmark, _, texts) in enumerate(items):
            self.benchmarks[benchmark].items += 1
            for text in texts:
                for key, hashes in _runs_of_item(
                    Words(SEPARATOR + text[:LONGEST_ITEM].replace(SEPARATOR, " ") + SEPARATOR)
                ):
                    found.setdefault(key, []).append((hashes, number))
        owners = np.array([list(self.benchmarks).index(benchmark) for benchmark, _ in self.items])
        self._tables = {key: _Table(runs, owners) for key, runs in sorted(found.items())}
        left = set(itertools.chain.from_iterable(table.items.tolist() for table in self._tables.values()))
        for number, (benchmark, _) in enumerate(self.items):
            self.benchmarks[benchmark].common += number not in left

    def hits(self, conversation: Conversation) -> list[Hit]:
        """Every item that the conversation shares text with, once, at its first place."""
        found: dict[int, Hit] = {}
        turns = [turn for turn, m in enumerate(conversation.messages) if m.role in ("user", "assistant")]
        # All turns as one text: numpy's price is by the call, and most turns are short.
        texts = (conversation.messages[turn].content.replace(SEPARATOR, " ") for turn in turns)
        joined = SEPARATOR.join(["", *texts, ""])
        for start, part in slices(joined, OVERLAP):
            words, passed = Words(part), joined.count(SEPARATOR, 0, start)
            for rule, at, items in self._matches(words):
                turn = turns[passed + words.text.count(SEPARATOR, 0, at + 1) - 1]
                excerpt = words.text[at : at + EXCERPT].strip(SEPARATOR).partition(SEPARATOR)[0]
                for item in items:
                    role = conversation.messages[turn].role
                    found.setdefault(item, Hit(*self.items[item], rule, turn + 1, role, excerpt))
        return list(found.values())

    def _matches(self, words: Words) -> Iterator[tuple[str, int, list[int]]]:
        """(rule, where in the folded text, items) for every run that is in the tables."""
        of_words, of_characters = Runs(words.hashes), Runs(words.character_hashes())
        for (rule, length), table in self._tables.items():
            runs, places = (of_characters, words.characters) if rule == "characters" else (of_words, words.starts)
            for i, items in table.find(runs.of(length)):
                yield rule, int(places[i]), items


def _runs_of_item(words: Words) -> Iterator[tuple[tuple[str, int], np.ndarray]]:
    """((rule, length of the runs), their hashes) of one text of an item, between separators."""
    count = len(words) - 2
    if not count:
        return
    wide = words.wide[1:-1].mean() >= 0.5
    run, contained = (WIDE_RUN, WIDE_CONTAINED) if wide else (RUN, CONTAINED)
    inside = Runs(words.hashes[1:-1])
    if count >= run:
        yield ("words", run), inside.of(run)
    elif count >= contained:
        yield ("whole item", count), inside.of(count)
    else:
        yield ("whole item", count + 2), Runs(words.hashes).of(count + 2)
    if not wide:  # 50 Chinese characters are 30 words: the 20 above find them
        yield ("characters", CHARACTERS), Runs(words.character_hashes()[1:-1]).of(CHARACTERS)


class _Table:
    """Hashes to items. Almost no run of a conversation is in it: one look at a table of bits tells."""

    def __init__(self, runs: list[tuple[np.ndarray, int]], benchmarks: np.ndarray):
        """`runs`: (hashes, item); `benchmarks`: the benchmark of each item, as a number."""
        hashes = np.concatenate([hashes for hashes, _ in runs])
        items = np.repeat([item for _, item in runs], [len(hashes) for hashes, _ in runs])
        order = np.lexsort((items, hashes))
        hashes, items = hashes[order], items[order]
        new = np.append(True, (hashes[1:] != hashes[:-1]) | (items[1:] != items[:-1]))[: len(hashes)]
        hashes, items = hashes[new], items[new]
        of_one_benchmark = hashes + benchmarks[items].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        _, which, count = np.unique(of_one_benchmark, return_inverse=True, return_counts=True)
        hashes, self.items = hashes[count[which] <= COMMON], items[count[which] <= COMMON]
        self.hashes, self.begins = np.unique(hashes, return_index=True)
        self.begins = np.append(self.begins, len(hashes))
        places = min(max(len(self.hashes).bit_length() + 4, 12), 26)  # 16 to 32 for each hash
        self.shift = np.uint64(64 - places)
        self.present = np.zeros(1 << places, bool)
        self.present[self.hashes >> self.shift] = True

    def find(self, hashes: np.ndarray) -> Iterator[tuple[int, list[int]]]:
        """(position, items) of those of `hashes` that are in the table."""
        maybe = np.flatnonzero(self.present[hashes >> self.shift])
        at = np.searchsorted(self.hashes, hashes[maybe])
        for i, place in zip(maybe.tolist(), at.tolist()):
            if place < len(self.hashes) and self.hashes[place] == hashes[i]:
                yield i, self.items[self.begins[place] : self.begins[place + 1]].tolist()


@lru_cache(maxsize=1)
def load_benchmarks(paths: tuple[str, ...]) -> Benchmarks:
    """The benchmarks in `paths`, each named after its file (and its directory, where files share a name).

    Raises UserError for a file that holds no items.
    """
    files = [Path(path) for path in paths]
    stems = [file.stem for file in files]
    items = []
    for file in files:
        name = file.stem if stems.count(file.stem) == 1 else f"{file.resolve().parent.name}/{file.stem}"
        before = len(items)
        for number, record in enumerate(read_records(file), start=1):
            if record.error:
                raise UserError(f"{record.where}: {record.error}")
            if texts := list(_texts(record.value)):
                items.append((name, _name(record.value, number), texts))
        if len(items) == before:
            raise UserError(f"{file}: no record has one of the fields {', '.join(FIELDS)}")
    return Benchmarks(items)


def _texts(record: Any) -> Iterator[str]:
    if not isinstance(record, dict):
        return
    for value in (record.get(name) for name in FIELDS):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.strip():
                yield repair_text(text)


def _name(record: dict, number: int) -> str:
    return next((str(record[key]) for key in NAMES if record.get(key) is not None), str(number))


@dataclass
class Account:
    """What was found, for the report."""

    benchmarks: dict[str, Benchmark]
    conversations: dict[str, int] = field(default_factory=dict)  # by benchmark
    items: dict[str, dict[str, int]] = field(default_factory=dict)  # by benchmark and item: conversations
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    SHOWN = 5

    def add(self, id: str, hits: Sequence[Hit]) -> None:
        for name in dict.fromkeys(hit.benchmark for hit in hits):
            self.conversations[name] = self.conversations.get(name, 0) + 1
        for hit in hits:
            counts = self.items.setdefault(hit.benchmark, {})
            counts[hit.item] = counts.get(hit.item, 0) + 1
            examples = self.examples.setdefault(hit.benchmark, [])
            # Five of one item that everybody pastes would show less than five items.
            if len(examples) < self.SHOWN and counts[hit.item] == 1:
                shown = {"item": hit.item, "rule": hit.rule, "turn": hit.turn, "role": hit.role, "text": hit.excerpt}
                examples.append({"id": id, **shown})

    def to_report(self) -> dict[str, Any]:
        return {
            name: {
                "items": each.items,
                "common": each.common,
                "items_hit": len(self.items.get(name, ())),
                "conversations": self.conversations.get(name, 0),
                "examples": self.examples.get(name, []),
            }
            for name, each in self.benchmarks.items()
        }
