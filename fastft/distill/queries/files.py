"""Read queries: any file that `fastft.common.records` reads, CSV, TSV, a directory or a name on the Hub, with usual field names.

A row holds the text under `query`, `question`, `inputs`, `prompt`, `instruction` (with `input`) or `text`, or as the first user
message of `messages`. Optional are id, collection, task, gold (FLAN: targets), options, multiple_choice, system, and marks of
few-shot rows. A missing id is made of the text, so that it is the same whenever and wherever the file is read.
"""

import csv
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from fastft.common.records import RawRecord, read_raw, repair_text, to_json
from fastft.distill.settings import QuerySource
from fastft.errors import UserError, first_line
from fastft.judge.exams.options import label_and_text, options_in

TEXTS = ("query", "question", "inputs", "prompt", "instruction", "text")
GOLDS = ("gold", "targets", "target", "answer", "reference")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
FLAN = {"P3": "t0", "T0": "t0", "Flan2021": "flan2021", "NIv2": "niv2", "CoT": "cot", "Dialog": "dialogue"}
"""What FLAN's own files call the collections of Orca's table 3."""


@dataclass(frozen=True, slots=True)
class Query:
    """A query as a teacher is asked it. `gold` is "" if there is none; `options` are empty if it lists none."""

    id: str
    collection: str
    task: str
    text: str
    gold: str = ""
    options: tuple[str, ...] = ()
    multiple_choice: bool = False
    system: str | None = None
    """A system message that the row brings along; it is used as it is."""
    few_shot: bool = False


class NoQuery(Exception):
    """A record that is no query; the message is the reason that the ledger counts."""


def records_of(source: QuerySource) -> Iterator[RawRecord]:
    """Yield the records of a source, unparsed. Raises UserError if it cannot be read."""
    path = Path(source.path)
    if path.is_file() and path.suffix.lower() in DELIMITERS:
        yield from _table(path, DELIMITERS[path.suffix.lower()])
    elif path.is_file():
        yield from read_raw(path)
    elif path.is_dir() or source.path.count("/") == 1:
        yield from _dataset(source.path)
    else:
        raise UserError(f"{source.path}: no such file of queries, and no name on the Hub (owner/name)")


def _table(path: Path, delimiter: str) -> Iterator[RawRecord]:
    """Yield the rows of a CSV or TSV file, whose first line names the columns. Raises UserError if it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter=delimiter)
            for number, row in enumerate(table, 1):
                yield RawRecord(f"{path.name}: row {number}", to_json({str(key): row[key] for key in row}), number)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({first_line(error)[:150]})") from None


def _dataset(name: str) -> Iterator[RawRecord]:
    """Yield the rows of the split `train` of a dataset on the Hub, or in a directory."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield RawRecord(f"{name}: row {number}", to_json(row), number)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{name}: cannot be read as a dataset ({first_line(error)[:150]})") from None


def file_stats(paths: Iterable[str]) -> list[tuple[str, int, int]]:
    """The (path, bytes, time of change) of files, and of all files in directories; nothing for what is not here."""
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    stats = [(str(path), os.stat(path)) for path in files if path.exists()]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def read_query(value: Any, source: QuerySource) -> Query:
    """Make a query of a parsed record. Raises NoQuery with the reason if it holds none."""
    row = {"query": value} if isinstance(value, str) else value
    if not isinstance(row, dict):
        raise NoQuery("not an object")
    text, system = _text(row)
    if not text.strip():
        raise NoQuery("without a query")
    collection = str(row.get("collection") or row.get("_task_source") or source.collection or Path(source.path).stem)
    task = str(row.get("task") or row.get("_task_name") or collection)
    template = str(row.get("template_type") or row.get("_template_type") or "")
    text, options = _with_options(text, row)
    chosen = row.get("multiple_choice")
    return Query(
        id=_id(row, collection, task, text),
        collection=repair_text(FLAN.get(collection, collection)),
        task=repair_text(task),
        text=text,
        gold=_gold(row),
        options=options,
        multiple_choice=chosen if isinstance(chosen, bool) else bool(options) or template.endswith("_opt"),
        system=system,
        few_shot=bool(row.get("few_shot") or row.get("shots")) or template.startswith("fs"),
    )


def _with_options(text: str, row: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The query and its options. Those of a column that the query does not show are added to it: a teacher must see them."""
    given = row.get("options") or row.get("choices")
    given = given.get("text") if isinstance(given, dict) else given
    options = [repair_text(str(each)).strip() for each in given] if isinstance(given, list) else []
    if not 2 <= len(options) <= len(ascii_uppercase) or all(each in text for each in options):
        return text, tuple(options or options_in(text))
    if not all(label_and_text(each)[0] for each in options):
        options = [f"({letter}) {each}" for letter, each in zip(ascii_uppercase, options)]
    return "\n".join([text, "Options:", *options]), tuple(options)


def _text(row: dict[str, Any]) -> tuple[str, str | None]:
    """The text of the query, "" if there is none, and the system message that comes with it."""
    system = row.get("system") if isinstance(row.get("system"), str) else row.get("system_prompt")
    system = repair_text(system) if isinstance(system, str) else None
    text = next((row[name] for name in TEXTS if isinstance(row.get(name), str) and row[name].strip()), None)
    if text is not None:
        more = row.get("input") if text is row.get("instruction") else None
        return repair_text(f"{text}\n\n{more}" if isinstance(more, str) and more.strip() else text), system
    turns = row.get("messages") or row.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, dict):
            break
        role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")
        if not isinstance(content, str):
            break
        if role in ("system", "developer"):
            system = repair_text(content)
        elif role in ("user", "human"):
            return repair_text(content), system
    return "", system


def _gold(row: dict[str, Any]) -> str:
    found = next((row[name] for name in GOLDS if row.get(name) not in (None, "", [])), "")
    found = found[0] if isinstance(found, list) else found
    return repair_text(str(found)).strip() if isinstance(found, (str, int, float)) else ""


def _id(row: dict[str, Any], collection: str, task: str, text: str) -> str:
    if row.get("id") not in (None, ""):
        return repair_text(str(row["id"]))
    return "q-" + hashlib.blake2b(f"{collection}\0{task}\0{text}".encode(), digest_size=10).hexdigest()
