"""Stop a run whose machine is about to be taken away: signals and notices set a flag, and all ranks stop after the same step.

The first SIGTERM, SIGINT or SIGHUP (a terminal was closed), or a cloud's notice (`fastft.train.preemption.notices`), asks
for a stop. Under nohup SIGHUP stays ignored. The run then saves, uploads what the time allows, and exits with code 75, which
means "start me again" (EX_TEMPFAIL of sysexits.h). A second signal ends the process at once.

torchrun returns 1 whatever its workers return, so a run script looks for the file OUTPUT_DIR/preempted instead. That file is
written as soon as a stop is asked for: torchrun kills its workers after some time, and a save, or a storage that does not
answer, can take longer.

The ranks agree in a small all-reduce between the hosts, which does not wait for the devices. It takes place about ten times
within the shortest notice, not after every step.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from fastft.common.files import FullDiskError, write_whole

EXIT_CODE = 75
NOTE_FILE = "preempted"  # in OUTPUT_DIR, for the run script
NOTICE_S = 30.0  # the shortest notice of the clouds (GCP, Azure), and what torchrun gives its workers after SIGTERM
MARGIN_S = 3.0  # for the end of the process group and of torchrun
SAME_SIGNAL_S = 1.0  # Ctrl-C reaches a worker twice, from the terminal and from torchrun


class Preempted(BaseException):
    """Raised when the run stops early and is to be started again.

    It derives from BaseException so that `except Exception` in library code does not swallow it.
    """


class StopFlag:
    """Holds whether this process was asked to stop, and lets all ranks agree to do so after the same step."""

    def __init__(self, note_file: Path | None = None) -> None:
        """Listen for signals. `note_file` is the file for the run script, on the process that writes it."""
        self.note_file = note_file
        self.reason: str | None = None
        self.deadline = float("inf")  # time.monotonic()
        self.save_soon = False
        self._signal_at: float | None = None
        self._in_loop = False
        self._agreed_step = self._next_agreement = 0
        self._agreed_at = time.monotonic()
        heard = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # it is ignored under nohup
            heard.append(signal.SIGHUP)
        self._earlier = {number: signal.signal(number, self._on_signal) for number in heard}

    def set(self, reason: str, seconds: float) -> None:
        """Ask for a stop, because the machine will be taken away in `seconds`."""
        self.deadline = min(self.deadline, time.monotonic() + max(0.0, seconds - MARGIN_S))
        if self.reason is None:
            self.reason = reason
            self.note(f"asked to leave ({reason})")

    def note(self, what: str) -> None:
        """Write `what` into the file for the run script."""
        with suppress(OSError, FullDiskError):
            if self.note_file:
                write_whole(self.note_file, f"{what}\n")

    def restore_signals(self) -> None:
        """Give the signals back to the handlers that they had before."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        """Ask for a stop at the first signal, and end the process at the second."""
        now = time.monotonic()
        if self._signal_at is not None:
            if now - self._signal_at > SAME_SIGNAL_S:
                os._exit(EXIT_CODE)
            return
        self._signal_at = now
        self.set(signal.Signals(number).name, float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", NOTICE_S)))
        if not self._in_loop:  # everything that can be saved has been saved
            raise Preempted(self.reason)

    @contextmanager
    def deferred(self, start_step: int) -> Iterator[None]:
        """A context in which a signal only sets the flag, so that the run continues until the ranks agree to stop;
        collective.

        Outside of it, a signal raises Preempted at once. `start_step` is the number of steps that are done already.
        """
        self.group = dist.new_group(backend="gloo")
        self._agreed_step, self._next_agreement, self._agreed_at = start_step, start_step + 1, time.monotonic()
        self._in_loop = True
        try:
            yield
        finally:
            self._in_loop = False

    def agreed(self, step: int, save: bool, last: bool = False) -> tuple[bool, bool]:
        """Whether to (stop, save) after `step`, the same on every rank; collective.

        `save` says whether this rank wants a checkpoint. The ranks communicate after the `last` step and several times
        within the length of a notice. After most steps this only compares two numbers and returns (False, False).
        """
        if step < self._next_agreement and not last:
            return False, False
        now = time.monotonic()
        step_s = (now - self._agreed_at) / max(1, step - self._agreed_step)
        stop, save = self.reason is not None, save or self.save_soon
        self.save_soon = False  # before waiting, so that a recommendation that arrives meanwhile is kept
        wishes = torch.tensor([stop, save, step_s, now - self.deadline], dtype=torch.float64)
        dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self.group)
        stop, save, slowest_s, past_deadline_s = wishes.tolist()
        self._agreed_step, self._agreed_at = step, now
        self._next_agreement = step + max(1, int(NOTICE_S / 10 / max(slowest_s, 1e-3)))
        if stop:
            self.set("another machine is taken away", MARGIN_S - past_deadline_s)
        return bool(stop), bool(save)

    def remaining_s(self) -> float:
        """Seconds until the machine is taken away."""
        return max(0.0, self.deadline - time.monotonic())
