"""Checkpoints to object storage while training goes on: one thread on each machine that has files of its own.

The first machine names the newest checkpoint that is complete on disk; every machine uploads its own files; when all have
confirmed, the first one puts the manifest there. What fails is said and left without a manifest; the next checkpoint is tried
anew. Training never waits for an upload, except for the last one.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastft.common.object_store import COMMITTED, Store
from fastft.errors import UserError
from fastft.train.checkpoint import manifest
from fastft.train.checkpoint.lease import Lease

logger = logging.getLogger(__name__)

MODEL = "model"


def checkpoints(store: Store, say: Callable[[str], None]) -> list[tuple[str, dict[str, Any]]]:
    """(directory, manifest) of every committed checkpoint, the newest first. `say` is told of damaged manifests."""
    found = []
    for name in store.directories():
        if not name.startswith("step-") or (text := store.read(f"{name}/{COMMITTED}")) is None:
            continue
        try:
            found.append((name, manifest.loads(text, f"{store.url}/{name}")))
        except manifest.DamagedError as error:
            say(f"{store.url}/{name}: passed over: {error}")
    return sorted(found, key=lambda item: (item[1]["step"], item[0]), reverse=True)


def trained_model(store: Store) -> dict[str, Any] | None:
    """The manifest of the trained model, None where none is whole."""
    text = store.read(f"{MODEL}/{COMMITTED}")
    try:
        return manifest.loads(text, f"{store.url}/{MODEL}") if text else None
    except manifest.DamagedError:
        return None


AT_ONCE = 8  # objects on their way at the same time
Offer = tuple[Path, dict[str, Any], list[str]]  # directory, manifest, and which of its files this machine uploads


class Uploader:
    """`holders` are the ranks, one a machine, whose disks hold files of their own; the first is rank 0, which alone
    has the lease.
    """

    def __init__(self, store: Store, lease: Lease | None, holders: Sequence[int], keep: int, keep_every: int):
        self.store, self.lease, self.keep, self.keep_every = store, lease, keep, keep_every
        self.group = dist.new_group(list(holders), backend="gloo", timeout=timedelta(days=30))
        self.first = dist.get_rank() == 0
        self.attempt = secrets.token_hex(4)  # directories of another start are never written to; rank 0's counts
        self.changed = threading.Condition()
        self.offers: dict[int, Offer] = {}
        self.closing = False
        self.tried = self.committed = self.current = -1
        self.seconds = 0.0  # of the last upload
        self.thread: threading.Thread | None = None
        if dist.get_rank() in holders:
            self.thread = threading.Thread(target=self._run, name="upload", daemon=True)
            self.thread.start()

    def offer(self, step: int, directory: Path, meta: dict[str, Any], files: list[str]) -> None:
        """A checkpoint is complete on disk. One that still waits for its turn loses it, and its place on the disk."""
        with self.changed:
            self.offers = {other: offer for other, offer in self.offers.items() if other == self.current}
            self.offers[step] = directory, meta, files
            self.changed.notify_all()

    def in_use(self) -> set[int]:
        """Steps that retention must leave on the disk for now."""
        with self.changed:
            return set(self.offers)

    def finish(self, seconds: float | None = None) -> bool:
        """Wait until the last offer is committed or given up, at most so long. True if nothing is left to upload."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        if self.thread:
            self.thread.join(seconds)
        return not self.thread or (not self.thread.is_alive() and self.committed == self.tried)

    def _run(self) -> None:
        try:
            while (choice := self._agree(self._next() if self.first else None)) is not None:
                step, attempt = choice
                self._upload(step, f"step-{step:08d}-{attempt}")
        except RuntimeError as error:  # another machine is gone; the trainer hears of it by itself
            logger.warning(f"upload: ended ({str(error).splitlines()[0]})")

    def _agree(self, choice: tuple[int, str] | None) -> tuple[int, str] | None:
        box = [choice]
        dist.broadcast_object_list(box, 0, group=self.group)
        return box[0]

    def _next(self) -> tuple[int, str] | None:
        """The newest offer that was not tried, as soon as there is one; None when there will be none."""
        with self.changed:
            self.changed.wait_for(lambda: self.closing or max(self.offers, default=-1) > self.tried)
            newest = max(self.offers, default=-1)
            if newest <= self.tried:
                return None
            self.current = newest
            return newest, self.attempt

    def _upload(self, step: int, name: str) -> None:
        with self.changed:
            self.current = step
            self.changed.wait_for(lambda: max(self.offers, default=-1) >= step)
            offer = self.offers.get(step)  # a machine that had a newer one before it heard of this choice has none
        began, failures = time.monotonic(), [None] * dist.get_world_size(self.group)
        failure = self._put(name, offer) if offer else "a newer one took its place"
        dist.all_gather_object(failures, failure, group=self.group)
        failure = next(filter(None, failures), None)
        if self.first and failure is None:
            failure = self._commit(name, offer[1])
        self.seconds = time.monotonic() - began
        with self.changed:
            self.offers = {other: offer for other, offer in self.offers.items() if other > step}
            self.tried = step
            if failure is None:
                self.committed = step
        if failure:
            logger.warning(f"upload: step {step} is on the disk only ({failure})")

    def _put(self, name: str, offer: Offer) -> str | None:
        """Upload this machine's files; what went wrong."""
        directory, _, files = offer
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for _ in pool.map(lambda file: self.store.put(directory / file, f"{name}/{file}"), files):
                    pass
        except (UserError, OSError) as error:
            return str(error)
        return None

    def _commit(self, name: str, meta: dict[str, Any]) -> str | None:
        try:
            if not self.lease.is_mine():
                return f"the right to write to {self.store.url} is lost"
            self.store.write(f"{name}/{COMMITTED}", manifest.dumps(meta))
        except UserError as error:
            return str(error)
        try:
            self._prune(name, meta["step"])
        except UserError as error:  # there is more than was asked for, not less
            logger.warning(f"upload: older checkpoints could not be removed ({error})")
        return None

    def _prune(self, newest: str, step: int) -> None:
        """Remove what is not to be kept, and uploads that were never finished."""
        committed = checkpoints(self.store, say=lambda line: None)
        kept = manifest.kept((meta["step"] for _, meta in committed), step, self.keep, self.keep_every)
        keep, seen = {newest}, set()
        for name, meta in committed:
            if meta["step"] in kept and meta["step"] not in seen:
                keep.add(name)
            seen.add(meta["step"])
        for name in self.store.directories():
            if name.startswith("step-") and name not in keep:
                self.store.remove(name)


def upload_model(store: Store, directory: Path, meta: dict[str, Any]) -> None:
    """The trained model, with a manifest when it is whole. Raises UserError where storage does not take it."""
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(lambda file: store.put(directory / file, f"{MODEL}/{file}"), files):
            pass
    meta = {**meta, "files": {file: manifest.entry(directory / file) for file in files}}
    store.write(f"{MODEL}/{COMMITTED}", manifest.dumps(meta))


def fetch(store: Store, name: str, files: dict[str, dict[str, Any]], target: Path) -> None:
    """Download files of a checkpoint and prove them. Raises UserError naming one that is not what its manifest says."""
    total = sum(entry["bytes"] for entry in files.values())
    logger.info(f"fetching {len(files)} of its files, {total / 2**30:.2f} GiB, from {store.url}/{name}")

    def one(file: str) -> None:
        store.get(f"{name}/{file}", target / file)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(one, files):
            pass
    if found := manifest.faults(target, {"files": files}, contents=True):
        raise UserError(f"{store.url}/{name}: {next(iter(found.values()))}")
