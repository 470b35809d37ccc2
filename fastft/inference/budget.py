"""Keep account of money: prices, a limit that holds with many requests in flight, and a cache of replies that were paid for.

money = Money(limit=5.0)
await money.reserve(0.02)          # raises OverBudget if the request could exceed the limit
money.settle(0.02, 0.013)          # what it cost in the end

cache = Cache(Path("judged/cache.jsonl"))
cache.put(key, reply); cache.get(key)
"""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache as once
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

import orjson

from fastft.common.files import FULL, FullDiskError, lack_of_room
from fastft.common.records import parse_json, repair_text
from fastft.errors import UserError
from fastft.inference.completion import Malformed, Reply, text_of

logger = logging.getLogger(__name__)
ROOM = 1 << 18  # bytes of disk that the cache reserves at a time
PAUSE = b'{"pause"'  # begins a row that is no reply
KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of Linux: reserved room is not part of the file
Price = tuple[float, float]
"""Dollars for a million tokens of the prompt, and for a million of the reply."""
FREE: Price = (0.0, 0.0)


def read_prices(texts: Sequence[str], number: int) -> list[Price]:
    """Return a price for each of `number` endpoints from texts "IN,OUT": no text (free), one for all endpoints, or one for
    each.

    Raises UserError for texts that are no prices, or for another number of them.
    """
    try:
        prices = [tuple(float(part) for part in text.split(",")) for text in texts]
    except ValueError:
        prices = [()]
    valid = all(len(price) == 2 and all(0 <= usd < math.inf for usd in price) for price in prices)
    if not valid or len(prices) not in (0, 1, number):
        raise UserError("--usd_per_million must be IN,OUT in dollars, given once, or once for each endpoint")
    return prices * number if len(prices) == 1 else prices or [FREE] * number


class OverBudget(Exception):
    """The next request could cost more than what is left, or spending has been stopped."""


class Money:
    """Count the dollars spent, and keep them below a limit while many requests are in flight."""

    def __init__(self, limit: float | None = None):
        """`limit` in dollars, None for no limit."""
        self.limit, self.spent, self._closed = limit, 0.0, False
        self.at_once = 0  # how many requests its clients want to see at a time; `run_all` prepares as many
        self.when_closed: list[Callable[[type[Exception]], None]] = []
        self._reserved, self._reserves = 0.0, 0
        self._waiting: deque[tuple[float, asyncio.Future]] = deque()

    async def reserve(self, usd: float) -> None:
        """Reserve `usd`, the most that a request can cost. Raises OverBudget if that is more than what is left.

        Most requests cost less than was reserved for them. If there is too little only because of what requests in flight have
        reserved, this waits until enough of them have ended.
        """
        if self._waiting or not self._try(usd):
            future = asyncio.get_running_loop().create_future()
            self._waiting.append((usd, future))
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled() and not future.exception():
                    self.settle(usd, 0.0)
                raise

    def commit(self, usd: float) -> None:
        """Reserve `usd` for a request that an earlier run has sent, whatever the limit says."""
        self._reserved, self._reserves = self._reserved + usd, self._reserves + 1

    def settle(self, reserved: float, usd: float) -> None:
        """Replace a reserve by what the request has cost."""
        self._reserves -= 1
        # Sums of floats drift, so that the last reserve could leave a billionth of a dollar that nobody has.
        self._reserved = self._reserved - reserved if self._reserves else 0.0
        self.spent += usd
        self._wake()

    @property
    def closed(self) -> bool:
        """Whether spending has been stopped."""
        return self._closed

    def close(self) -> None:
        """Stop spending: every later `reserve`, and whatever waits for money or for its turn, raises OverBudget."""
        self._closed = True
        self._wake()
        for each in self.when_closed:
            each(OverBudget)

    def _try(self, usd: float) -> bool:
        """Reserve `usd` if it is left. Raises OverBudget if no request in flight can change that it is not."""
        if self._closed:
            raise OverBudget
        if self.limit is not None and self.spent + self._reserved + usd > self.limit:
            if not self._reserves:
                raise OverBudget
            return False
        self.commit(usd)
        return True

    def _wake(self) -> None:
        """Let those go on, in order, for whom there is enough now."""
        while self._waiting:
            usd, future = self._waiting[0]
            if not future.done():
                try:
                    if not self._try(usd):
                        return
                    future.set_result(None)
                except OverBudget:
                    future.set_exception(OverBudget())
            self._waiting.popleft()


