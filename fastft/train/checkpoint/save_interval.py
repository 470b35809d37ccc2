"""Decide when the next checkpoint is due: after a number of steps, or after the time that costs the run least.

With `checkpoint.every: auto` the interval follows from two measurements: how long training waits for a checkpoint, and how
long its upload takes. Rank 0 then decides by its monotonic clock, because the time of day may jump. The choice of the saved
steps does not influence what is learned.
"""

import logging
import time

from fastft.config import CheckpointConfig
from fastft.cost.spot.young import young_interval
from fastft.train.checkpoint.local import Writer

logger = logging.getLogger(__name__)

ASSUMED_BLOCKING_S = 1.0  # until it has been measured


class SaveInterval:
    """The save interval of a run. It is shorter on more machines, because the preemption of any of them stops the run."""

    def __init__(self, config: CheckpointConfig, machines: int, writer: Writer):
        self.every, self.writer = config.every, writer
        self.hours = config.preemption_hours / machines
        self.last = time.monotonic()
        self.logged: float | None = None

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due by the number of steps, which is the same on every rank."""
        return self.every != "auto" and bool(self.every) and step % self.every == 0

    def wants_one(self) -> bool:
        """Whether a checkpoint is due by the clock of this rank."""
        return self.every == "auto" and time.monotonic() - self.last >= self.interval_s()

    def interval_s(self) -> float:
        """Young's interval in seconds, for what has been measured so far."""
        blocking_s = self.writer.last_blocking_s or ASSUMED_BLOCKING_S
        return young_interval(blocking_s, self.hours * 3600, self._upload_s())

    def saved(self) -> None:
        """Begin the next interval, because a checkpoint has just been started.

        The interval is logged the first time, and whenever it has halved or doubled since the last log.
        """
        self.last = time.monotonic()
        if self.every != "auto":
            return
        interval = self.interval_s()
        if self.logged is None or not 0.5 < interval / self.logged < 2:
            self.logged = interval
            logger.info(
                f"checkpoints: every {_duration(interval)}: training waits {self.writer.last_blocking_s:.2f} s for one, an "
                f"upload takes {self._upload_s():.0f} s, assuming a preemption every {self.hours:.1f} h (sqrt(2 x wait x hours))"
            )

    def _upload_s(self) -> float:
        return self.writer.uploader.seconds if self.writer.uploader else 0.0


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
