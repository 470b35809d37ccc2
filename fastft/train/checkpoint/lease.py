"""TODO docstring of fastft.train.checkpoint.lease."""

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

LEASE_S = 120.0  # after its holder was last heard of
RENEW_S = 20.0
RELEASE_S = 5.0  # for leaving: of the 30 s that torchrun gives after a signal, 27 may have gone into an upload


class Lease:
    """The right to write under an address, for one run at a time.

    It is an object that its holder rewrites every 20 s. Another run may take it when the holder has said that it leaves,
    when the holder was a process of this machine that has ended or an earlier start of this managed job, or when it has not
    changed for two minutes, by the clock of the storage or by watching it. Whoever finds it gone has lost it: another run
    may have come and gone meanwhile.
    """

    def __init__(self, store: Store):
        """Raises UserError when another run holds it, or nothing can be written there."""
        self.store, self.lost, self._ended = store, False, threading.Event()
        self.mine = {"token": secrets.token_hex(8), "host": socket.gethostname(), "boot": _boot(), "pid": os.getpid()}
        self.mine["job"] = _managed_job()
        earlier = self._read()
        if earlier and not self._may_take(earlier):
            raise UserError(
                f"{store.url}: another run writes there ({earlier.get('host')}, process {earlier.get('pid')}); give this one "
                "another name, or wait until that one has ended"
            )
        self._write()
        self.thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.thread.start()

    def is_mine(self) -> bool:
        """False once another run has taken it, or this one has released it."""
        held = self._read()
        self.lost = self.lost or held is None or held.get("token") != self.mine["token"]
        return not self.lost and not self._ended.is_set()

    def release(self) -> None:
        """Say that the next start need not wait. Where storage does not answer soon, that start has to."""
        self._ended.set()
        last = threading.Thread(target=self._remove, name="release", daemon=True)
        last.start()
        last.join(RELEASE_S)

    def _remove(self) -> None:
        self.thread.join()  # or what it is about to write would come after the removal
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
            except UserError:  # storage does not answer: it will again, or the lease runs out
                pass

    def _age(self) -> float:
        """Seconds since the lease was written, by storage's own clock: those of machines jump. 0 where it has none."""
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
        if self.mine["job"] and held.get("job") == self.mine["job"]:
            return True
        here = (held.get("host"), held.get("boot")) == (self.mine["host"], self.mine["boot"])
        if here and not _alive(held.get("pid")):  # one that is alive may be another process of that number
            return True
        age = self._age()
        if age > LEASE_S:
            return True
        wait = LEASE_S - max(0.0, age)
        logger.info(
            f"{self.store.url}: {held.get('host')} may still be writing there; watching for {wait:.0f} s whether it does"
        )
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
    """What tells this boot of this machine from others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, TypeError, ValueError):
        return True
    return True


def _managed_job() -> str:
    """SkyPilot starts a managed job again only when its earlier machines are gone. Its number alone is that of other jobs,
    too, of other API servers; the task's id begins with the moment at which its controller began, and lasts as long.
    """
    names = ("SKYPILOT_MANAGED_JOB_ID", "SKYPILOT_TASK_ID")
    return "/".join(os.environ[name] for name in names) if all(map(os.environ.get, names)) else ""
