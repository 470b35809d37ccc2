"""Keep account of money: prices, a limit that holds with many requests in flight, and a cache of replies that were paid for.

money = Money(limit=5.0)
await money.reserve(0.02)          # raises OverBudget if the request could exceed the limit
money.settle(0.02, 0.013)          # what it cost in the end

cache = Cache(Path("judged/cache.jsonl"))
cache.put(key, reply); cache.get(key)
"""

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from fastft.common.records import repair_text
from fastft.errors import UserError
from fastft.inference.completion import Malformed, Reply, text_of

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
        self.limit, self.spent, self.closed, self._reserved = limit, 0.0, False, []

    async def reserve(self, usd: float) -> None:
        """Reserve `usd`, the most that a request can cost. Raises OverBudget if that is more than what is left.

        Most requests cost less than was reserved for them. If there is too little only because of what requests in flight have
        reserved, this waits until enough of them have ended.
        """
        while not self.closed and not self._is_enough(usd, *self._reserved):
            if not self._reserved:
                raise OverBudget
            await asyncio.sleep(0.05)
        if self.closed:
            raise OverBudget
        self._reserved.append(usd)

    def settle(self, reserved: float, usd: float) -> None:
        """Replace a reserve by what the request has cost."""
        self._reserved.remove(reserved)
        self.spent += usd

    def _is_enough(self, *usd: float) -> bool:
        return self.limit is None or self.spent + sum(usd) <= self.limit


class Cache:
    """Replies by their exact request, in a file to which each is appended at once: a killed run loses none."""

    def __init__(self, path: Path):
        """Read what earlier runs have left. The file is created by the first `put` or `open`."""
        self.path, self.replies, self.file = path, {}, None
        content = path.read_bytes() if path.is_file() else b""
        for line in content.splitlines():
            if row := _read_row(line):
                self.replies[row[0]] = row[1]
        self.torn = bool(content) and not content.endswith(b"\n")

    def get(self, key: str) -> Reply | None:
        reply = self.replies.get(key)
        return replace(reply, cached=True) if reply else None

    def open(self) -> None:
        """Create the file. Raises UserError if that is impossible, so that the failure shows before anything is paid for."""
        if self.file:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  it stays open as long as the run
            self.file.write(b"\n" * self.torn)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written to ({error.strerror})") from None

    def put(self, key: str, reply: Reply) -> None:
        self.open()
        self.replies[key] = reply
        row = json.dumps({"key": key, "reply": asdict(reply)}, ensure_ascii=False)
        self.file.write(repair_text(row).encode() + b"\n")


def _read_row(line: bytes) -> tuple[str, Reply] | None:
    """Return (key, reply) of a line of the cache; None for a line without a reply, such as one that was cut by a kill."""
    try:
        row = json.loads(line)
        reply = Reply(**row["reply"])
        key, text = row["key"], text_of(reply.text)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, Malformed):
        return None
    numbers = reply.prompt_tokens, reply.completion_tokens, reply.seconds
    right = isinstance(key, str) and all(isinstance(number, (int, float)) for number in numbers)
    return (key, replace(reply, text=text)) if right else None
