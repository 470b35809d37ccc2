"""Leaving a machine that is about to be taken away: signals and notices set a flag, all ranks hear of it after the same step.

The first SIGTERM or SIGINT, or a cloud's notice (`fastft.train.preemption.notices`), asks for a stop: the run saves, publishes what the
time allows and leaves with code 75, which says "start me again" (EX_TEMPFAIL of sysexits.h). torchrun returns 1 whatever its
workers return, so a run script looks for OUTPUT_DIR/preempted. That is written first of all: torchrun ends its workers with
SIGKILL after a time that a save or a storage that does not answer can outlast. A second signal stops at once.

The ranks agree in a small all-reduce between the hosts, every so many steps that it takes place about ten times in a notice's
window; the devices are not waited for.
"""

import os
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from fastft.common.distributed import SET_UP_LIMIT, limit_waiting, on_first
from fastft.train.checkpoint.local import Writer

EXIT_CODE = 75
MARK = "preempted"
NOTICE_S = 30.0  # the shortest notice of the clouds (GCP, Azure), and what torchrun gives its workers after SIGTERM
MARGIN_S = 3.0  # for leaving: the process group's end, and torchrun's own
SAME_SIGNAL_S = 1.0  # Ctrl-C reaches a worker twice, from the terminal and from torchrun


class Preempted(BaseException):
    """The run leaves, to be started again. No Exception: nobody who tries something may take it for a failure of that."""


class Stopping:
    """This process's wish to leave, and the ranks' agreement about it."""

    def __init__(self, mark: Path | None = None) -> None:
        """`mark` is the file for the run script, on the process that writes it."""
        self.mark = mark
        self.reason: str | None = None
        self.deadline = float("inf")  # time.monotonic()
        self.save_soon = False
        self._heard_at: float | None = None
        self._in_loop = False
        self._checked = self._next_check = 0
        self._checked_at = time.monotonic()
        self._earlier = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    def request(self, reason: str, seconds: float) -> None:
        """Ask for a stop; the machine goes in so many seconds."""
        self.deadline = min(self.deadline, time.monotonic() + max(0.0, seconds - MARGIN_S))
        if self.reason is None:
            self.reason = reason
            self.note(f"asked to leave ({reason})")

    def note(self, what: str) -> None:
        """Have the run script know."""
        with suppress(OSError):
            if self.mark:
                self.mark.write_text(f"{what}\n")

    def forget(self) -> None:
        """Leave signals to those who had them before."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        now = time.monotonic()
        if self._heard_at is not None:
            if now - self._heard_at > SAME_SIGNAL_S:
                os._exit(EXIT_CODE)
            return
        self._heard_at = now
        self.request(signal.Signals(number).name, float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", NOTICE_S)))
        if not self._in_loop:  # there is nothing to save that is not saved
            raise Preempted(self.reason)

    @contextmanager
    def between_steps(self, first: int):
        """Within, a stop waits until `agreed` says so; without, it is an exception on the spot. Collective."""
        self.group = dist.new_group(backend="gloo")
        self._checked, self._next_check, self._checked_at = first, first + 1, time.monotonic()
        self._in_loop = True
        try:
            yield
        finally:
            self._in_loop = False

    def agreed(self, step: int, save: bool, last: bool = False) -> tuple[bool, bool]:
        """(stop, save) after `step`, the same on every rank; collective, and most of the time nothing but a comparison.

        `save` says whether this rank wants a checkpoint. After the `last` step it is always asked.
        """
        if step < self._next_check and not last:
            return False, False
        now = time.monotonic()
        step_s = (now - self._checked_at) / max(1, step - self._checked)
        stop, save = self.reason is not None, save or self.save_soon
        self.save_soon = False  # here: advice may come while the others are waited for
        wishes = torch.tensor([stop, save, step_s, now - self.deadline], dtype=torch.float64)
        dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self.group)
        stop, save, slowest_s, beyond = wishes.tolist()
        self._checked, self._checked_at = step, now
        self._next_check = step + max(1, int(NOTICE_S / 10 / max(slowest_s, 1e-3)))
        if stop:
            self.request("another machine is taken away", MARGIN_S - beyond)
        return bool(stop), bool(save)

    def remaining_s(self) -> float:
        return max(0.0, self.deadline - time.monotonic())


def leave_early(step: int, stop: Stopping, writer: Writer) -> None:
    """Publish what is saved, as far as time allows, and raise Preempted; collective."""
    limit_waiting(SET_UP_LIMIT)
    writer.wait()
    where = "saved"
    if writer.uploader:
        uploaded = on_first(lambda: writer.uploader.finish(stop.remaining_s()))
        where += " and uploaded" if uploaded else ", on this disk only: there was no time"
    left = Preempted(f"asked to leave ({stop.reason}): step {step} is {where}; start the same command again")
    stop.note(str(left))
    dist.barrier()  # the first to leave has torchrun stop the others
    raise left
