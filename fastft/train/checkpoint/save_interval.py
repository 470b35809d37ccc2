"""When the next checkpoint is due: after so many steps, or at the interval that costs least.

`checkpoint.every: auto` measures how long training waits for a checkpoint and how long one is on its way to storage, and
lets the first process watch the clock (monotonic: the time of day may jump). Which steps are saved changes nothing in what
is learned.
"""

import logging
import time

from fastft.config import CheckpointConfig
from fastft.cost.spot.young import young_interval
from fastft.train.checkpoint.local import Writer

logger = logging.getLogger(__name__)

ASSUMED_BLOCKING_S = 1.0  # until one is measured


class SaveInterval:
    """Of a run on `machines` machines: any of them that goes takes the run with it."""

    def __init__(self, config: CheckpointConfig, machines: int, writer: Writer):
        self.every, self.writer = config.every, writer
        self.hours = config.preemption_hours / machines
        self.last = time.monotonic()
        self.said: float | None = None

    def is_due(self, step: int) -> bool:
        """By the count of steps, the same on every rank."""
        return self.every != "auto" and bool(self.every) and step % self.every == 0

    def wants_one(self) -> bool:
        """By this rank's clock."""
        return self.every == "auto" and time.monotonic() - self.last >= self.interval_s()

    def interval_s(self) -> float:
        upload_s = self.writer.uploader.seconds if self.writer.uploader else 0.0
        return young_interval(self.writer.blocking_s or ASSUMED_BLOCKING_S, self.hours * 3600, upload_s)

    def saved(self) -> None:
        """One was begun."""
        self.last = time.monotonic()
        if self.every != "auto":
            return
        interval = self.interval_s()
        if self.said is None or not 0.5 < interval / self.said < 2:
            self.said = interval
            upload_s = self.writer.uploader.seconds if self.writer.uploader else 0.0
            logger.info(
                f"checkpoints: every {_duration(interval)}: training waits {self.writer.blocking_s:.2f} s for one, an upload "
                f"takes {upload_s:.0f} s, and a machine goes every {self.hours:.1f} h, it is assumed (sqrt(2 x wait x hours))"
            )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
