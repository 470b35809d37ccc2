"""Measure how long a run takes from the start of its process to its first step, part by part."""

import os
import time
from pathlib import Path


class Startup:
    """Measures the parts of a start. The first part, Python and its imports, ends when this object is created."""

    def __init__(self) -> None:
        self.began = self.last = _process_start()
        self.parts: list[tuple[str, float]] = []
        self.done("imports")

    def done(self, part: str) -> None:
        """Note that `part` has just ended."""
        now = time.monotonic()
        self.parts.append((part, now - self.last))
        self.last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts)
        return f"first step after {self.last - self.began:.1f} s: {parts}"


def _process_start() -> float:
    """The time.monotonic() at which this process began, or the present one if the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        up = time.clock_gettime(time.CLOCK_BOOTTIME)
        return time.monotonic() - (up - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return time.monotonic()
