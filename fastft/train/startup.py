"""Where the time from the start of the process to the first step goes."""

import os
import time
from pathlib import Path


class Startup:
    """Names the parts as they end; the first one, up to here, is Python and its imports."""

    def __init__(self) -> None:
        self.began = self.last = _process_start()
        self.parts: list[tuple[str, float]] = []
        self.done("imports")

    def done(self, part: str) -> None:
        now = time.monotonic()
        self.parts.append((part, now - self.last))
        self.last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts)
        return f"first step after {self.last - self.began:.1f} s: {parts}"


def _process_start() -> float:
    """time.monotonic() when this process began; where the system does not tell, now."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        up = time.clock_gettime(time.CLOCK_BOOTTIME)
        return time.monotonic() - (up - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return time.monotonic()
