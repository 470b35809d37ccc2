"""Count what a run has kept, for report.html: lengths as histograms; languages, models and sources as bar charts.

The conversations are the largest output. They are read once, as a stream, at 300 MB/s on one core, in pieces of 8 MiB that
a run's worker processes can count. Memory grows with the number of different lengths and names, not with the file.
"""

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from cleaning.report.masking import excerpt
from cleaning.sources.lists import LANGUAGES
from fastft.common.html import Plot, compact, percent, ticks
from fastft.common.workers import Pool, ordered_map
from fastft.errors import UserError

LONGEST = 280  # characters of the first question of a cluster of duplicates
SHOWN_NAMES = 10  # bars of a chart: languages, models, sources
MOST_NAMES = 10_000  # different names that are counted; a dump can make up names of models, and file names are sources
PIECE = 8 << 20  # bytes of conversations that are counted at a time, in 0.03 s
ROUND_EDGES = (1, 2, 3, 4, 5, 6, 8, 11, 16, 21, 31, 51, 100)
LENGTH_EDGES = (0, *(digit * 10**power for power in range(1, 8) for digit in (1, 2, 5)))


class Sizes:
    """A histogram of sizes, each rounded down to two digits, so that memory grows with the sizes and not their number."""

    def __init__(self):
        self.counts: Counter[int] = Counter()
        self.total = 0

    def merge(self, other: "Sizes") -> None:
        self.counts.update(other.counts)
        self.total += other.total

    def add(self, sizes: list[int]) -> None:
        self.total += sum(sizes)
        for size, count in Counter(sizes).items():  # takes a tenth of the time of adding the sizes one by one
            unit = 10 ** max(len(str(size)) - 2, 0)
            self.counts[size - size % unit] += count

    def median(self) -> int:
        half, seen = sum(self.counts.values()) / 2, 0
        for size, count in sorted(self.counts.items()):
            seen += count
            if seen >= half:
                return size
        return 0

    def plot(self, title: str, what: str, unit: str, edges: tuple[int, ...]) -> Plot:
        """Return a histogram whose columns begin at `edges`, which are numbers of at most two digits and then zeros."""
        columns = Counter()
        for size, count in self.counts.items():
            columns[max(bisect.bisect_right(edges, size) - 1, 0)] += count
        first, last = min(columns, default=0), max(columns, default=0)
        shown, total = range(first, last + 1), max(sum(columns.values()), 1)
        width = 100 / len(shown)
        y_ticks = ticks(0, max(columns.values(), default=0), whole=True)
        tops = [100 - 100 * columns[i] / y_ticks[-1] for i in shown]
        single = edges is ROUND_EDGES
        every = 1 + len(shown) // 8  # about eight labels fit, so not every column gets one
        names = [_between(edges, i, single) for i in shown]
        return Plot(
            f"{title}, median {self.median():,}",
            x_ticks=[((n + single / 2) * width, compact(edges[i])) for n, i in enumerate(shown) if n % every == 0],
            y_ticks=[(100 - 100 * tick / y_ticks[-1], compact(tick)) for tick in y_ticks],
            lines=[
                ("column", f"M{(n + 0.08) * width:.2f} 100V{top:.2f}H{(n + 0.92) * width:.2f}V100Z")
                for n, top in enumerate(tops)
                if top < 100
            ],
            hovers=[
                (n * width, width, f"{name} {unit}: {columns[i]:,} {what} ({percent(columns[i] / total)})")
                for n, (i, name) in enumerate(zip(shown, names))
            ],
            legend=[],
        )


def _between(edges: tuple[int, ...], i: int, single: bool) -> str:
    """Return the name of a column: "20 to 49", or "3" if `single` and the column holds a single number."""
    if i + 1 == len(edges):
        return f"{edges[i]:,} or more"
    low, high = edges[i], edges[i + 1] - 1
    return f"{low:,}" if single and low == high else f"{low:,} to {high:,}"


class Names:
    """How often each name occurs. The first MOST_NAMES names are counted one by one, all others together (`more`)."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.more = 0

    def merge(self, counts: Counter[str]) -> None:
        """Add the counts of one piece of a file. Pieces that are added in order give what the whole file would give."""
        for name, count in counts.items():
            if name in self.counts or len(self.counts) < MOST_NAMES:
                self.counts[name] += count
            else:
                self.more += count


def bars(counts: dict[str, int], more: int = 0) -> list[dict[str, Any]]:
    """Return a row (`label`, `count`, `share`, `bar` in percent of the largest) for each frequent name, and one for the rest."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[SHOWN_NAMES:]) + more
    rows = [(excerpt(name) or "not named", count) for name, count in ordered[:SHOWN_NAMES]]
    rows += [(f"{len(ordered) - SHOWN_NAMES + bool(more):,} others", rest)] if rest else []
    total, largest = sum(counts.values()) + more, max((count for _, count in rows), default=1)
    return [
        {
            "kind": "kept",
            "label": label,
            "count": count,
            "share": count / total,
            "left": 0,
            "bar": 100 * count / largest,
        }
        for label, count in rows
    ]


