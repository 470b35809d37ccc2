"""Read JSON records from files, one at a time, whatever the container; a broken record is yielded as one, with the reason.

The cleaner reads raw dumps and the trainer reads conversations with `read_records`. It streams: memory grows with the
largest record, not with the file. What cannot be parsed is yielded with the reason and the raw text, so that the caller can
count it, keep it, or stop. `read_raw` yields the records unparsed, for a caller that parses them elsewhere (in worker
processes) with `parsed`.

Containers: a JSON array, JSON Lines, one JSON object, each also as `.gz` or `.zst`; Parquet (rows as dictionaries).
"""

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from fastft.errors import UserError

CHUNK = 1 << 22  # bytes read at a time: 4 MiB keeps the array scanner within 10 % of json.loads on whole files
RAW_LIMIT = 1 << 20  # characters of a broken record that are kept with it
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
TOO_LONG_A_NUMBER = "a number of more than 4,300 digits"  # Python's limit: longer ones take quadratic time


@dataclass(slots=True)
class Record:
    """One record of a file. `error` is None for a good one; only a broken one has `raw`, at most 1 MiB of its text."""

    where: str  # "dump.json: record 12", "dump.jsonl: line 7"
    value: Any
    end: int  # bytes of the uncompressed file read so far, for progress
    error: str | None = None
    raw: str | None = None


@dataclass(slots=True)
class RawRecord:
    """A record as its file has it. If `error` says that it is broken, `text` is its first MiB.

    An error without text is about the file: it was cut short between two records.
    """

    where: str
    text: bytes  # JSON
    end: int
    error: str | None = None


def read_records(path: str | os.PathLike) -> Iterator[Record]:
    """Yield every record of `path` in file order. Raises UserError as `read_raw` does."""
    return map(parsed, read_raw(path))


def parsed(record: RawRecord) -> Record:
    """Return the record with its value; one that is not JSON becomes a broken one."""
    error = record.error
    if error is None:
        try:
            return Record(record.where, parse_json(record.text), record.end)
        except UnicodeDecodeError:
            error = "holds bytes that are not UTF-8"
        except ValueError as failure:
            error = f"not JSON: {failure}"
    return Record(record.where, None, record.end, error, record.text.decode(errors="replace")[:RAW_LIMIT])


