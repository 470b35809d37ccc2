"""Reads JSON records from files, one at a time: JSON arrays, JSON Lines, single objects, each also as .gz or .zst; Parquet.

The cleaner reads raw dumps with `read_records`, the trainer conversations. Memory grows with the largest record, not with the
file. A record that cannot be parsed is yielded with the reason and its text, so that the caller can count it, keep it, or
stop. `read_raw` yields records unparsed, for callers that parse them in worker processes (`parsed`).
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
    """A record of a file. A broken one has the reason in `error`, and at most the first MiB of its text in `raw`."""

    where: str  # "dump.json: record 12", "dump.jsonl: line 7"
    value: Any
    end: int  # bytes of the uncompressed file that were read so far, for progress bars
    error: str | None = None
    raw: str | None = None


@dataclass(slots=True)
class RawRecord:
    """A record that is not parsed yet. With an `error`, `text` is at most its first MiB.

    An error with an empty text is about the file, which was cut short between two records.
    """

    where: str
    text: bytes  # JSON
    end: int
    error: str | None = None


def read_records(path: str | os.PathLike) -> Iterator[Record]:
    """Yield every record of `path` in file order. Raises UserError as `read_raw` does."""
    return map(parsed, read_raw(path))


def parsed(record: RawRecord) -> Record:
    """Parse a record. One that is not JSON becomes a broken one."""
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

    Raises UserError if the file is missing, a directory, empty, not text, or a damaged archive.
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
    """Join surrogate pairs, and replace lone surrogates by U+FFFD, because neither UTF-8 nor a tokenizer can represent them."""
    if text.isascii():  # free: Python stores this as a flag of the string
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse_json(text: bytes) -> Any:
    """Parse JSON with orjson, or with the standard library if orjson refuses it (NaN, lone surrogates).

    Raises ValueError with the reason and the position, and UnicodeDecodeError for bytes that are not UTF-8.
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
    """Write a value that `parse_json` returned, or a row of a table, as one line of JSON.

    Lone surrogates become escapes, NaN becomes null, and dates, decimals and bytes become text. Raises RecursionError if the
    value is nested too deeply.
    """
    try:
        return orjson.dumps(value, default=str)
    except TypeError:
        text = json.dumps(value, default=str)
        if "NaN" in text or "Infinity" in text:
            text = json.dumps(json.loads(text, parse_constant=lambda name: None))
        return text.encode()


def packing_of(path: Path) -> str:
    """Tell a file's format by its first bytes, or else by its name: ".gz", ".zst", ".parquet" or "" for plain text."""
    with path.open("rb") as stream:
        head = stream.read(4)
    named = path.suffix.lower() if path.suffix.lower() in _MAGIC.values() else ""
    return next((packing for magic, packing in _MAGIC.items() if head.startswith(magic)), named)


def open_unpacked(path: Path) -> BinaryIO:
    """Open a file for reading; an archive is unpacked."""
    packing = packing_of(path)
    if packing == ".gz":
        return gzip.open(path, "rb")
    return _ZstdReader(path) if packing == ".zst" else path.open("rb")


class _ZstdReader:
    """Reads a .zst file of one or more frames. zstandard's own reader does not notice that a file was cut short."""

    def __init__(self, path: Path):
        import zstandard

        self.file, self.zstandard = path.open("rb"), zstandard
        self.frame = None  # the decompressor of the frame that is being read

    def __enter__(self) -> "_ZstdReader":
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()

    def read(self, size: int) -> bytes:
        """Return about `size` bytes, or b"" at the end. Raises EOFError if the archive is damaged."""
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
    """Read from a stream of `open_unpacked`. Raises UserError if the archive is damaged; errors of the disk pass through."""
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


class _Buffer:
    """The part of a file's text that is in memory. The next record begins at the position `at`."""

    def __init__(self, path: Path, stream: BinaryIO, head: bytes):
        self.path, self.stream, self.read_bytes, self.ended = path, stream, len(head), False
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at = self.decoder.decode(head), 0
        # After a broken record, the next one is found by its first key: the records of a dump all begin with the same key, and
        # the objects inside them with another. "},{" alone would also match between the turns of one record.
        while (key := _FIRST_KEY.match(self.text)) is None and len(self.text) < 4096 and self.grow():
            pass
        self.next_element = re.compile(r",\s*(?=\{\s*" + (re.escape(key[1]) + r"\s*:" if key else "") + ")")

    def grow(self) -> bool:
        """Drop what comes before `at`, and read as much as is left, at least CHUNK. Returns False at the end of the file.

        The buffer doubles while one record fills it, so that a record of n characters costs O(n), not O(n^2).
        """
        chunk = read_unpacked(self.stream, max(CHUNK, len(self.text) - self.at), self.path)
        self.ended, self.read_bytes = not chunk, self.read_bytes + len(chunk)
        self.text, self.at = self.text[self.at :] + self.decoder.decode(chunk, final=self.ended), 0
        return not self.ended

    def skip(self, pattern: re.Pattern) -> str:
        """Move `at` past what matches `pattern`, and return the character there, or "" at the end of the file."""
        while True:
            self.at = pattern.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def stop(self) -> tuple[int, str | None]:
        """Return (the end of the record at `at`, None), or (the position to continue at, the error) if the record is
        broken."""
        while True:
            try:
                _, stop = _raw_decode(self.text, self.at)  # 280 MB/s; no other way of finding the end was faster
                if stop < len(self.text) or not self.grow():  # a number may continue in the next chunk
                    return stop, None
            except RecursionError:
                return self.resume(), "nested too deeply"
            except json.JSONDecodeError as error:
                # Near the end of the buffer, the rest of the record may not have been read yet.
                cut = error.pos >= len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if not (cut and self.grow()):
                    return self.resume(), f"not JSON: {error.msg}"
            except ValueError:
                return self.resume(), f"not JSON: {TOO_LONG_A_NUMBER}"

    def resume(self) -> int:
        """Return where the record after a broken one begins, or the end of the file if there is none."""
        searched = self.at + 1
        while (found := self.next_element.search(self.text, searched)) is None:
            searched = max(len(self.text) - self.at - 1024, 1)  # a position in the next buffer, which begins at `at`
            if not self.grow():
                return len(self.text)
        return found.end()


def _array(path: Path, stream: BinaryIO, head: bytes) -> Iterator[RawRecord]:
    """Yield the elements of one or several JSON arrays (`cat a.json b.json`), or JSON values one after the other."""
    buffer, in_array, number = _Buffer(path, stream, head), False, 0
    while following := buffer.skip(_BETWEEN_ELEMENTS):
        if following == "]" or (following == "[" and not in_array):
            in_array, buffer.at = following == "[", buffer.at + 1
            continue
        number += 1
        stop, error = buffer.stop()
        text = buffer.text[buffer.at : stop if error is None else min(stop, buffer.at + RAW_LIMIT)]
        buffer.at = stop
        yield RawRecord(
            f"{path.name}: record {number}", text.encode(errors="surrogateescape"), buffer.read_bytes, error
        )
    if in_array:
        error = "the file ends inside its array: it was cut short"
        yield RawRecord(f"{path.name}: end of file", b"", buffer.read_bytes, error)


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
