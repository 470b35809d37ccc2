"""Checkpoints that are whole or not there: on this machine's disk first, from there to object storage.

A checkpoint is a directory OUTPUT_DIR/checkpoints/step-00000100: PyTorch's distributed checkpoint (every rank writes its
shards and syncs them to disk), the run's own files as they were after that step, and `meta.json`, the manifest, which names
every file with its size and XXH3-128. A step waits only while the state is copied to the host's memory; a thread writes the
copy as `….tmp` and publishes it by one rename, then `fastft.train.checkpoint.remote` has it. `latest` is a hint for people and scripts:
`candidates` looks at the directories and at the storage, and `fetch` proves the bytes before they are loaded. A run's
position is one integer, the step; everything else is computed again.
"""

import errno
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils._pytree import tree_leaves

from fastft.common.distributed import everywhere, local_rank, machine, on_first
from fastft.common.files import sync, write_whole
from fastft.common.object_store import Store
from fastft.errors import UserError
from fastft.model.build import TrainedModel
from fastft.train.checkpoint import manifest
from fastft.train.checkpoint.remote import Uploader, checkpoints
from fastft.train.checkpoint.remote import fetch as download

logger = logging.getLogger(__name__)

RUN_FILES = ("run.json", "metrics.jsonl", "samples.jsonl")  # with them a run goes on as one on an empty disk
WRITE_LIMIT = timedelta(hours=2)


class Disk:
    """Where checkpoints lie, and which ranks look after a machine's files there: rank 0 where all machines share the
    directory, else the first process of each. Collective.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        token = on_first(lambda: secrets.token_hex(4))
        probe = directory / f".shared-{token}"
        first_here = local_rank() == 0
        everywhere((lambda: directory.mkdir(parents=True, exist_ok=True)) if first_here else None)
        on_first(probe.touch)
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, (first_here, probe.exists()))
        on_first(probe.unlink)
        self.shared = all(there for _, there in seen)
        self.holders = [0] if self.shared else [rank for rank, (first, _) in enumerate(seen) if first]
        self.is_holder = dist.get_rank() in self.holders

    @property
    def machine(self) -> int:
        """On whose disk this rank's files are."""
        return 0 if self.shared else machine()


