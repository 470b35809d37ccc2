"""The page that tells what a cleaning run did: `write_report` leaves report.html beside report.json.

    python -m cleaning.report DIR      makes it again from the files of a finished run

Everything comes from those files, read once as a stream: memory follows the longest line, and the largest of them, the
conversations, pass at 300 MB/s on one core, or are counted by a run's workers. No clock and no chance: the same files
give the same page, byte for byte. Here the numbers are prepared; how they look is in report.html.jinja and, for all
pages, in `fastft.common.html`. All text that a dump or a user has written is masked (`mask_text`) on its way here, so that the
page can be shown around, and escaped there.
"""

import bisect
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from cleaning.filters import STEPS
from cleaning.filters.privacy import mask_text
from cleaning.html.markdown import html_to_markdown
from cleaning.report.ledger import reading_of
from cleaning.sources import Rejection, conversations_in
from cleaning.sources.lists import LANGUAGES
from cleaning.sources.rejected import Row, read_row
from fastft.common.html import Plot, compact, flatten, funnel, percent, ticks, write_page
from fastft.common.records import parse_json
from fastft.common.workers import Pool, ordered_map
from fastft.errors import UserError

EXAMPLES = 3  # of each reason, drawn evenly from all
LONGEST = 280  # characters of a turn in such an example
LONGEST_PAGE = 200_000  # characters of an answer beyond which its HTML is shown as it is
LONGEST_VALUE = 300  # characters of a setting
SHOWN_NAMES = 10  # languages, models, sources
MOST_NAMES = 10_000  # that are told apart: a dump chooses them
PIECE = 8 << 20  # bytes of conversations that are counted at a time: 0.03 s
ROUND_EDGES = (1, 2, 3, 4, 5, 6, 8, 11, 16, 21, 31, 51, 100)
LENGTH_EDGES = (0, *(digit * 10**power for power in range(1, 8) for digit in (1, 2, 5)))

# What rejects beside the filters.
_REASONS = {
    "broken_record": "no JSON, or bytes that are not UTF-8",
    "not_a_conversation": "no known format has this shape",
    "unknown_role": "a turn is from nobody that is known",
    "unreadable_html": "an answer's page is nested too deeply, or ends inside a tag",
    "duplicate": "equal to one that is kept",
    "duplicate_beginning": "the beginning of one that is kept",
    "near_duplicate": "almost the same as one that is kept",
    "contaminated": "shares text with a benchmark's questions",
    "moderation": "the endpoint flags a turn",
    "over_window": "a round is longer than the window",
    "shortened_question": "the middle of a question that did not fit the window",
    "refused_by_template": "the chat template cannot hold it",
}
_DESCRIPTIONS = {step.name: step.description for step in STEPS} | _REASONS


def write_report(directory: Path, ledger: dict[str, Any] | None = None, pool: Pool | None = None) -> Path:
    """Write `directory`/report.html from the other outputs there; `ledger` is report.json where it is not written yet.

    With `pool`, its processes count what is kept; the page is the same.
    Raises UserError where they are no outputs of a finished run.
    """
    ledger = read_ledger(directory) if ledger is None else ledger
    largest = ledger["duplicates"].get("largest", [])
    kept, rejected = Kept(directory, {cluster["kept"] for cluster in largest}, pool), Rejected(directory)
    reasons, rounds = (rejected.reasons(ledger, of_rounds) for of_rounds in (False, True))
    clusters = [{**_masked(cluster), "text": kept.beginnings.get(cluster["kept"], "")} for cluster in largest]
    ledger = {name: _masked(value) if name != "versions" else value for name, value in ledger.items()}
    files = ledger["files"]
    write_page(
        directory / "report.html",
        Path(__file__).with_name("cleaning.html.jinja"),
        title=f"The cleaning of {files[0]['name'] if len(files) == 1 else f'{len(files):,} inputs'}",
        ledger=ledger,
        totals=_totals(ledger, kept),
        funnel=_funnel(ledger, reasons),
        about_parts=_about_parts(ledger),
        reasons=reasons,
        rounds=rounds,
        plots=kept.plots(),
        charts=kept.charts(ledger),
        repairs=_repairs(ledger),
        clusters=clusters,
        settings=[(name, _clipped(value, LONGEST_VALUE)) for name, value in flatten(ledger["settings"])],
        versions=_versions(ledger),
        size=_size,
    )
    return directory / "report.html"