class Kept:
    """The conversations that a run has kept, held-out ones included, counted by conversation and not by part."""

    def __init__(self, directory: Path, beginnings_of: set[str], pool: Pool | None = None):
        """`beginnings_of` lists ids of conversations whose first question's beginning is remembered."""
        self.languages, self.models, self.sources = Names(), Names(), Names()
        self.lengths: dict[str, Sizes] = defaultdict(Sizes)
        self.beginnings: dict[str, str] = {}
        paths = [directory / name for name in ("conversations.jsonl", "conversations.holdout.jsonl")]
        places = ((path, at) for path in paths if path.exists() for at in range(0, path.stat().st_size, PIECE))
        for piece in ordered_map(partial(Piece, beginnings_of, PIECE), places, pool):
            self._add(piece)

    def _add(self, piece: "Piece") -> None:
        self.languages.merge(piece.languages)
        self.models.merge(piece.models)
        self.sources.merge(piece.sources)
        for name, sizes in piece.lengths.items():
            self.lengths[name].merge(sizes)
        self.beginnings.update(piece.beginnings)

    def plots(self) -> list[tuple[Plot, str]]:
        """Return (histogram, unit of its x axis) for each kind of length; nothing if nothing is kept."""
        if not self.lengths["conversations"].counts:
            return []
        named = [
            ("rounds", "Rounds of a conversation", "conversations", "rounds", ROUND_EDGES),
            ("conversations", "Length of a conversation", "conversations", "characters", LENGTH_EDGES),
            ("questions", "Length of a question", "questions", "characters", LENGTH_EDGES),
            ("answers", "Length of an answer", "answers", "characters", LENGTH_EDGES),
        ]
        return [(self.lengths[key].plot(title, what, unit, edges), unit) for key, title, what, unit, edges in named]

    def charts(self, ledger: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
        """Return (title, bars) of every chart that has any bars."""
        languages = {_language(code): count for code, count in self.languages.counts.items()}
        charts = [
            ("Languages", bars(languages, self.languages.more)),
            ("Models", bars(self.models.counts, self.models.more)),
            ("Sources", bars(self.sources.counts, self.sources.more)),
            ("Formats, of all found", bars(ledger["formats"])),
        ]
        return [(title, rows) for title, rows in charts if rows]


_LANGUAGES = {code: name.capitalize() for name, code in LANGUAGES.items()}


def _language(code: str) -> str:
    return _LANGUAGES.get(code) or code or "not known"


class Piece:
    """Counts for one piece of a file. A conversation counts in the piece where its first part begins. Its other parts follow
    directly, and count with it even beyond the end of the piece.
    """

    def __init__(self, beginnings_of: set[str], size: int, place: tuple[Path, int]):
        self.languages, self.models, self.sources = Counter(), Counter(), Counter()
        self.lengths = {name: Sizes() for name in ("rounds", "conversations", "questions", "answers")}
        self.beginnings: dict[str, str] = {}
        found: dict[str, list[int]] = {name: [] for name in self.lengths}
        rounds = characters = 0
        for line in _lines(*place, size):
            questions, answers, ended = trained_lengths(line["messages"])
            found["questions"] += questions
            found["answers"] += answers
            rounds, characters = rounds + ended, characters + sum(questions) + sum(answers)
            if line["part"] == 0:
                self._read_first_part(line, beginnings_of)
            if line["part"] + 1 == line["parts"]:
                last = line["messages"][-1]
                rounds += last["train"] and not last["ends"]  # an answer that was cut in its dump also ends its round
                found["rounds"].append(rounds)
                found["conversations"].append(characters)
                rounds = characters = 0
            if len(found["answers"]) > 10_000:
                self._add(found)
        self._add(found)

    def _read_first_part(self, line: dict[str, Any], beginnings_of: set[str]) -> None:
        self.languages[line["lang"]] += 1
        self.models[line["model"]] += 1
        self.sources[line["source"]] += 1
        if line["id"] in beginnings_of:
            question = next((m["content"] for m in line["messages"] if m["role"] == "user"), "")
            self.beginnings[line["id"]] = excerpt(question, LONGEST)

    def _add(self, found: dict[str, list[int]]) -> None:
        for name, sizes in found.items():
            self.lengths[name].add(sizes)
            sizes.clear()


def trained_lengths(messages: list[dict[str, Any]]) -> tuple[list[int], list[int], int]:
    """Return the lengths of the questions and answers in a part that are not context, and the number of rounds that end in
    it. A "Continue" that the splitter added after cutting an answer is not counted as a question.
    """
    questions, answers, rounds, question, cut = [], [], 0, None, False
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "user":
            question = len(message["content"])
        elif role == "assistant":
            if message["train"]:
                answers.append(len(message["content"]))
                if question is not None:
                    # A piece of an answer that the splitter cut is the last message of its part, and ends no round.
                    rounds += message["ends"] or number < len(messages)
                    if not cut:
                        questions.append(question)
            question, cut = None, not message["ends"] and not message["train"]
    return questions, answers, rounds


def _lines(path: Path, start: int, size: int) -> Iterator[dict[str, Any]]:
    """Yield the lines of all conversations whose first part begins in the `size` bytes from `start` on."""
    with path.open("rb") as stream:
        if start:  # skip to the first line that begins there
            stream.seek(start - 1)
            stream.readline()
        at = stream.tell()
        # Lines before the first part 0 belong to a conversation of the piece before. The file's own first lines count in
        # any case: where parts were the input, their part 0 may be missing.
        begun = start == 0
        for text in stream:
            try:
                line = orjson.loads(text)
                line["messages"], line["id"]
                first = line["part"] == 0
            except (orjson.JSONDecodeError, KeyError, TypeError):
                where = f"{path}: line {_number_of_line(path, at)}"
                raise UserError(f"{where}: was not written by the cleaner; run it again") from None
            if first and at >= start + size:
                return
            at, begun = at + len(text), begun or first
            if begun:
                yield line


def _number_of_line(path: Path, at: int) -> int:
    number = 1
    with path.open("rb") as stream:
        while chunk := stream.read(min(1 << 20, at - stream.tell())):
            number += chunk.count(b"\n")
    return number
