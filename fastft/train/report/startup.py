"""How long a run takes from the start of its process to its first step, and which part of that takes how long."""

import os
import time
from pathlib import Path


class Startup:
    """Measures the parts of a start. The first part is Python and its imports, which are done when this is made."""

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
    """time.monotonic() of the moment when this process began; if the system does not tell, of now."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        up = time.clock_gettime(time.CLOCK_BOOTTIME)
        return time.monotonic() - (up - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return time.monotonic()
