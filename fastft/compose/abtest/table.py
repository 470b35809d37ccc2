"""Reads a CSV file or JSON Lines as columns, and knows the line of each row, so that an error can name it.

    table = read_table(Path("visits.csv.gz"), {"user": None, "arm": "version", "amount": None})
    table.columns["user"], table.line(3)

A column is found by the name that an option gives for it, or else by one of its usual names.
"""

import csv
import difflib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastft.common.records import CHUNK, open_unpacked, read_records, read_unpacked
from fastft.errors import UserError

NAMES = {
    "user": ("user", "userid", "user_id", "unit"),
    "arm": ("arm", "version", "group", "variant", "variation"),
    "time": ("time", "timestamp", "at", "date", "datetime"),
    "day": ("day",),
    "amount": ("amount", "seconds", "turns", "rounds", "sum_gamerounds", "minutes"),
    "followed": ("followed",),
    "experiment": ("experiment",),
    "exposed": ("exposed",),
    "outcome": ("outcome",),
    "share": ("share",),
    "id": ("id",),
}
"""The usual names of each column."""
FOREIGN = {
    b"PAR1": "a Parquet file; write it as CSV first: pandas.read_parquet(…).to_csv(…, index=False)",
    b"PK\x03\x04": "a zip archive or an Excel file; unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel file; save the sheet as CSV",
    b"\xfd7zXZ": "packed with xz; unpack it with unxz, or pack it with gzip or zstd",
    b"BZh": "packed with bzip2; unpack it with bunzip2, or pack it with gzip or zstd",
    b"\xff\xfe": "UTF-16; convert it first: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it first: iconv -f UTF-16 -t UTF-8",
}
"""What files of other kinds begin with, and what to do with them."""
RETENTION = re.compile(r"retention_(\d{1,4})", re.ASCII)
"""Columns of a file with one row a user: whether the user was active on this day after joining."""


