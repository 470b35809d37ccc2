"""Upload checkpoints to object storage while training continues, and find and fetch them there.

    RUN/step-00000100-3f2a9c01/…           a checkpoint's files; each directory is written once and never again
    RUN/step-00000100-3f2a9c01/COMMITTED   its manifest, written last: a directory without one is no checkpoint
    RUN/model/…, RUN/model/COMMITTED       the trained model: the run is finished
    RUN/lease.json                         the run that writes here

One thread on each machine that has files of its own uploads them. The first machine chooses the newest checkpoint that is
complete on disk, every machine uploads its files, and when all have confirmed, the first machine writes the manifest. An
upload that fails is logged and gets no manifest, and the next checkpoint is uploaded as usual. Training never waits for an
upload, except for that of the last checkpoint. Whatever else lies at that address, such as a user's `step-best`, is never
removed.
"""

import errno
import logging
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastft.common import logs
from fastft.common.distributed import gather_from_all, is_loss_of_peer
from fastft.common.files import bytes_text, lack_of_room
from fastft.common.object_store import Store
from fastft.common.storage_faults import DISK_FULL, MISSING, StorageError
from fastft.errors import UserError
from fastft.train.checkpoint import manifest
from fastft.train.checkpoint.lease import Lease

logger = logging.getLogger(__name__)

COMMITTED = "COMMITTED"  # name of a manifest in storage
MODEL = "model"
OURS = re.compile(r"step-\d{8}-[0-9a-f]{8}")  # names of the directories that an Uploader writes
AT_ONCE = 8  # objects that are transferred at the same time
SUPERSEDED = "a newer one took its place"
Offer = tuple[Path, dict[str, Any], list[str]]  # directory, manifest, and which of its files this machine uploads


def checkpoints(store: Store) -> manifest.Listing:
    """List the checkpoints that have a manifest, by their directories in storage. Raises StorageError if it cannot be read."""
    found, passed_over = [], []
    for name in directories(store):
        if (text := store.read(f"{name}/{COMMITTED}")) is None:
            continue
        try:
            found.append((name, manifest.loads(text, f"{store.url}/{name}")))
        except manifest.DamagedError as error:
            passed_over.append(f"{store.url}/{name}: passed over: {error}")
    found.sort(key=lambda item: (item[1]["step"], item[0]), reverse=True)
    return manifest.Listing(found, passed_over)


def directories(store: Store) -> list[str]:
    """The directories that uploads have made, with or without a manifest."""
    return [name for name in store.directories() if OURS.fullmatch(name)]


def trained_model(store: Store) -> dict[str, Any] | None:
    """The manifest of the trained model, or None if there is no complete one."""
    text = store.read(f"{MODEL}/{COMMITTED}")
    try:
        return manifest.loads(text, f"{store.url}/{MODEL}") if text else None
    except manifest.DamagedError:
        return None


def upload_model(store: Store, directory: Path, meta: dict[str, Any]) -> None:
    """Upload the trained model, its manifest last. Raises UserError if the storage does not take it."""
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    _put_all(store, directory, MODEL, files)
    meta = {**meta, "files": {file: manifest.entry(directory / file) for file in files}}
    store.write(f"{MODEL}/{COMMITTED}", manifest.dumps(meta))


def download(store: Store, name: str, files: dict[str, dict[str, Any]], target: Path) -> str | None:
    """Download `files` of the checkpoint `name`, and check them. Returns what disagrees with their entries, or None.

    Only such a disagreement means that the checkpoint is damaged. Raises StorageError if the storage does not give a file,
    and UserError if the disk of `target` is full.
    """
    total = bytes_text(_bytes(files))
    logger.info("fetching %d of its files, %s, from %s/%s", len(files), total, store.url, name)
    require_room(target, files)
    for again in (False, True):  # bytes that were changed on their way are right the second time
        try:
            _get_all(store, name, files, target)
        except StorageError as error:
            if error.fault is MISSING:
                return error.cause
            if error.fault is DISK_FULL:
                raise UserError(_no_room(target, files)) from None
            raise
        found = manifest.faults(target, {"files": files}, contents=True)
        if not found or again:
            break
        files = {file: files[file] for file in found}
    return f"{store.url}/{name}: {next(iter(found.values()))}" if found else None