def read_ledger(directory: Path) -> dict[str, Any]:
    """report.json. Raises UserError where there is none."""
    path = directory / "report.json"
    try:
        ledger = orjson.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; name the -o directory of a finished run") from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: is damaged ({error})") from None
    if not isinstance(ledger, dict) or "examples" not in ledger:
        raise UserError(f"{path}: is not of this version of the cleaner; run it again")
    return ledger


def _totals(ledger: dict[str, Any], kept: "Kept") -> list[tuple[str, str, str]]:
    """(label, value, note): the figures on top."""
    answers, held = ledger["answers"], ledger["held_out"]["conversations"]
    totals = [
        (
            "Conversations in",
            f"{ledger['input']:,}",
            f"from {sum(file['records'] for file in ledger['files']):,} records",
        ),
        ("Kept", f"{ledger['kept']:,}", percent(ledger["kept"] / ledger["input"]) if ledger["input"] else ""),
        ("Parts to train on", f"{ledger['parts']:,}", _window(ledger)),
        ("Characters", compact(kept.lengths["answers"].total + kept.lengths["questions"].total), "kept"),
        ("Answers from HTML", f"{answers['html']:,}", f"{answers['as_is']:,} left as they were"),
    ]
    return totals + ([("Held out", f"{held:,}", f"{ledger['held_out']['parts']:,} parts")] if held else [])


def _versions(ledger: dict[str, Any]) -> list[tuple[str, str]]:
    """Of what this run has used."""
    unused = () if ledger["settings"]["max_tokens"] else ("tokenizers", "transformers")
    return [(name, version) for name, version in ledger["versions"].items() if name not in unused]


def _window(ledger: dict[str, Any]) -> str:
    window = ledger["settings"].get("max_tokens")
    return f"of at most {window:,} tokens" if window else "not split"


