"""Find conversations that share text with the questions of a benchmark: a model trained on them would be tested on them.

User and assistant turns are searched alike, because people paste a question and answers repeat it. A conversation hits an
item of a benchmark when one of its turns holds

    words        13 words of the item in a row, or 20 characters in a row in a script without spaces (about as many
                 words); this is what GPT-3's report and most later ones used
    characters   50 letters and digits of the item in a row, ignoring everything between them. This also finds copies with
                 other punctuation, line breaks and spacing. (It is GPT-4's rule. There it was applied to three random
                 places of each item, here it is applied to all places.)
    whole item   an item that is too short for these rules, as a whole. If it has fewer than 6 words (10 characters in a
                 script without spaces), it must be the whole turn, because "What is 2 + 2?" occurs in many
                 conversations that have nothing to do with the benchmark

Case and punctuation never count. A shingle (words or characters in a row) that more than 10 items of a benchmark share
belongs to the benchmark's prompt template and is no evidence. An item with only such shingles can never be hit, and is
counted as `common`.

An item is a record of a JSON or JSON Lines file. Its texts are its fields `question`, `prompt`, `turns`, `text`,
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

from fastft.common.records import read_records, repair_text
from fastft.data.conversation import Conversation
from fastft.data.dedup.shingles import SEPARATOR, Shingles, Words, slices
from fastft.errors import UserError

FIELDS = ("question", "prompt", "turns", "text", "instruction", "input")
NAMES = ("question_id", "task_id", "id", "uid")
LONGEST_ITEM = 1 << 16  # characters of an item's text that are indexed

# The numbers of the rules above. "Wide" means scripts without spaces, in which each character counts as a word.
WORDS, WIDE_WORDS = 13, 20
CHARACTERS = 50
WHOLE_ITEM, WIDE_WHOLE_ITEM = 6, 10
COMMON = 10  # items of a benchmark that may share a shingle
OVERLAP = 4096  # characters that neighbouring slices of a text share; no shingle is longer
EXCERPT = 120  # characters


@dataclass(frozen=True, slots=True)
class Hit:
    """A place at which a conversation shares text with an item of a benchmark."""

    benchmark: str
    item: str
    rule: str  # "words", "characters" or "whole item"
    turn: int  # from 1
    role: str
    excerpt: str  # of the turn's folded text, from where the shared text begins


@dataclass(slots=True)
class Benchmark:
    """How many items a benchmark has."""

    name: str
    items: int = 0
    common: int = 0  # items that can never be hit, because they share every shingle with too many others


class Benchmarks:
    """An index of several benchmarks: it finds, by the hash of a shingle, the items that contain the shingle."""

    def __init__(self, items: Sequence[tuple[str, str, list[str]]]):
        """`items` are triples of benchmark, name of the item, and texts of the item."""
        self.items = [(benchmark, name) for benchmark, name, _ in items]
        self.benchmarks = {benchmark: Benchmark(benchmark) for benchmark, _, _ in items}
        # (rule, length of a shingle) -> [(the hashes of an item's shingles, the item's number), …]
        found: dict[tuple[str, int], list[tuple[np.ndarray, int]]] = {}
        for number, (benchmark, _, texts) in enumerate(items):
            self.benchmarks[benchmark].items += 1
            for text in texts:
                words = Words(SEPARATOR + text[:LONGEST_ITEM].replace(SEPARATOR, " ") + SEPARATOR)
                for key, hashes in _item_shingles(words):
                    found.setdefault(key, []).append((hashes, number))
        owners = np.array([list(self.benchmarks).index(benchmark) for benchmark, _ in self.items])
        self._tables = {key: _Table(shingles, owners) for key, shingles in sorted(found.items())}
        left = set(itertools.chain.from_iterable(table.items.tolist() for table in self._tables.values()))
        for number, (benchmark, _) in enumerate(self.items):
            self.benchmarks[benchmark].common += number not in left

    def hits(self, conversation: Conversation) -> list[Hit]:
        """Return, for each item with which the conversation shares text, the first hit that was found."""
        found: dict[int, Hit] = {}
        turns = [turn for turn, m in enumerate(conversation.messages) if m.role in ("user", "assistant")]
        # All turns are joined into one text, because most turns are short, and each call of numpy costs about the same.
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
        """Yield (rule, position in the folded text, items) for every shingle of the text that is in the index."""
        of_words, of_characters = Shingles(words.hashes), Shingles(words.character_hashes())
        for (rule, length), table in self._tables.items():
            characters = rule == "characters"
            shingles, positions = (of_characters, words.characters) if characters else (of_words, words.starts)
            for i, items in table.find(shingles.of(length)):
                yield rule, int(positions[i]), items


def _item_shingles(words: Words) -> Iterator[tuple[tuple[str, int], np.ndarray]]:
    """Yield ((rule, length of the shingles), their hashes) of one text of an item, which has a separator on each side."""
    count = len(words) - 2
    if not count:
        return
    wide = words.wide[1:-1].mean() >= 0.5
    long, short = (WIDE_WORDS, WIDE_WHOLE_ITEM) if wide else (WORDS, WHOLE_ITEM)
    inside = Shingles(words.hashes[1:-1])
    if count >= long:
        yield ("words", long), inside.of(long)
    elif count >= short:
        yield ("whole item", count), inside.of(count)
    else:  # the separators are part of the shingle, so that only a whole turn matches
        yield ("whole item", count + 2), Shingles(words.hashes).of(count + 2)
    if not wide:  # 50 Chinese characters are about 30 words, and the 20 characters above find those already
        yield ("characters", CHARACTERS), Shingles(words.character_hashes()[1:-1]).of(CHARACTERS)


class _Table:
    """A map from hashes to items. Nearly all hashes that are looked up are absent; a single look at a table of flags
    rules them out."""

    def __init__(self, shingles: list[tuple[np.ndarray, int]], benchmarks: np.ndarray):
        """`shingles` are pairs of hashes and their item; `benchmarks` is the number of each item's benchmark."""
        hashes = np.concatenate([hashes for hashes, _ in shingles])
        items = np.repeat([item for _, item in shingles], [len(hashes) for hashes, _ in shingles])
        order = np.lexsort((items, hashes))
        hashes, items = hashes[order], items[order]
        new = np.append(True, (hashes[1:] != hashes[:-1]) | (items[1:] != items[:-1]))[: len(hashes)]
        hashes, items = hashes[new], items[new]
        of_one_benchmark = hashes + benchmarks[items].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        _, which, count = np.unique(of_one_benchmark, return_inverse=True, return_counts=True)
        hashes, self.items = hashes[count[which] <= COMMON], items[count[which] <= COMMON]
        self.hashes, self.begins = np.unique(hashes, return_index=True)
        self.begins = np.append(self.begins, len(hashes))
        places = min(max(len(self.hashes).bit_length() + 4, 12), 26)  # 2^places flags, 16 to 32 for each hash
        self.shift = np.uint64(64 - places)
        self.present = np.zeros(1 << places, bool)
        self.present[self.hashes >> self.shift] = True

    def find(self, hashes: np.ndarray) -> Iterator[tuple[int, list[int]]]:
        """Yield (position, items) for each of `hashes` that is in the table."""
        maybe = np.flatnonzero(self.present[hashes >> self.shift])
        at = np.searchsorted(self.hashes, hashes[maybe])
        for i, place in zip(maybe.tolist(), at.tolist()):
            if place < len(self.hashes) and self.hashes[place] == hashes[i]:
                yield i, self.items[self.begins[place] : self.begins[place + 1]].tolist()


