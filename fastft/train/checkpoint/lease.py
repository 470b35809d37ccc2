"""Hold the lease on a run's address in object storage, so that two runs never write to the same address.

Two runs with one name do happen: a managed job is started again while its last machine still works, or the same command is
typed twice. Storage has no locks, so the lease is an object, `lease.json`, that its holder rewrites every 20 seconds.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from fastft.common.object_store import Store
from fastft.errors import UserError

logger = logging.getLogger(__name__)

LEASE_S = 120.0  # how long a lease lasts after it was renewed
RENEW_S = 20.0  # how often its holder renews it
RELEASE_S = 5.0  # short, because torchrun gives 30 s after a signal, and an upload may have taken 27 of them


class Lease:
    """The right to write under an address, for one run at a time.

    Another run may take the lease in one of four cases: its holder has released it; the holder was a process of this machine
    that has ended; the holder was an earlier start of this managed job; or the lease has not been renewed for two minutes,
    measured by the storage's clock or by watching the lease. A holder that finds its lease gone has lost it, because another
    run may have held and released it in the meantime.
    """

    def __init__(self, store: Store):
        """Take the lease. Raises UserError if another run holds it, or if nothing can be written there."""
        self.store, self.lost, self._ended = store, False, threading.Event()
        self.bug: Exception | None = None  # raised in the thread; the run raises it again
        self.mine = {"token": secrets.token_hex(8), "host": socket.gethostname(), "boot": _boot(), "pid": os.getpid()}
        self.mine["job"] = _managed_job()
        earlier = self._read()
        if earlier and not self._may_take(earlier):
            raise UserError(
                f"{store.url}: another run writes there ({earlier.get('host')}, process {earlier.get('pid')}); give this one "
                "another --checkpoint.remote, or wait until that one has ended"
            )
        self._write()
        self.thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.thread.start()

    def is_mine(self) -> bool:
        """Whether this run still holds the lease: False once another run has taken it, or this run has released it."""
        held = self._read()
        self.lost = self.lost or held is None or held.get("token") != self.mine["token"]
        return not self.lost and not self._ended.is_set()

    def release(self) -> None:
        """Remove the lease, so that the next start need not wait for it to run out.

        If the storage does not answer within 5 s, the lease stays.
        """
        self._ended.set()
        last = threading.Thread(target=self._remove, name="release", daemon=True)
        last.start()
        last.join(RELEASE_S)

    def _remove(self) -> None:
        """Remove the lease from the storage if this run still holds it."""
        self.thread.join()  # otherwise the thread could write the lease again after it was removed
        with contextlib.suppress(UserError):
            self.is_mine()
            if not self.lost:
                self.store.remove("lease.json")

    def _renew(self) -> None:
        """Rewrite the lease every 20 s until it is released or lost; runs in a thread."""
        while not self._ended.wait(RENEW_S):
            try:
                if not self.is_mine():
                    return
                self._write()
            except UserError:  # the storage does not answer: try again until the lease runs out
                pass
            except Exception as error:
                self.bug = error
                return

    def _age(self) -> float:
        """Seconds since the lease was written; 0 if the storage does not tell the time at which an object was written.

        They are measured by the storage's clock, because the clocks of machines jump.
        """
        probe = f"lease-probe-{self.mine['token']}"
        self.store.write(probe, "")
        try:
            return (self.store.modified(probe) - self.store.modified("lease.json")).total_seconds()
        except UserError:
            return 0.0
        finally:
            self.store.remove(probe)

    def _write(self) -> None:
        self.store.write("lease.json", json.dumps({**self.mine, "beat": secrets.token_hex(4)}))

    def _read(self) -> dict[str, Any] | None:
        """What lease.json says now; None if there is none, or if no run has written it."""
        text = self.store.read("lease.json")
        try:
            held = json.loads(text) if text else None
        except ValueError:
            return None
        return held if isinstance(held, dict) else None

    def _may_take(self, held: dict[str, Any]) -> bool:
        """Whether the holder of the lease `held` is gone. To find out, this may watch the lease for two minutes."""
        if self.mine["job"] and held.get("job") == self.mine["job"]:
            return True
        here = (held.get("host"), held.get("boot")) == (self.mine["host"], self.mine["boot"])
        if here and not _alive(held.get("pid")):  # if alive, it may be another process that got the same number
            return True
        age = self._age()
        if age > LEASE_S:
            return True
        wait = LEASE_S - max(0.0, age)
        logger.info(f"{self.store.url}: {held.get('host')} may still be writing there; watching it for {wait:.0f} s")
        until = time.monotonic() + wait
        while time.monotonic() < until:
            time.sleep(min(RENEW_S / 10, max(0.0, until - time.monotonic())))
            now = self._read()
            if now is None:
                return True
            if now.get("beat") != held.get("beat"):
                return False
        return True


def _boot() -> str:
    """The id of this boot of this machine. It tells a process from one that had the same number before a reboot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _alive(pid: Any) -> bool:
    """Whether a process with this number runs on this machine; True if that cannot be found out."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, TypeError, ValueError):
        return True
    return True


def _managed_job() -> str:
    """The id of SkyPilot's managed job, or "" outside of one. SkyPilot restarts a job only when its earlier machines are
    gone. The job's number is not unique, because every API server counts from 1. The task's id is: it begins with the start
    time of its controller, and all starts of the job share it.
    """
    names = ("SKYPILOT_MANAGED_JOB_ID", "SKYPILOT_TASK_ID")
    return "/".join(os.environ[name] for name in names) if all(map(os.environ.get, names)) else ""
