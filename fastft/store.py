"""A run's place in object storage: s3://, gs://, az://, hf://buckets/…, file:// or whatever fsspec knows.

    RUN/step-00000100-3f2a9c01/…        a checkpoint's files, each directory written once and never again
    RUN/step-00000100-3f2a9c01/COMMITTED   its marker, put there last
    RUN/model/…, RUN/model/COMMITTED    the trained model: the run is finished
    RUN/lease.json                      who writes here

Only single objects are ever put, which storage does atomically; nothing is appended to, or taken from a listing that is not
confirmed by a marker. Every request is tried again after 1, 2, 4, 8 and 16 seconds.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fastft import marker

COMMITTED = "COMMITTED"
MODEL = "model"
DELAYS_S = (1, 2, 4, 8, 16)
LEASE_S = 120.0  # after its holder was last heard of
RENEW_S = 20.0
RELEASE_S = 5.0  # for leaving: of the 30 s that torchrun gives after a signal, 27 may have gone into an upload
EXTRA = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # another try ends the same way
Result = TypeVar("Result")


class Store:
    """The objects under one address. All methods raise ValueError, in one line, when storage does not do what it must."""

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        scheme = self.url.split("://")[0] if "://" in self.url else "file"
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if scheme == "file":
            options["auto_mkdir"] = True
        if scheme in ("s3", "s3a"):  # one policy of trying again: theirs under ours would be four minutes
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10}
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError:
            raise ValueError(
                f'{self.url}: {scheme}:// needs {EXTRA.get(scheme, "a package for it")}: pip install "fastft[cloud]"'
            ) from None
        except ValueError as error:  # fsspec: unknown protocol
            raise ValueError(f"checkpoint.remote: {url}: {error}") from None
        self.root = self.root.rstrip("/")
        if hasattr(self.fs, "retries"):
            self.fs.retries = 1

    def put(self, source: Path, name: str) -> None:
        """Copy a file there. Its size is asked for afterwards."""

        def copy() -> None:
            self.fs.put_file(str(source), f"{self.root}/{name}")
            size, wanted = self.fs.size(f"{self.root}/{name}"), source.stat().st_size
            if size != wanted:
                raise OSError(f"{size} of {wanted} bytes arrived")

        self._try(copy, name)

    def get(self, name: str, target: Path) -> None:
        self._try(lambda: self.fs.get_file(f"{self.root}/{name}", str(target)), name)

    def write(self, name: str, content: str) -> None:
        """Put an object whose readers find the old or the new content, as object storage has it."""
        path, beside = f"{self.root}/{name}", f"{self.root}/{name}.{secrets.token_hex(4)}.tmp"

        def replace() -> None:  # fsspec writes a file in place: for a moment it would be empty
            self.fs.pipe_file(beside, content.encode())
            os.replace(beside, path)

        local = "file" in self.fs.protocol
        self._try(replace if local else lambda: self.fs.pipe_file(path, content.encode()), name)

    def read(self, name: str) -> bytes | None:
        """None where there is no such object."""

        def cat() -> bytes | None:
            try:
                return self.fs.cat_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return None

        return self._try(cat, name)

    def modified(self, name: str) -> datetime:
        return self._try(lambda: self.fs.modified(f"{self.root}/{name}"), name)

    def directories(self) -> list[str]:
        """Names directly under the address that hold something."""

        def names() -> list[str]:
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(self.root, detail=True)
            except FileNotFoundError:
                return []
            return sorted(entry["name"].rstrip("/").split("/")[-1] for entry in found if entry["type"] == "directory")

        return self._try(names, "")

    def remove(self, name: str) -> None:
        """An object or all under it. The marker goes first: what is half removed is no checkpoint."""

        def delete() -> None:
            for path in (f"{self.root}/{name}/{COMMITTED}", f"{self.root}/{name}"):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    self.fs.rm(path, recursive=True)
            self.fs.invalidate_cache()

        self._try(delete, name)

    def _try(self, action: Callable[[], Result], name: str) -> Result:
        for delay in (*DELAYS_S, None):
            try:
                return action()
            except Exception as error:  # each storage has a family of its own
                if (
                    delay is None
                    or isinstance(error, (*FINAL, NotImplementedError))
                    or "credential" in str(error).lower()
                ):
                    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                    raise ValueError(
                        f"{self.url}/{name}: {reason}; look at the bucket's name, its permissions and the credentials"
                    ) from None
                time.sleep(delay)
        raise AssertionError


def checkpoints(store: Store, say: Callable[[str], None]) -> list[tuple[str, dict[str, Any]]]:
    """(directory, marker) of every committed checkpoint, the newest first. `say` is told of damaged markers."""
    found = []
    for name in store.directories():
        if not name.startswith("step-") or (text := store.read(f"{name}/{COMMITTED}")) is None:
            continue
        try:
            found.append((name, marker.loads(text, f"{store.url}/{name}")))
        except marker.DamagedError as error:
            say(f"{store.url}/{name}: passed over: {error}")
    return sorted(found, key=lambda item: (item[1]["step"], item[0]), reverse=True)


def trained_model(store: Store) -> dict[str, Any] | None:
    """The marker of the trained model, None where none is whole."""
    text = store.read(f"{MODEL}/{COMMITTED}")
    try:
        return marker.loads(text, f"{store.url}/{MODEL}") if text else None
    except marker.DamagedError:
        return None


class Lease:
    """The right to write under an address, for one run at a time.

    It is an object that its holder rewrites every 20 s. Another run may take it when the holder has said that it leaves,
    when the holder was a process of this machine that has ended or an earlier start of this managed job, or when it has not
    changed for two minutes, by the clock of the storage or by watching it. Whoever finds it gone has lost it: another run
    may have come and gone meanwhile.
    """

    def __init__(self, store: Store, say: Callable[[str], None]):
        """Raises ValueError when another run holds it, or nothing can be written there."""
        self.store, self.lost, self._ended = store, False, threading.Event()
        self.mine = {"token": secrets.token_hex(8), "host": socket.gethostname(), "boot": _boot(), "pid": os.getpid()}
        self.mine["job"] = _managed_job()
        earlier = self._read()
        if earlier and not self._may_take(earlier, say):
            raise ValueError(
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
        with contextlib.suppress(ValueError):
            self.is_mine()
            if not self.lost:
                self.store.remove("lease.json")

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                if not self.is_mine():
                    return
                self._write()
            except ValueError:  # storage does not answer: it will again, or the lease runs out
                pass

    def _age(self) -> float:
        """Seconds since the lease was written, by storage's own clock: those of machines jump. 0 where it has none."""
        probe = f"lease-probe-{self.mine['token']}"
        self.store.write(probe, "")
        try:
            return (self.store.modified(probe) - self.store.modified("lease.json")).total_seconds()
        except (ValueError, NotImplementedError):
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

    def _may_take(self, held: dict[str, Any], say: Callable[[str], None]) -> bool:
        if self.mine["job"] and held.get("job") == self.mine["job"]:
            return True
        here = (held.get("host"), held.get("boot")) == (self.mine["host"], self.mine["boot"])
        if here and not _alive(held.get("pid")):  # one that is alive may be another process of that number
            return True
        age = self._age()
        if age > LEASE_S:
            return True
        wait = LEASE_S - max(0.0, age)
        say(
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