class Cache:
    """Replies by their exact request, in a file to which each is appended at once: a killed run loses none.

    Memory holds only where each reply is in the file: 200 bytes a reply.
    """

    def __init__(self, path: Path):
        """Read what earlier runs have left. The file is created by the first `put` or `open`."""
        self.path = path
        self.usd = 0.0  # what all replies have cost, over all runs
        self.models: dict[str, str] = {}  # by endpoint: the name of the model that gave its first reply
        self.pauses: dict[str, float] = {}  # by endpoint: until when it has asked to wait, in seconds since 1970
        self._places: dict[str, tuple[int, int]] = {}  # by key: where the row begins, and its length
        self._unwritten: dict[str, Reply] = {}  # for which the disk had no room
        self._file: FileIO | None = None
        self._writing, self._end, self._torn = False, 0, False
        self._reserved = self._promised = 0  # bytes of the file's room on the disk, and those of replies on the way
        self._said = False
        if path.is_file():
            self._file = FileIO(self.path)
            self._read()

    def _read(self) -> None:
        """Read the whole file, which stays open: to close it would give up the lock."""
        self._end, self._torn, self.usd = 0, False, 0.0
        self._places.clear()
        self._file.seek(0)
        reader = BufferedReader(self._file)
        for line in reader:
            if row := _read_row(line):
                self._note(row[0], row[1], self._end, len(line))
            elif line.startswith(PAUSE):
                self._read_pause(line)
            self._end += len(line)
            self._torn = not line.endswith(b"\n")
        reader.detach()

    def _read_pause(self, line: bytes) -> None:
        try:
            pause = parse_json(line)["pause"]
            self.pauses[pause["endpoint"]] = float(pause["until"])
        except (ValueError, KeyError, TypeError):  # cut by a kill
            pass

    def _note(self, key: str, reply: Reply, start: int, length: int) -> None:
        if key not in self._places:
            self.usd += reply.usd
        if reply.model:
            self.models.setdefault(reply.endpoint, reply.model)
        self._places[key] = (start, length)

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._unwritten

    def get(self, key: str) -> Reply | None:
        """Return the reply to this request, None if nobody has paid for one."""
        if key in self._unwritten:
            return replace(self._unwritten[key], cached=True)
        if key not in self._places:
            return None
        start, length = self._places[key]
        row = parse_json(os.pread(self._file.fileno(), length, start))
        reply = Reply(**{**row["reply"], "cached": True})
        return reply if type(reply.text) is str and reply.text.isascii() else replace(reply, text=text_of(reply.text))

    def open(self) -> None:
        """Create the file. Raises UserError if that is impossible, so that the failure shows before anything is paid for, and
        if another run writes to it.
        """
        if self._writing:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(self.path, "a+")
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES) and self._file:
                raise UserError(f"{self.path}: another run writes to it; wait until that has ended") from None
            raise UserError(f"{self.path}: cannot be written to ({error.strerror})") from None
        self._writing = True
        if os.fstat(self._file.fileno()).st_size != self._end:  # another run has paid for more before it ended
            self._read()

    def close(self) -> None:
        """Close the file, and give back what it has reserved of the disk."""
        if self._file:
            if self._writing and self._reserved > self._end:
                self._file.truncate(os.fstat(self._file.fileno()).st_size)
            self._file.close()
        self._file, self._writing, self._reserved = None, False, 0

    @contextlib.contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Reserve room on the disk for a reply of at most `size` bytes, as long as the block runs, before it is paid for.

        Raises FullDiskError if there is none.
        """
        self.open()
        if self._end + self._promised + size > self._reserved:
            wanted = self._end + self._promised + size + ROOM
            number = _reserve(self._file.fileno(), self._end, wanted - self._end)
            if number in FULL:
                raise FullDiskError(self._lack(), number)
            self._reserved = wanted
        self._promised += size
        try:
            yield
        finally:
            self._promised -= size

    def check(self) -> None:
        """Write what waits in memory. Raises FullDiskError if there is still no room for it."""
        if self._unwritten:
            self._write_unwritten()
        if self._unwritten:
            raise FullDiskError(self._lack(), FULL[0])

    def put(self, key: str, reply: Reply) -> None:
        """Append a reply. Where the disk has no room it stays in memory, until `put` or `check` find room for it."""
        self.open()
        self._unwritten[key] = reply
        self._write_unwritten()

    def put_pause(self, endpoint: str, until: float) -> None:
        """Remember that an endpoint has asked not to be asked before `until`, so that a run that is started again obeys, too."""
        later = until > self.pauses.get(endpoint, 0.0) + 0.1  # once for all requests that were on the way
        if later:
            self.pauses[endpoint] = until
            with contextlib.suppress(OSError):  # a full disk, of which the next reply tells
                line = b"\n" * self._torn + orjson.dumps({"pause": {"endpoint": endpoint, "until": until}}) + b"\n"
                written = self._file.write(line)
                self._end, self._torn = self._end + written, written < len(line) and (self._torn or written > 0)

    def _write_unwritten(self) -> None:
        for key, reply in list(self._unwritten.items()):
            row = {"key": key, "reply": {name: value for name, value in vars(reply).items() if name != "cached"}}
            line = b"\n" * self._torn + _to_line(row)
            try:
                written = self._file.write(line)
            except OSError as error:
                if error.errno not in FULL:
                    raise UserError(f"{self.path}: cannot be written to ({error.strerror})") from None
                written = 0
            start, self._end = self._end + self._torn, self._end + written
            self._torn = written < len(line) and (self._torn or written > 0)
            if written < len(line):  # the disk is full; the next try begins a line of its own
                if not self._said:
                    logger.error("%s", self._lack())
                self._said = True
                return
            self._note(key, reply, start, self._end - start)
            del self._unwritten[key]

    def _lack(self) -> str:
        lack, waiting = lack_of_room(FULL[0], self.path), len(self._unwritten)
        kept = f"{waiting} replies wait in memory" if waiting else "every reply is kept"
        return f"{self.path}: {lack}; {kept}; make room there and start the same command again"


@once
def _fallocate() -> Any:
    """Return fallocate of the C library, None where there is none (macOS)."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if function:
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return function


def _reserve(file: int, start: int, size: int) -> int:
    """Reserve room behind the end of a file. Returns the system's error number, 0 if all is well."""
    function = _fallocate()
    return ctypes.get_errno() if function and function(file, KEEP_SIZE, start, size) else 0


def _to_line(row: dict) -> bytes:
    """Return a row as a line of JSON. What no UTF-8 can hold is replaced."""
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        return repair_text(json.dumps(row, ensure_ascii=False)).encode() + b"\n"


def _read_row(line: bytes) -> tuple[str, Reply] | None:
    """Return (key, reply) of a line of the cache; None for a line without a reply, such as one that was cut by a kill."""
    try:
        row = parse_json(line)
        reply = Reply(**{**row["reply"], "cached": True})
        key, text = row["key"], text_of(reply.text)
    except (ValueError, TypeError, KeyError, Malformed):
        return None
    numbers = (reply.prompt_tokens, reply.completion_tokens, reply.seconds, reply.usd)
    right = isinstance(key, str) and {*map(type, numbers)} <= {int, float}
    return (key, reply if text is reply.text else replace(reply, text=text)) if right else None