class Writer:
    """Writes checkpoints while training goes on, one at a time, and removes those that are not to be kept."""

    def __init__(self, disk: Disk, keep: int, keep_every: int = 0, uploader: Uploader | None = None):
        self.disk, self.keep, self.keep_every, self.uploader = disk, keep, keep_every, uploader
        self.group = dist.new_group(backend="gloo", timeout=WRITE_LIMIT)  # the thread's own: its messages must not
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")  # meet the trainer's
        pinned = torch.cuda.is_available()
        options = StagingOptions(
            use_pinned_memory=pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=pinned
        )
        self.stager = DefaultStager(options)
        self.under_way: tuple[Path, Future[str | None]] | None = None
        self.blocking_s: float | None = None  # how long the last `save` kept training waiting
        self.saves, self.blocked_s = 0, 0.0

    def save(self, step: int, model: TrainedModel, optimizer: torch.optim.Optimizer, meta: dict[str, Any]) -> None:
        """Copy the state and leave the rest to the thread; collective. Raises UserError as `wait` does."""
        began = time.perf_counter()
        self.wait()
        final = self.disk.directory / f"step-{step:08d}"
        staged = self.stager.stage(_state(model, optimizer))
        meta = {**meta, "step": step, "world_size": dist.get_world_size(), "machines": len(self.disk.holders)}
        self.under_way = final, self.thread.submit(self._write, staged, final, meta, self._run_files())
        self.blocking_s = time.perf_counter() - began
        self.saves, self.blocked_s = self.saves + 1, self.blocked_s + self.blocking_s

    def wait(self) -> None:
        """Return when the checkpoint under way is published; collective.

        Raises UserError on every rank when any rank could not write (a full disk); nothing that looks whole is left.
        """
        if self.under_way is None:
            return
        (final, written), self.under_way = self.under_way, None
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, written.result())
        if failure := next(filter(None, failures), None):
            if self.disk.is_holder:
                shutil.rmtree(_partial(final), ignore_errors=True)
            raise UserError(
                f"{final}: the checkpoint could not be written ({failure}). Earlier checkpoints are untouched: make room "
                "and start the same command again"
            )
        if self.uploader and on_first(lambda: self.uploader.lease.lost):
            raise UserError(
                f"{self.uploader.store.url}: another run of that name has taken over, or lease.json was removed; this one ends"
            )

    @property
    def patient_groups(self) -> list[dist.ProcessGroup]:
        """Those whose messages wait for disks and storage."""
        return [self.group, *([self.uploader.group] if self.uploader else [])]

    def _run_files(self) -> dict[str, bytes]:
        if dist.get_rank():
            return {}
        paths = (self.disk.directory.parent / name for name in RUN_FILES)
        return {path.name: path.read_bytes() for path in paths if path.exists()}

    def _write(
        self, state: dict[str, Any], final: Path, meta: dict[str, Any], run_files: dict[str, bytes]
    ) -> str | None:
        """Runs in the thread, on every rank; returns what went wrong."""
        partial = _partial(final)
        try:
            if self.disk.is_holder:
                shutil.rmtree(partial, ignore_errors=True)
            dist.barrier(self.group)
            dcp.save(state, checkpoint_id=partial, process_group=self.group)
            for name, content in run_files.items():
                write_whole(partial / name, content, durable=True)
            own = self._describe_own(partial, run_files)
            failure = None
        except (Exception, CheckpointException) as error:  # the latter is no Exception; all ranks must hear of either
            own, failure = {}, self._failure(error, state, partial)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self.disk.machine, own, failure), group=self.group)
        if failure := next((failure for _, _, failure in everyone if failure), None):
            return failure
        if self.disk.is_holder:
            try:
                self._publish(final, meta, everyone)
            except OSError as error:
                return _root_cause(error)
        return None

    def _failure(self, error: BaseException, state: dict[str, Any], partial: Path) -> str:
        """What went wrong. Of a full disk torch's writer says "inline_container.cc:672 . unexpected pos 704 vs 598"."""
        cause = _root_cause(error)
        if "inline_container" not in cause and os.strerror(errno.ENOSPC) not in cause:
            return cause
        whole = sum(
            leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)
        )  # of all processes' shards
        needed = whole / len(self.disk.holders)
        written = sum(path.stat().st_size for path in partial.glob("*"))
        free = shutil.disk_usage(partial.parent).free + written
        return f"{os.strerror(errno.ENOSPC)}: {needed / 2**30:.3g} GiB needed, {free / 2**30:.3g} free"

    def _describe_own(self, partial: Path, run_files: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The manifest's entries for the files that this rank has written."""
        paths = sorted(partial.glob(f"__{dist.get_rank()}_*.distcp"))
        if dist.get_rank() == 0:
            paths += [partial / ".metadata", *(partial / name for name in run_files)]
        return {path.name: manifest.entry(path) for path in paths}

    def _publish(self, final: Path, meta: dict[str, Any], everyone: list[tuple[int, dict[str, Any], Any]]) -> None:
        files = {name: entry for _, own, _ in everyone for name, entry in own.items()}
        meta = {**meta, "files": files}
        publish(_partial(final), final, meta)
        if self.uploader:
            here = [name for where, own, _ in everyone for name in own if where == self.disk.machine]
            self.uploader.offer(meta["step"], final, meta, here)
        in_use = self.uploader.in_use() if self.uploader else set()
        prune(self.disk.directory, meta["step"], self.keep, self.keep_every, in_use)


def _partial(final: Path) -> Path:
    return final.with_name(final.name + ".tmp")


def load(path: Path, model: TrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Restore trained weights and optimiser in place; collective; any number of ranks."""
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=path)  # into the weights themselves
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _state(model: TrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What training changes. Frozen weights are where they came from."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"model": trained, "optimizer": get_optimizer_state_dict(model, optimizer)}


# Which checkpoint to go on from --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that has a manifest: on disks, in storage (its directory there), or both."""

    meta: dict[str, Any]
    remote: str | None

    @property
    def name(self) -> str:
        return f"step-{self.meta['step']:08d}"


def candidates(disk: Disk, store: Store | None) -> list[Candidate]:
    """The newest first, those on disk before others of the same step; collective.

    Raises UserError when there are checkpoints but none whose manifest can be read: a run does not start again unasked.
    """
    damaged: list[str] = []

    def pass_over(line: str) -> None:
        damaged.append(line)
        logger.info(line)

    here = everywhere(lambda: _manifests(disk.directory, pass_over)) if disk.is_holder else everywhere(None)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, here or [])

    def join() -> list[Candidate]:
        stored = checkpoints(store, pass_over) if store else []
        places = {_identity(meta): name for name, meta in reversed(stored)}
        on_disk = {_identity(meta): meta for manifests in everyone for meta in manifests}
        found = [Candidate(meta, places.get(key)) for key, meta in on_disk.items()]
        found += [Candidate(meta, name) for name, meta in stored if _identity(meta) not in on_disk]
        found.sort(key=lambda c: c.meta["step"], reverse=True)  # stable: those on disk stay first
        if damaged and not found:
            raise UserError(f"{damaged[0]}; there is no other checkpoint. Remove it to start again from the first step")
        return found

    return on_first(join)


def _identity(meta: dict[str, Any]) -> str:
    return manifest.dumps({"step": meta["step"], "files": meta["files"]})


def _manifests(directory: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    found = []
    for path in directory.glob("step-????????"):
        try:
            found.append(manifest.read(path))
        except manifest.DamagedError as error:
            say(f"{path}: passed over: {error}")
    return found


def fetch(candidate: Candidate, disk: Disk, store: Store | None) -> str | None:
    """Have all its files, proven, in the directory of each holder; collective. Returns what stands in the way."""
    fault = None
    if disk.is_holder:
        try:
            fault = _complete_files(candidate, disk.directory / candidate.name, store)
        except (UserError, OSError) as error:
            fault = str(error)
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, fault)
    return next(filter(None, everyone), None)


def _complete_files(candidate: Candidate, path: Path, store: Store | None) -> str | None:
    lacking = manifest.faults(path, candidate.meta, contents=True)
    if not lacking and _has_manifest(path):
        return None
    if candidate.remote is None or store is None:
        return next(iter(lacking.values()), f"{manifest.NAME} is missing")
    if _has_manifest(path) and lacking:  # a copy that was whole once
        logger.info(f"{path}: {next(iter(lacking.values()))}; storage has it")
    partial = path.with_name(path.name + ".fetch.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in candidate.meta["files"].keys() - lacking.keys():
        os.link(path / name, partial / name)
    download(store, candidate.remote, {name: candidate.meta["files"][name] for name in lacking}, partial)
    publish(partial, path, {key: value for key, value in candidate.meta.items() if key != "format"})
    return None


def _has_manifest(path: Path) -> bool:
    return (path / manifest.NAME).exists()


def restore_run_files(path: Path, output_dir: Path) -> None:
    """On a disk that does not know the run: its files as they were after the checkpoint's step."""
    for name in RUN_FILES:
        if (path / name).exists() and not (output_dir / name).exists():
            shutil.copyfile(path / name, output_dir / name)


# Directories on one disk ---------------------------------------------------------------------------------------------------


def complete(directory: Path, say: Callable[[str], None] = print) -> list[tuple[Path, dict[str, Any]]]:
    """Checkpoints whose files are all here, by their sizes, the newest first. `say` is told of those passed over."""
    found = []
    for path in sorted(directory.glob("step-????????"), reverse=True):
        fault = fault_of(path)
        if fault is None:
            found.append((path, manifest.read(path)))
        else:
            say(f"{path}: passed over: {fault}")
    return found


def newest(directory: Path, say: Callable[[str], None] = print) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint and its manifest, or None."""
    return next(iter(complete(directory, say)), None)


def fault_of(path: Path) -> str | None:
    """What is wrong with a published checkpoint, None if it is complete."""
    try:
        return next(iter(manifest.faults(path, manifest.read(path)).values()), None)
    except manifest.DamagedError as error:
        return str(error)


def prune(directory: Path, newest: int, keep: int, keep_every: int = 0, in_use: set[int] = frozenset()) -> None:
    """Once step `newest` is published: remove what interrupted writes left, checkpoints that are damaged or later, and of the
    others all but the newest `keep`, those whose step is a multiple of `keep_every` (0: none), and those in use.
    """
    found = {path: _step_if_whole(path) for path in directory.glob("step-????????")}
    kept = manifest.kept((step for step in found.values() if step is not None), newest, keep, keep_every) | in_use
    for path in (*found, *directory.glob("*.tmp")):
        if found.get(path) not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _step_if_whole(path: Path) -> int | None:
    """The step of a checkpoint whose files are here, or partly on other machines' disks."""
    try:
        meta = manifest.read(path)
    except (manifest.DamagedError, UserError):
        return None
    faults = manifest.faults(path, meta)
    if meta["machines"] > 1:
        faults = {name: fault for name, fault in faults.items() if (path / name).exists()}
    return None if faults else meta["step"]


def read_trained(path: Path, names: Iterable[str], dtype: Callable[[str], torch.dtype]) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint holds among the parameters `names`, whole, on the CPU, each in dtype(name).

    Any number of processes may have written it. Raises UserError where it cannot be read.
    """
    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        found = {
            name: torch.empty(saved[f"model.{name}"].size, dtype=dtype(name))
            for name in names
            if f"model.{name}" in saved
        }
        dcp.load({"model": found}, checkpoint_id=path)
    except (Exception, CheckpointException) as error:  # damaged in a way that its sizes do not show
        raise UserError(f"{path}: the checkpoint cannot be read ({_root_cause(error)})") from None
    return found


def publish(partial: Path, final: Path, meta: dict[str, Any]) -> None:
    """Everything durable, then the rename, then the hint."""
    write_whole(partial / manifest.NAME, manifest.dumps(meta), durable=True)
    sync(partial)
    shutil.rmtree(final, ignore_errors=True)  # an incomplete one of that name
    os.rename(partial, final)
    sync(final.parent)
    write_whole(final.parent / "latest", f"{final.name}\n", durable=True)


def _root_cause(error: BaseException) -> str:
    """The operating system's own words, from under the wrapping of distributed checkpointing."""
    failures = getattr(error, "failures", None)  # CheckpointException: rank -> (exception, stack)
    if failures:
        error = next(iter(failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
