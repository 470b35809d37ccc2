"""The lease on a run's place in object storage, so that two runs never write to the same place.

Two runs of one name happen: a managed job that is started again while its last machine still works, or the same command
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

LEASE_S = 120.0  # how long it lasts after its holder last renewed it
RENEW_S = 20.0
RELEASE_S = 5.0  # torchrun gives 30 s after a signal, of which an upload may have taken 27


class Lease:
    """The right to write under an address, for one run at a time.

    Another run may take it if the holder has released it, if the holder was a process of this machine that has ended or an
    earlier start of this managed job, or if it has not changed for two minutes, by the clock of the storage or by watching
    it. A holder that finds the lease gone has lost it: another run may have held and released it in the meantime.
    """

    def __init__(self, store: Store):
        """Take the lease. Raises UserError if another run holds it, or if nothing can be written there."""
        self.store, self.lost, self._ended = store, False, threading.Event()
        self.bug: Exception | None = None  # met in the thread, to be raised by the run
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
        """Return False once another run has taken it, or this run has released it."""
        held = self._read()
        self.lost = self.lost or held is None or held.get("token") != self.mine["token"]
        return not self.lost and not self._ended.is_set()

    def release(self) -> None:
        """Remove the lease, so that the next start need not wait. If the storage does not answer in 5 s, it has to."""
        self._ended.set()
        last = threading.Thread(target=self._remove, name="release", daemon=True)
        last.start()
        last.join(RELEASE_S)

    def _remove(self) -> None:
        self.thread.join()  # else it could write the lease again after the removal
        with contextlib.suppress(UserError):
            self.is_mine()
            if not self.lost:
                self.store.remove("lease.json")

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                if not self.is_mine():
                    return
                self._write()
            except UserError:  # storage does not answer; either it will again, or the lease runs out
                pass
            except Exception as error:
                self.bug = error
                return

    def _age(self) -> float:
        """Seconds since the lease was written, by the storage's clock, because those of machines jump. 0 if it tells no time."""
        probe = f"lease-probe-{self.mine['token']}"
        self.store.write(probe, "")
        try:
            return (self.store.modified(probe) - self.store.modified("lease.json")).total_seconds()
        except (UserError, NotImplementedError):
            return 0.0
        finally:
            self.store.remove(probe)

    def _write(self) -> None:
        self.store.write("lease.json", json.dumps({**self.mine, "beat": secrets.token_hex(4)}))

    def _read(self) -> dict[str, Any] | None:
        text = self.store.read("lease.json")
        try:
            held = json.loads(text) if text else None
        except ValueError:
            return None
        return held if isinstance(held, dict) else None

    def _may_take(self, held: dict[str, Any]) -> bool:
        """Whether the holder of `held` is gone; this may watch the lease for two minutes."""
        if self.mine["job"] and held.get("job") == self.mine["job"]:
            return True
        here = (held.get("host"), held.get("boot")) == (self.mine["host"], self.mine["boot"])
        if here and not _alive(held.get("pid")):  # one that is alive may be another process with the same number
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
    """An id of this boot of this machine, which tells a process from one that had the same number before a reboot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _alive(pid: Any) -> bool:
    """Whether a process with this number runs here; True if that cannot be told."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, TypeError, ValueError):
        return True
    return True


def _managed_job() -> str:
    """An id of SkyPilot's managed job, "" outside of one. A job is started again only when its earlier machines are gone.

    The job's number alone is not unique, because other API servers count from 1, too. The task's id begins with the time at
    which its controller started, and stays the same for all starts of the job.
    """
    names = ("SKYPILOT_MANAGED_JOB_ID", "SKYPILOT_TASK_ID")
    return "/".join(os.environ[name] for name in names) if all(map(os.environ.get, names)) else ""