def read_raw(path: str | os.PathLike) -> Iterator[RawRecord]:
    """Yield every record of `path` in file order, unparsed.

    Raises UserError, naming the file and what to do, if it is missing, a directory, empty, not text or a damaged archive.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name the files in it, for example {path}/*.jsonl")
    if not path.is_file():
        raise UserError(f"{path}: is not a regular file; save what comes out of it first")
    if packing_of(path) == ".parquet":
        yield from _parquet_rows(path)
        return
    with open_unpacked(path) as stream:
        head = read_unpacked(stream, CHUNK, path)
        if not head.strip():
            raise UserError(f"{path}: is empty")
        if head[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE) or b"\0" * 3 in (head[:3], head[1:4]):
            utf8 = f"{path.stem}.utf8{path.suffix}"
            raise UserError(f"{path}: is UTF-32; convert it first: iconv -f UTF-32 -t UTF-8 {path} > {utf8}")
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" * 3 in (head[:6:2], head[1:6:2]):
            utf8 = f"{path.stem}.utf8{path.suffix}"
            raise UserError(f"{path}: is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8 {path} > {utf8}")
        if b"\0" in head[:4096]:
            raise UserError(f"{path}: is a binary file; expected JSON, JSON Lines or Parquet")
        head = head.removeprefix(b"\xef\xbb\xbf")
        first_line = head.lstrip().split(b"\n", 1)[0].strip()
        if first_line[:1] == b"[" or first_line == b"{":
            yield from _array(path, stream, head)
        else:
            yield from _lines(path, stream, head)


def repair_text(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates by U+FFFD: no tokenizer and no UTF-8 file can hold them."""
    if text.isascii():  # Python keeps this as a flag of the string
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse_json(text: bytes) -> Any:
    """Parse JSON with orjson, and what orjson refuses (NaN, lone surrogates) with the standard library.

    Raises ValueError with the reason and the position, UnicodeDecodeError for bytes that are not UTF-8.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:  # Python's own message names a setting of the interpreter
        raise ValueError(TOO_LONG_A_NUMBER) from None


def to_json(value: Any) -> bytes:
    """Write anything that `parse_json` returns, or a row of a table, as one line of JSON.

    Lone surrogates stay as escapes, NaN becomes null, dates, decimals and bytes become text. Raises RecursionError for
    what is nested too deeply.
    """
    try:
        return orjson.dumps(value, default=str)
    except TypeError:
        text = json.dumps(value, default=str)
        if "NaN" in text or "Infinity" in text:
            text = json.dumps(json.loads(text, parse_constant=lambda name: None))
        return text.encode()


def packing_of(path: Path) -> str:
    """Return ".gz", ".zst", ".parquet" or "", by the first bytes of the file, or by its name if the bytes say nothing."""
    with path.open("rb") as stream:
        head = stream.read(4)
    named = path.suffix.lower() if path.suffix.lower() in _MAGIC.values() else ""
    return next((packing for magic, packing in _MAGIC.items() if head.startswith(magic)), named)


def open_unpacked(path: Path) -> BinaryIO:
    """Open a file for reading the bytes that are in its archive, if it is one."""
    packing = packing_of(path)
    if packing == ".gz":
        return gzip.open(path, "rb")
    return _ZstdReader(path) if packing == ".zst" else path.open("rb")


class _ZstdReader:
    """Reads a .zst file of one or more frames. (zstandard's own reader takes a file that was cut short for a whole one.)"""

    def __init__(self, path: Path):
        import zstandard

        self.file, self.zstandard = path.open("rb"), zstandard
        self.frame = None  # the decompressor of a frame whose end has not been read yet

    def __enter__(self) -> "_ZstdReader":
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()

    def read(self, size: int) -> bytes:
        """Return about `size` bytes, at least one, or b"" at the end. Raises EOFError if the archive is damaged."""
        pieces, held = [], 0
        while held < size:
            compressed = self.file.read(1 << 16)
            if not compressed:
                if self.frame is not None:
                    raise EOFError("the last frame is not finished")
                break
            while compressed:
                self.frame = self.frame or self.zstandard.ZstdDecompressor().decompressobj()
                try:
                    pieces.append(self.frame.decompress(compressed))
                except self.zstandard.ZstdError as error:
                    raise EOFError(str(error)) from None
                held += len(pieces[-1])
                compressed = self.frame.unused_data if self.frame.eof else b""
                if self.frame.eof:
                    self.frame = None
        return b"".join(pieces)


def read_unpacked(stream: BinaryIO, size: int, path: Path) -> bytes:
    """Read from a stream of `open_unpacked`. Raises UserError if the archive, rather than the disk, is damaged."""
    try:
        return stream.read(size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: the archive is damaged or cut short ({error})") from None


def _lines(path: Path, stream: BinaryIO, pending: bytes) -> Iterator[RawRecord]:
    number, end, chunk = 0, 0, pending
    while chunk:
        chunk = read_unpacked(stream, CHUNK, path)
        lines = (pending + chunk).split(b"\n")
        pending = lines.pop() if chunk else b""
        for line in lines:
            number += 1
            end += len(line) + 1
            if line.strip():
                yield RawRecord(f"{path.name}: line {number}", line, end)


_BETWEEN_ELEMENTS = re.compile(r"[\s,\ufeff]*")  # `cat a.json b.json` leaves a byte order mark in the middle
_FIRST_KEY = re.compile(r'[\s\[,]*\{\s*("(?:[^"\\]|\\.)*")')
_raw_decode = json.JSONDecoder().raw_decode


class _Window:
    """The part of a text stream that is in memory; the next record begins at the position `at`."""

    def __init__(self, path: Path, stream: BinaryIO, head: bytes):
        self.path, self.stream, self.read_bytes, self.ended = path, stream, len(head), False
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at = self.decoder.decode(head), 0
        # The objects of a dump begin with the same key, and the objects inside them with another one. That is how the next
        # record is found after a broken one. ("},{" alone would also be found between the turns of one record.)
        while (key := _FIRST_KEY.match(self.text)) is None and len(self.text) < 4096 and self.grow():
            pass
        self.next_element = re.compile(r",\s*(?=\{\s*" + (re.escape(key[1]) + r"\s*:" if key else "") + ")")

    def grow(self) -> bool:
        """Drop what was read and double what is left, so that a record of n characters costs O(n), not O(n^2).

        Returns False at the end of the stream.
        """
        chunk = read_unpacked(self.stream, max(CHUNK, len(self.text) - self.at), self.path)
        self.ended, self.read_bytes = not chunk, self.read_bytes + len(chunk)
        self.text, self.at = self.text[self.at :] + self.decoder.decode(chunk, final=self.ended), 0
        return not self.ended

    def skip(self, pattern: re.Pattern) -> str:
        """Move past what matches `pattern`; return the character that follows, or "" at the end of the file."""
        while True:
            self.at = pattern.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def stop(self) -> tuple[int, str | None]:
        """Return where the record at `at` stops and None, or where to go on after a broken one and what is wrong with it."""
        while True:
            try:
                _, stop = _raw_decode(self.text, self.at)  # 280 MB/s; no other way of finding the end was faster
                if stop < len(self.text) or not self.grow():  # a number may go on in the next chunk
                    return stop, None
            except RecursionError:
                return self.resume(), "nested too deeply"
            except json.JSONDecodeError as error:
                # Near the end of the window the only fault may be that the rest of the record has not been read yet.
                cut = error.pos >= len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if not (cut and self.grow()):
                    return self.resume(), f"not JSON: {error.msg}"
            except ValueError:
                return self.resume(), f"not JSON: {TOO_LONG_A_NUMBER}"

    def resume(self) -> int:
        """Return where the element after a broken one begins, or the end of the file if there is none."""
        searched = self.at + 1
        while (found := self.next_element.search(self.text, searched)) is None:
            searched = max(len(self.text) - self.at - 1024, 1)  # of what the next window keeps
            if not self.grow():
                return len(self.text)
        return found.end()


def _array(path: Path, stream: BinaryIO, head: bytes) -> Iterator[RawRecord]:
    """Yield the elements of one or several JSON arrays, or JSON values that follow each other."""
    window, in_array, number = _Window(path, stream, head), False, 0
    while following := window.skip(_BETWEEN_ELEMENTS):
        if following == "]" or (following == "[" and not in_array):  # several arrays: cat a.json b.json
            in_array, window.at = following == "[", window.at + 1
            continue
        number += 1
        stop, error = window.stop()
        text = window.text[window.at : stop if error is None else min(stop, window.at + RAW_LIMIT)]
        window.at = stop
        yield RawRecord(
            f"{path.name}: record {number}", text.encode(errors="surrogateescape"), window.read_bytes, error
        )
    if in_array:
        error = "the file ends inside its array: it was cut short"
        yield RawRecord(f"{path.name}: end of file", b"", window.read_bytes, error)


def _parquet_rows(path: Path) -> Iterator[RawRecord]:
    number = 0
    for batch in _parquet_batches(path):
        for row in batch:
            number += 1
            yield RawRecord(f"{path.name}: row {number}", to_json(row), number)


def _parquet_batches(path: Path) -> Iterator[list[dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            yield batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: is not a readable Parquet file ({reason})") from None
