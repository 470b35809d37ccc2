"""Open what the command line names as input: files, saved pages, standard input (`-`), datasets on the Hub.

    with open_inputs(["dump.json.gz", "page.html", "-", "allenai/WildChat-1M"]) as inputs:
        for record in inputs[0].records(): …

An input can be read more than once: standard input is first written to a temporary file, and a dataset on the Hub is
streamed again.
"""

import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from fastft.common.records import RAW_LIMIT, RawRecord, open_unpacked, packing_of, read_raw, read_unpacked, to_json
from fastft.errors import UserError, is_ours

_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_FILE_ENDINGS = (".json", ".jsonl", ".ndjson", ".gz", ".zst", ".parquet", ".html", ".htm", ".txt")


@dataclass(frozen=True)
class Input:
    """One input of a run."""

    name: str  # what the ledger calls it
    path: Path | None  # the file that is read; None for a dataset on the Hub
    records: Callable[[], Iterator[RawRecord]]
    content: str = ""  # only for standard input, which each run copies to a new file: a digest of the content

    @property
    def size(self) -> int:
        """Bytes on disk; 0 if there is no file."""
        return self.path.stat().st_size if self.path else 0

    def identity(self) -> list:
        """Return values that change when the input does: its path, size and time, or a digest of its content."""
        if self.content or self.path is None:
            return [self.name, self.content]
        status = self.path.stat()
        return [str(self.path.resolve()), status.st_size, status.st_mtime_ns]

    @property
    def place(self) -> str | None:
        """Where the input can be found again: a path, or a name on the Hub; None for standard input."""
        if self.content:
            return None
        return str(self.path.absolute()) if self.path else self.name

    @property
    def packed(self) -> bool:
        """Whether `Record.end` counts something other than the `size` bytes on disk: unpacked bytes, or rows."""
        return self.path is None or packing_of(self.path) != ""


@contextmanager
def open_inputs(names: Sequence[str | os.PathLike]) -> Iterator[list[Input]]:
    """Open the inputs. Raises UserError for one that is missing, empty or holds no records, before any work is done."""
    with tempfile.TemporaryDirectory(prefix="cleaning-") as spool:
        inputs = [_open(str(name), Path(spool)) for name in names]
        for each in inputs:
            next(each.records(), None)
        yield inputs


def _open(name: str, spool: Path) -> Input:
    if name == "-":
        path = _spool_stdin(spool)
        content = hashlib.blake2b()
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                content.update(chunk)
        return Input("stdin", path, lambda: _file_records(path, "standard input"), content.hexdigest())
    path = Path(name)
    is_file = path.exists() or path.parent.is_dir() or name.lower().endswith(_FILE_ENDINGS)
    if not is_file and _HUB_NAME.fullmatch(name):
        return Input(name, None, lambda: _hub_records(name))
    return Input(path.name, path, lambda: _file_records(path))


def _spool_stdin(spool: Path) -> Path:
    """Copy standard input to a file in the directory `spool`."""
    path = spool / "stdin"
    if path.exists():
        raise UserError("-: standard input can be read once only; name it once")
    with path.open("wb") as out:
        shutil.copyfileobj(sys.stdin.buffer, out, 1 << 20)
    return path


def _file_records(path: Path, called: str | None = None) -> Iterator[RawRecord]:
    """Yield the records of a file.

    `called` is the file's name in messages, for a temporary file whose own name means nothing.
    """
    try:
        yield from _page(path) if _is_page(path) else read_raw(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), called or str(path))) from None
    except OSError as error:  # the error of a failing disk names no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _is_page(path: Path) -> bool:
    if not path.is_file() or packing_of(path) == ".parquet":
        return False
    with open_unpacked(path) as stream:
        return read_unpacked(stream, 4096, path).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<"


def _page(path: Path) -> Iterator[RawRecord]:
    """Yield the one record of a saved page, which is its text."""
    with open_unpacked(path) as stream:
        data = b"".join(iter(lambda: read_unpacked(stream, 1 << 20, path), b""))
    try:
        yield RawRecord(path.name, orjson.dumps(data.decode("utf-8-sig")), len(data))
    except UnicodeDecodeError:
        yield RawRecord(path.name, data[:RAW_LIMIT], len(data), "holds bytes that are not UTF-8")


def _hub_records(name: str) -> Iterator[RawRecord]:
    """Yield the rows of a dataset's `train` split, or of its first split. Raises UserError for any failure of the Hub."""
    rows, number = _hub_rows(name), 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # noqa: BLE001  the Hub's clients raise dozens of kinds: network, permissions, formats
            if is_ours(error):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            at_first = "no such file, and the Hub gave no such dataset"
            what = f"the Hub failed after {number:,} rows" if number else at_first
            raise UserError(f"{name}: {what} ({reason})") from None
        if row is None:
            return
        number += 1
        yield RawRecord(f"{name}: row {number}", to_json(row), number)


def _hub_rows(name: str) -> Iterator[dict]:
    import datasets
    from huggingface_hub import HfApi

    # Ask first whether the dataset exists: `datasets` tries for up to a minute to reach a Hub that cannot be reached, and
    # prints a line for each try.
    HfApi().dataset_info(name, timeout=10)
    splits = datasets.load_dataset(name, streaming=True)
    yield from splits["train" if "train" in splits else next(iter(splits))]