def require_room(directory: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raise UserError if the disk has no room for `files` in `directory`, where some may be already."""
    there = sum(path.stat().st_blocks * 512 for file in files if (path := directory / file).exists())
    if _bytes(files) > shutil.disk_usage(directory).free + there:
        raise UserError(_no_room(directory, files))


def _no_room(directory: Path, files: dict[str, dict[str, Any]]) -> str:
    lack = lack_of_room(errno.ENOSPC, directory, _bytes(files), directory)
    return f"{directory.parent}: no room for the checkpoint in storage: {lack}; make room, then start the same command again"


def _bytes(files: dict[str, dict[str, Any]]) -> int:
    return sum(entry["bytes"] for entry in files.values())


def _get_all(store: Store, name: str, files: Iterable[str], target: Path) -> None:
    """Download files of the directory `name`, several at the same time."""
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for _ in pool.map(lambda file: store.get(f"{name}/{file}", target / file), files):
            pass
    except Exception:
        pool.shutdown(cancel_futures=True)
        raise
    finally:  # after Preempted, too, which does not wait for storage
        pool.shutdown(wait=False, cancel_futures=True)


def _put_all(store: Store, directory: Path, name: str, files: Iterable[str]) -> None:
    """Upload files to the directory `name`, several at the same time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(lambda file: store.put(directory / file, f"{name}/{file}"), files):
            pass


class Uploader:
    """Uploads checkpoints from a thread of its own.

    `leaders` are the ranks that upload, one for each disk (`local.Disk.leaders`). The first of them is rank 0, which alone has
    the lease.
    """

    def __init__(self, store: Store, lease: Lease | None, leaders: Sequence[int], keep: int, keep_every: int):
        self.store, self.lease, self.keep, self.keep_every = store, lease, keep, keep_every
        self.group = dist.new_group(list(leaders), backend="gloo", timeout=timedelta(days=30))
        self.is_first = dist.get_rank() == 0
        # Ends the names of this start's directories, so that it never writes to those of another.
        self.attempt = secrets.token_hex(4)
        self.changed = threading.Condition()
        self.offers: dict[int, Offer] = {}
        self.closing = False
        # Steps: the last that was tried, the last that is in storage, and the one under way.
        self.tried = self.committed = self.current = -1
        self.failed = 0  # uploads that failed in a row
        self.seconds = 0.0  # how long the last upload took
        self.own_bug: Exception | None = None  # raised in the thread
        self.thread: threading.Thread | None = None
        if dist.get_rank() in leaders:
            self.thread = threading.Thread(target=self._run, name="upload", daemon=True)
            self.thread.start()

    def offer(self, step: int, directory: Path, meta: dict[str, Any], files: list[str]) -> None:
        """Offer a checkpoint that is complete on disk. It replaces one that is still waiting to be uploaded."""
        with self.changed:
            self.offers = {other: offer for other, offer in self.offers.items() if other == self.current}
            self.offers[step] = directory, meta, files
            self.changed.notify_all()

    def in_use(self) -> set[int]:
        """Steps whose files retention must leave on the disk for now."""
        with self.changed:
            return set(self.offers)

    @property
    def bug(self) -> Exception | None:
        """The bug that a thread of this process has met, or None. The run is to raise it with its traceback."""
        return self.own_bug or (self.lease and self.lease.bug)

    def finish(self, seconds: float | None = None) -> bool:
        """Wait until the last offer is committed or has failed, at most `seconds`. Returns True if all is uploaded."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        if self.thread:
            self.thread.join(seconds)
        if not self.thread:
            return True
        with self.changed:  # an offer remains if the thread ended because another machine is gone
            uploaded = self.committed == self.tried and max(self.offers, default=-1) <= self.committed
        return uploaded and not self.thread.is_alive()

    def _run(self) -> None:
        try:
            while (choice := self._agree(self._next() if self.is_first else None)) is not None:
                step, attempt = choice
                self._upload(step, f"step-{step:08d}-{attempt}")
        except Exception as error:
            if is_loss_of_peer(error):  # the training notices this by itself
                logger.warning("upload: ended (%s)", str(error).splitlines()[0])
            else:
                self.own_bug = error

    def _agree(self, choice: tuple[int, str] | None) -> tuple[int, str] | None:
        """Rank 0's choice of (step, attempt), on every machine."""
        box = [choice]
        dist.broadcast_object_list(box, 0, group=self.group)
        return box[0]

    def _next(self) -> tuple[int, str] | None:
        """Wait for a new offer, and return the newest as (step, attempt); None if no more will come."""
        with self.changed:
            self.changed.wait_for(lambda: self.closing or max(self.offers, default=-1) > self.tried)
            newest = max(self.offers, default=-1)
            if newest <= self.tried:
                return None
            self.current = newest
            return newest, self.attempt

    def _upload(self, step: int, name: str) -> None:
        """Upload this machine's files of a step to the directory `name`, and commit it when all machines are done."""
        with self.changed:
            self.current = step
            self.changed.wait_for(lambda: max(self.offers, default=-1) >= step)
            # None if a newer checkpoint replaced it here before rank 0's choice arrived.
            offer = self.offers.get(step)
        began = time.monotonic()
        failure = self._attempt(lambda: self._put(name, offer)) if offer else SUPERSEDED
        failure = next(filter(None, gather_from_all(failure, self.group)), None)
        if self.is_first and failure is None:
            failure = self._attempt(lambda: self._commit(name, offer[1]))
        self.seconds = time.monotonic() - began
        with self.changed:
            self.offers = {other: offer for other, offer in self.offers.items() if other > step}
            self.tried = step
            if failure is None:
                self.committed = step
        if self.is_first and failure != SUPERSEDED:
            self._tell(step, failure)
        elif failure:
            logger.warning("upload: step %d is on the disk only (%s)", step, failure)

    def _tell(self, step: int, failure: str | None) -> None:
        """Log how the upload of a step went. From the second failure in a row on it is an error, and on the live line, too."""
        if failure is None:
            if self.failed > 1:
                logger.info("upload: step %d is in storage, after %d uploads that failed", step, self.failed)
            self.failed = 0
            logs.set_notice(None)
            return
        self.failed += 1
        if self.failed == 1:
            logger.warning("upload: step %d is on the disk only (%s)", step, failure)
            return
        held = f"step {self.committed}" if self.committed >= 0 else "nothing of this start"
        logger.error(
            f"upload: {self.failed} in a row have failed, the last one of step {step} ({failure}). Storage has {held}: a "
            "machine that is lost now takes all later work with it"
        )
        logs.set_notice(f"STORAGE HAS {held}, {self.failed} uploads failed")

    def _attempt(self, action: Callable[[], None]) -> str | None:
        """Do `action`, and return what went wrong. This includes a bug, because the other machines wait for the result."""
        try:
            action()
        except UserError as error:
            return getattr(error, "cause", str(error))
        except Exception as error:
            self.own_bug = error
            return f"{type(error).__name__}: {error}"
        return None

    def _put(self, name: str, offer: Offer) -> None:
        """Upload this machine's files."""
        directory, _, files = offer
        _put_all(self.store, directory, name, files)

    def _commit(self, name: str, meta: dict[str, Any]) -> None:
        """Write the manifest and remove older checkpoints."""
        if not self.lease.is_mine():
            raise UserError(f"the lease on {self.store.url} is lost")
        self.store.write(f"{name}/{COMMITTED}", manifest.dumps(meta))
        try:
            self._prune(name, meta["step"])
        except UserError as error:  # too much is kept then, but nothing is lost
            logger.warning("upload: older checkpoints could not be removed (%s)", error)

    def _prune(self, newest: str, step: int) -> None:
        """Remove checkpoints that need not be kept, and uploads that were never finished."""
        committed = checkpoints(self.store).found
        kept = manifest.kept((meta["step"] for _, meta in committed), step, self.keep, self.keep_every)
        keep, seen = {newest}, set()
        for name, meta in committed:
            if meta["step"] in kept and meta["step"] not in seen:
                keep.add(name)
            seen.add(meta["step"])
        for name in directories(self.store):
            if name not in keep:
                self.store.remove(name, first=COMMITTED)  # half removed, it is no checkpoint