def _funnel(ledger: dict[str, Any], reasons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the parts: there may be ten times as many of them, and every other bar would be short."""
    anchors = {reason["label"]: reason["anchor"] for reason in reasons}
    rows = [row for row in funnel({**ledger, "parts": 0}) if row["kind"] != "parts"]
    return [{**row, "anchor": anchors.get(row["label"]) if row["kind"] == "reason" else None} for row in rows]


def _about_parts(ledger: dict[str, Any]) -> list[tuple[str, str]]:
    """What became of the conversations that are kept: (what, how many), without zeros."""
    rounds = ledger["rounds"]
    counts = [
        ("rounds longer than the window", rounds["rejected"]),
        ("questions that lost their middle, to fit", rounds["shortened"]),
        ("parts that end before their answer does", ledger["unfinished_parts"]),
        ("conversations set aside in conversations.holdout.jsonl", ledger["held_out"]["conversations"]),
    ]
    of_parts = [("rounds in the parts", f"{rounds['kept']:,} of {rounds['in']:,}")]
    if ledger["settings"]["max_tokens"] is None:
        of_parts = []
    return of_parts + [(what, f"{count:,}") for what, count in counts if count]


def _repairs(ledger: dict[str, Any]) -> list[tuple[str, str, int]]:
    """(name, what it does, turns); rounds that were dropped are shown as such."""
    repairs = ((name, count) for name, count in ledger["repairs"].items() if not name.startswith("dropped_rounds:"))
    return [(name.replace("_", " "), _DESCRIPTIONS.get(name, ""), count) for name, count in repairs]


# --- what is kept -----------------------------------------------------------------------------------------------------


class Sizes:
    """How often each size occurs, to two digits: memory follows the sizes, not their number."""

    def __init__(self):
        self.counts: Counter[int] = Counter()
        self.total = 0

    def merge(self, other: "Sizes") -> None:
        self.counts.update(other.counts)
        self.total += other.total

    def add(self, sizes: list[int]) -> None:
        self.total += sum(sizes)
        for size, count in Counter(sizes).items():  # a tenth of the time that one by one takes
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
        """Columns; `edges` are where each begins, numbers of two digits."""
        columns = Counter()
        for size, count in self.counts.items():
            columns[max(bisect.bisect_right(edges, size) - 1, 0)] += count
        first, last = min(columns, default=0), max(columns, default=0)
        shown, total = range(first, last + 1), max(sum(columns.values()), 1)
        width = 100 / len(shown)
        y_ticks = ticks(0, max(columns.values(), default=0), whole=True)
        tops = [100 - 100 * columns[i] / y_ticks[-1] for i in shown]
        single = edges is ROUND_EDGES
        every = 1 + len(shown) // 8  # labels that fit
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
    if i + 1 == len(edges):
        return f"{edges[i]:,} or more"
    low, high = edges[i], edges[i + 1] - 1
    return f"{low:,}" if single and low == high else f"{low:,} to {high:,}"


class Names:
    """How often each name occurs; those first seen behind the first MOST_NAMES are counted together."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.more = 0

    def merge(self, counts: Counter[str]) -> None:
        """All names of a piece of a file, in the order in which they are first seen: as if read in one go."""
        for name, count in counts.items():
            if name in self.counts or len(self.counts) < MOST_NAMES:
                self.counts[name] += count
            else:
                self.more += count


def bars(counts: dict[str, int], more: int = 0, unnamed: str = "not named") -> list[dict[str, Any]]:
    """Rows with `label`, `count`, `share`, `bar` (in percent of the largest) for the most frequent, and one for the rest."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[SHOWN_NAMES:]) + more
    rows = [(said(name) or unnamed, count) for name, count in ordered[:SHOWN_NAMES]]
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


class Piece:
    """What the conversations hold that begin in a piece of a file, counted; the parts of one stand together."""

    def __init__(self, beginnings_of: set[str], size: int, place: tuple[Path, int]):
        self.languages, self.models, self.sources = Counter(), Counter(), Counter()
        self.lengths = {name: Sizes() for name in ("rounds", "conversations", "questions", "answers")}
        self.beginnings: dict[str, str] = {}
        found: dict[str, list[int]] = {name: [] for name in self.lengths}
        rounds = characters = 0
        for line in _lines(*place, size):
            questions, answers, ended = taught(line["messages"])
            found["questions"] += questions
            found["answers"] += answers
            rounds, characters = rounds + ended, characters + sum(questions) + sum(answers)
            if line["part"] == 0:
                self._read_first_part(line, beginnings_of)
            if line["part"] + 1 == line["parts"]:
                last = line["messages"][-1]
                rounds += last["train"] and not last["ends"]  # cut in its dump: no other part goes on with it
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
            self.beginnings[line["id"]] = said(question, LONGEST)

    def _add(self, found: dict[str, list[int]]) -> None:
        for name, sizes in found.items():
            self.lengths[name].add(sizes)
            sizes.clear()


class Kept:
    """What the files of conversations hold, counted by conversation."""

    def __init__(self, directory: Path, beginnings_of: set[str], pool: Pool | None = None):
        """`beginnings_of`: ids of conversations of which the beginning of the first question is remembered."""
        self.languages, self.models, self.sources = Names(), Names(), Names()
        self.lengths: dict[str, Sizes] = defaultdict(Sizes)
        self.beginnings: dict[str, str] = {}
        paths = [directory / name for name in ("conversations.jsonl", "conversations.holdout.jsonl")]
        places = ((path, at) for path in paths if path.exists() for at in range(0, path.stat().st_size, PIECE))
        for piece in ordered_map(partial(Piece, beginnings_of, PIECE), places, pool):
            self._add(piece)

    def _add(self, piece: Piece) -> None:
        self.languages.merge(piece.languages)
        self.models.merge(piece.models)
        self.sources.merge(piece.sources)
        for name, sizes in piece.lengths.items():
            self.lengths[name].merge(sizes)
        self.beginnings.update(piece.beginnings)

    def plots(self) -> list[tuple[Plot, str]]:
        """(plot, what it is over) where anything is kept."""
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
        """(title, bars), those without bars left out."""
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


def taught(messages: list[dict[str, Any]]) -> tuple[list[int], list[int], int]:
    """Lengths of questions and of answers that are no context, and how many rounds end with such an answer.

    The splitter's own questions, which ask for the rest of an answer that it cut, count as none.
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
                    rounds += message["ends"] or number < len(messages)  # the splitter's pieces are the last of a part
                    if not cut:
                        questions.append(question)
            question, cut = None, not message["ends"] and not message["train"]
    return questions, answers, rounds


def _lines(path: Path, start: int, size: int) -> Iterator[dict[str, Any]]:
    """The lines of the conversations whose first part begins in the `size` bytes behind `start`."""
    with path.open("rb") as stream:
        if start:  # to the first line that begins there
            stream.seek(start - 1)
            stream.readline()
        at, begun = stream.tell(), not start  # part 0 of the first may be gone where parts were an input
        for text in stream:
            try:
                line = orjson.loads(text)
                line["messages"], line["id"]
                first = line["part"] == 0
            except (orjson.JSONDecodeError, KeyError, TypeError):
                where = f"{path}: line {_number_of_line(path, at)}"
                raise UserError(f"{where}: is no line that the cleaner wrote") from None
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


# --- what is rejected -------------------------------------------------------------------------------------------------


@dataclass
class _Sample:
    """Where a few rows of one reason stand in the file, drawn evenly from all."""

    count: int = 0
    places: list[tuple[int, int]] = field(default_factory=list)  # offset, length

    def offer(self, offset: int, length: int, chance: random.Random) -> None:
        self.count += 1
        if len(self.places) < EXAMPLES:
            self.places.append((offset, length))
        elif (place := chance.randrange(self.count)) < EXAMPLES:
            self.places[place] = (offset, length)


class Rejected:
    """What rejected.jsonl holds, by reason: whole conversations, and single rounds."""

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
        """The most frequent first; `share` is of the input, for rounds None."""
        found = [(name, sample) for (name, of_round), sample in self.samples.items() if of_round == of_rounds]
        total = None if of_rounds else ledger["input"]
        return [
            {
                "label": mask_text(name).replace("_", " "),
                "anchor": f"{'round' if of_rounds else 'reason'}-{number}",
                "description": _DESCRIPTIONS.get(name, "a filter of one's own"),
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
        "id": said(row.id, 100),
        "where": said(row.where, 200) + round,
        "detail": said(row.detail, LONGEST),
        "turns": [(role, said(text, LONGEST)) for role, text in _turns_of_interest(row, ledger)],
    }


def _turns_of_interest(row: Row, ledger: dict[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of the round that the detail speaks of, else of the first; of what is no conversation, the beginning."""
    try:
        record = parse_json(row.record)
        if row.round is not None:
            return [(message["role"], message["content"]) for message in record["messages"]]
        turns = conversations_in(record, reading_of(ledger, row.where))[0].turns
    except (Rejection, RecursionError, ValueError):
        text = row.record.decode(errors="replace")
        return [("record", record if isinstance(record, str) else text)]
    named = re.match(r"turn (\d+)\b", row.detail)
    at = min(int(named[1]) - 1, len(turns) - 1) if named else 0
    at -= at > 0 and turns[at].role == "assistant"
    return [(turn.role, _as_markdown(turn)) for turn in turns[at : at + 2]]


def _as_markdown(turn: Any) -> str:
    if not turn.html or len(turn.text) > LONGEST_PAGE:
        return turn.text
    try:
        return html_to_markdown(turn.text)
    except ValueError:
        return turn.text


# --- how things are written -------------------------------------------------------------------------------------------


def said(text: str, longest: int = 200) -> str:
    """What the page shows of a text that somebody wrote: masked, then clipped (half of a key is no key to a pattern)."""
    return _clipped(mask_text(text[: 2 * longest + 100]), longest)


def _clipped(text: str, longest: int) -> str:
    text = text.strip()
    return text if len(text) <= longest else text[:longest].rstrip() + " …"


def _masked(value: Any) -> Any:
    """`value` with all texts in it masked, keys included; counts whose names become the same are added up."""
    if isinstance(value, str):
        return mask_text(value)
    if isinstance(value, list):
        return [_masked(each) for each in value]
    if not isinstance(value, dict):
        return value
    masked: dict[str, Any] = {}
    for name, each in value.items():
        name, each = mask_text(name), _masked(each)
        masked[name] = masked[name] + each if isinstance(each, int) and name in masked else each
    return masked


def _size(count: int) -> str:
    """Bytes: 512 B, 3.5 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,} B"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m cleaning.report DIR")
    try:
        print(write_report(Path(sys.argv[1])))
    except (ValueError, OSError) as failure:
        sys.exit(f"error: {failure}")
