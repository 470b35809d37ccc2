"""API keys of the gateway, and the requests that each may send in a minute."""

import math
import time
from dataclasses import dataclass, field

from fastft.serve.protocol import ApiError


@dataclass(frozen=True)
class ApiKey:
    name: str
    """For the record and the metrics."""
    sha256: str = field(repr=False)
    """The key's SHA-256, in hexadecimal."""
    per_minute: int | None = None
    """Requests a minute; no limit without."""


class Allowance:
    """Requests that a key has left: a bucket that fills up again within a minute."""

    def __init__(self, per_minute: int):
        self.per_minute, self.left, self.at = per_minute, float(per_minute), time.monotonic()

    def take(self) -> None:
        """Raises ApiError if nothing is left."""
        now = time.monotonic()
        self.left = min(self.per_minute, self.left + (now - self.at) * self.per_minute / 60)
        self.at = now
        if self.left < 1:
            wait = math.ceil((1 - self.left) * 60 / self.per_minute)
            message = f"this key may send {self.per_minute} requests a minute; try again in {wait} s"
            raise ApiError(429, message, code="rate_limit_exceeded", kind="rate_limit_error", retry_after=wait)
        self.left -= 1