@dataclass
class ColumnTable:
    """Rows of a file as columns. R rows."""

    path: Path
    columns: dict[str, list[Any]]
    """By our name (a key of NAMES) or, for retention columns, by the file's in lower case. Values are texts in CSV."""
    named: dict[str, str]
    """Our name of a column -> the file's."""
    lines: list[int]
    header: list[str]
    """All columns of the file."""

    @property
    def rows(self) -> int:
        return len(self.lines)

    def need(self, name: str, what: str) -> None:
        """Raise UserError if the file has no such column; `what` says what it is for."""
        if name not in self.columns:
            usual = ", ".join(NAMES[name])
            raise UserError(
                f"{self.path}: no column names {what} (usual names: {usual}); its columns are {', '.join(self.header)}: "
                f"give --{name} COLUMN"
            )

    def wrong(self, row: int, what: str) -> UserError:
        """The error about a row, which names the file and the line."""
        short = what if len(what) <= 400 else f"{what[:200]} … {what[-200:]}"  # a cell may be endless
        return UserError(f"{self.path}: line {self.lines[row]}: {short}")

    def keep(self, chosen_R: np.ndarray) -> "ColumnTable":
        """The table with these rows only, in this order."""
        columns = {name: [values[i] for i in chosen_R] for name, values in self.columns.items()}
        return ColumnTable(self.path, columns, self.named, [self.lines[i] for i in chosen_R], self.header)

    def numbers(self, name: str) -> np.ndarray:
        """A column as float64 [R]. Raises UserError for a value that is no finite number."""
        values = self.columns[name]
        try:
            numbers_R = np.array(values, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            numbers_R = np.array([number(value) for value in values])
        if (bad := ~np.isfinite(numbers_R)).any():
            row = int(bad.argmax())
            said = "is empty" if values[row] in ("", None) else f"{values[row]!r} is not a number"
            raise self.wrong(row, f"{self.named[name]} {said}")
        return numbers_R


def number(value: Any) -> float:
    """A value as a number; NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def read_table(path: Path, asked: Mapping[str, str | None]) -> ColumnTable:
    """Read the columns that `asked` names (our name -> the file's name, None for the usual ones), if the file has them.

    Raises UserError for a file that does not exist, is empty or cannot be parsed, and for a column that was asked for by a
    name which the file does not have.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open_unpacked(path) as stream:
        head = read_unpacked(stream, 64, path)
    for magic, what in FOREIGN.items():
        if head.startswith(magic):
            raise UserError(f"{path}: is {what}")
    if not (head := head.lstrip(b"\xef\xbb\xbf \t\r\n")):
        raise UserError(f"{path}: the file is empty")
    table = _read_json(path, asked) if head[:1] in b"{[" else _read_csv(path, asked)
    if not table.rows:
        raise UserError(f"{path}: the file has no rows")
    return table


def _columns(path: Path, header: list[str], asked: Mapping[str, str | None]) -> dict[str, str]:
    """Our name of each column that is wanted and there -> the file's name."""
    lower = {name.strip().lower(): name for name in reversed(header)}
    named = {}
    for ours, name in asked.items():
        if name is not None and name not in header:
            raise UserError(f"{path}: there is no column {name!r}{nearest(name, header)}")
        found = name or next((lower[usual] for usual in NAMES[ours] if usual in lower), None)
        if found is not None:
            named[ours] = found
    return named | {name: lower[name] for name in lower if RETENTION.fullmatch(name)}


def nearest(name: str, names: list[str]) -> str:
    """ "; did you mean NAME?" with the nearest of `names`."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"; did you mean {near[0]!r}?" if near else ""


def _read_csv(path: Path, asked: Mapping[str, str | None]) -> ColumnTable:
    content = _content(path)
    try:
        text = io.StringIO(content.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}: line {line}: the file is not UTF-8 text; convert it: iconv -f WINDOWS-1252 -t UTF-8"
        ) from None
    if b"\0" in content[:4096]:
        raise UserError(f"{path}: is a binary file or UTF-16; write it as CSV in UTF-8")
    first = text.readline()
    if first.startswith("#") or first.lower().startswith("sep="):
        raise UserError(
            f"{path}: line 1 is {first.strip()[:60]!r}; delete it: the first line has the names of the columns"
        )
    separator = max(",;\t", key=first.count)
    header = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
    if repeated := {name for name in header if header.count(name) > 1}:
        raise UserError(f"{path}: line 1: two columns are named {min(repeated)!r}")
    named = _columns(path, header, asked)
    reader, rows, lines, line = csv.reader(text, delimiter=separator, strict=True), [], [], 2
    try:
        for row in reader:
            if len(row) == len(header):
                rows.append(row)
                lines.append(line)
            elif row:
                raise UserError(f"{path}: line {line}: {len(row)} values, but the header has {len(header)} columns")
            line = reader.line_num + 2
    except csv.Error as error:
        why = "a quote is opened and never closed" if "end of data" in str(error) else str(error)
        raise UserError(f"{path}: line {line}: {why}") from None
    places = {ours: header.index(name) for ours, name in named.items()}
    columns = {ours: [row[place].strip() for row in rows] for ours, place in places.items()}
    return ColumnTable(path, columns, named, lines, list(header))


def _content(path: Path) -> bytes:
    with open_unpacked(path) as stream:
        return b"".join(iter(lambda: read_unpacked(stream, CHUNK, path), b""))


def _read_json(path: Path, asked: Mapping[str, str | None]) -> ColumnTable:
    usual = {*(name for names in NAMES.values() for name in names), *filter(None, asked.values())}

    def wanted(key: str) -> bool:
        return key in usual or key.lower() in usual or RETENTION.fullmatch(key.lower()) is not None

    records, lines, header = [], [], {}
    for record in read_records(path):
        line = int(record.where.rsplit(" ", 1)[-1])
        if record.error or not isinstance(record.value, dict):
            raise UserError(f"{path}: line {line}: {record.error or 'not a JSON object'}")
        header |= dict.fromkeys(record.value)
        # The events of a record hold whole conversations; only what may be a column is kept.
        records.append({key: value for key, value in record.value.items() if wanted(key)})
        lines.append(line)
    named = _columns(path, list(header), asked)
    columns = {ours: [record.get(name) for record in records] for ours, name in named.items()}
    table = ColumnTable(path, columns, named, lines, list(header))
    for ours, values in columns.items():
        for row, value in enumerate(values):
            if isinstance(value, dict | list):
                kind = "an object" if isinstance(value, dict) else "a list"
                raise table.wrong(row, f"{named[ours]} is {kind}; it must be one value")
    return table