@lru_cache(maxsize=1)
def load_benchmarks(paths: tuple[str, ...]) -> Benchmarks:
    """Read the benchmarks in `paths`, each named after its file, and after its directory too where files share a name.

    Raises UserError for a file that cannot be read or that holds no items.
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
            raise UserError(
                f"{file}: no record has one of the fields {', '.join(FIELDS)}, which hold a benchmark's questions"
            )
    return Benchmarks(items)


def _texts(record: Any) -> Iterator[str]:
    """Yield the texts of an item."""
    if not isinstance(record, dict):
        return
    for value in (record.get(name) for name in FIELDS):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.strip():
                yield repair_text(text)


def _name(record: dict, number: int) -> str:
    """Return the name of an item: the first of NAMES that it has, or its number in the file."""
    return next((str(record[key]) for key in NAMES if record.get(key) is not None), str(number))


@dataclass
class Account:
    """What was found in the conversations of a run, for its report."""

    benchmarks: dict[str, Benchmark]
    conversations: dict[str, int] = field(default_factory=dict)  # benchmark -> conversations that hit it
    items: dict[str, dict[str, int]] = field(default_factory=dict)  # benchmark -> item -> conversations that hit it
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # benchmark -> hits to show

    SHOWN = 5

    def add(self, id: str, hits: Sequence[Hit]) -> None:
        """Count the hits of the conversation `id`."""
        for name in dict.fromkeys(hit.benchmark for hit in hits):
            self.conversations[name] = self.conversations.get(name, 0) + 1
        for hit in hits:
            counts = self.items.setdefault(hit.benchmark, {})
            counts[hit.item] = counts.get(hit.item, 0) + 1
            examples = self.examples.setdefault(hit.benchmark, [])
            # An item gives one example: five items show more than five copies of one that everybody pastes.
            if len(examples) < self.SHOWN and counts[hit.item] == 1:
                shown = {"item": hit.item, "rule": hit.rule, "turn": hit.turn, "role": hit.role, "text": hit.excerpt}
                examples.append({"id": id, **shown})

    def to_report(self) -> dict[str, Any]:
        """Return {benchmark: its counts and examples}."""
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
