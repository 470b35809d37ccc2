"""Write, find and load checkpoints on this machine's disk, where they are either complete or not there.

A checkpoint is a directory OUTPUT_DIR/checkpoints/step-00000100. It holds PyTorch's distributed checkpoint (every rank writes
its shards and syncs them to the disk), the run's own files as they were after that step, and `meta.json`, the manifest,
which names every file with its size and XXH3-128. Training waits only while the state is copied to the host's memory. A
thread writes the copy to `….tmp` and publishes it by one rename; then `fastft.train.checkpoint.remote` uploads it. `latest`
is a hint for people and scripts; nothing here reads it. The position of a run is one integer, the step; everything else is
computed again.
"""

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
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

from fastft.common.distributed import (
    everywhere,
    gather_from_all,
    is_loss_of_peer,
    local_rank,
    machine,
    on_first,
    raise_anywhere,
)
from fastft.common.files import (
    REPLACED,
    full_disk,
    is_refusal,
    lack_of_room,
    make_directory,
    publish_directory,
    write_whole,
)
from fastft.errors import UserError, first_line, is_ours
from fastft.model.build import TrainedModel
from fastft.train.checkpoint import manifest
from fastft.train.checkpoint.remote import Uploader

logger = logging.getLogger(__name__)

RUN_FILES = ("run.json", "metrics.jsonl", "samples.jsonl")  # enough to continue as the same run on an empty disk
WRITE_LIMIT = timedelta(hours=2)


class Disk:
    """The directory of the checkpoints, and the `leaders`: the ranks that publish and remove files there, one for each disk.

    If all machines share the directory, rank 0 is the leader; otherwise the first process of each machine is one.
    """

    def __init__(self, directory: Path):
        """Make the directory, and find out whether the machines share it; collective."""
        self.directory = directory
        token = on_first(lambda: secrets.token_hex(4))
        probe = directory / f".shared-{token}"
        first_here = local_rank() == 0
        everywhere((lambda: make_directory(self.directory)) if first_here else None)
        on_first(probe.touch)
        seen = gather_from_all((first_here, probe.exists()))
        on_first(probe.unlink)
        self.shared = all(there for _, there in seen)
        self.leaders = [0] if self.shared else [rank for rank, (first, _) in enumerate(seen) if first]
        self.is_leader = dist.get_rank() in self.leaders

    def manifest_of(self, step: int, own: dict[str, Any]) -> dict[str, Any]:
        """The manifest of what is saved at `step`, without its files: what the run says of itself (`own`), and who writes."""
        return {**own, "step": step, "world_size": dist.get_world_size(), "machines": len(self.leaders)}

    @property
    def machine(self) -> int:
        """The number of the machine on whose disk this rank's files are."""
        return 0 if self.shared else machine()


class Writer:
    """Writes checkpoints while training continues, one at a time, and removes older ones that need not be kept."""

    def __init__(self, disk: Disk, keep: int, keep_every: int = 0, uploader: Uploader | None = None):
        self.disk, self.keep, self.keep_every, self.uploader = disk, keep, keep_every, uploader
        # The thread has a group of its own, so that its messages never meet the trainer's.
        self.group = dist.new_group(backend="gloo", timeout=WRITE_LIMIT)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        pinned = torch.cuda.is_available()
        options = StagingOptions(
            use_pinned_memory=pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=pinned
        )
        self.stager = DefaultStager(options)
        self.bug: Exception | None = None  # raised while writing; `wait` raises it again with its traceback
        self.under_way: tuple[Path, Future[str | None]] | None = None
        self.last_blocking_s: float | None = None  # how long training waited for the last `save`
        self.saves, self.total_blocking_s = 0, 0.0

    def save(self, step: int, model: TrainedModel, optimizer: torch.optim.Optimizer, own: dict[str, Any]) -> None:
        """Copy the state to the host's memory, and leave the writing to the thread; collective. Raises UserError as `wait`.

        `own` is what the run says of itself in the manifest.
        """
        began = time.perf_counter()
        self.wait()
        final = self.disk.directory / f"step-{step:08d}"
        staged = self.stager.stage(_state(model, optimizer))
        meta = self.disk.manifest_of(step, own)
        self.under_way = final, self.thread.submit(self._write, staged, final, meta, self._run_files())
        self.last_blocking_s = time.perf_counter() - began
        self.saves, self.total_blocking_s = self.saves + 1, self.total_blocking_s + self.last_blocking_s

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is published; collective.

        Raises UserError on every rank if any rank could not write, for example because its disk is full. Then nothing is left
        that looks complete. A bug that a rank's thread met while it wrote is raised on that rank with its traceback.
        """
        if self.under_way is None:
            return
        (final, written), self.under_way = self.under_way, None
        if failure := next(filter(None, gather_from_all(written.result())), None):
            if self.disk.is_leader:
                shutil.rmtree(_partial(final), ignore_errors=True)
            raise_anywhere(self.bug)
            raise UserError(
                f"{final}: the checkpoint could not be written ({failure}). Earlier checkpoints are untouched: make room "
                "and start the same command again"
            )
        if self.uploader and on_first(lambda: self.uploader.lease.lost):
            raise UserError(
                f"{self.uploader.store.url}: another run of that name has taken over, or lease.json was removed, so this "
                "run ends; start it again once no other run writes there"
            )

    def end_after_bug_of_upload(self) -> None:
        """Raise the bug that an upload has met on any rank, once what was saved last is on the disk; collective."""
        if self.uploader is None:
            return
        if any(gather_from_all(self.uploader.bug is not None)):
            self.wait()
            raise_anywhere(self.uploader.bug)

    @property
    def patient_groups(self) -> list[dist.ProcessGroup]:
        """The process groups whose messages may take long, because they wait for disks and storage."""
        return [self.group, *([self.uploader.group] if self.uploader else [])]

    def _run_files(self) -> dict[str, bytes]:
        """The run's own files as they are now, by name, on rank 0."""
        if dist.get_rank():
            return {}
        paths = (self.disk.directory.parent / name for name in RUN_FILES)
        return {path.name: path.read_bytes() for path in paths if path.exists()}

    def _write(
        self, state: dict[str, Any], final: Path, meta: dict[str, Any], run_files: dict[str, bytes]
    ) -> str | None:
        """Write and publish a checkpoint; runs in the thread of every rank. Returns what went wrong."""
        partial = _partial(final)
        try:
            if self.disk.is_leader:
                shutil.rmtree(partial, ignore_errors=True)
            dist.barrier(self.group)
            dcp.save(state, checkpoint_id=partial, process_group=self.group)
            for name, content in run_files.items():
                write_whole(partial / name, content, durable=True)
            own = self._describe_own(partial, run_files)
            failure = None
        except (Exception, CheckpointException) as error:  # the latter derives from BaseException
            # Whatever went wrong, the other ranks must be told, because they wait for this rank.
            own, failure = {}, self._failure(error, state, run_files, partial)
            self.bug = _catchable(error) if _is_bug(error) else None
        everyone = gather_from_all((self.disk.machine, own, failure), self.group)
        if failure := next((failure for _, _, failure in everyone if failure), None):
            return failure
        if self.disk.is_leader:
            try:
                self._publish(final, meta, everyone)
            except Exception as error:  # as above
                self.bug = error if _is_bug(error) else None
                return self._failure(error, state, run_files, partial)
        return None

    def _failure(self, error: BaseException, state: dict[str, Any], run_files: dict[str, bytes], partial: Path) -> str:
        """Say what went wrong. If the disk is full, say how much room the checkpoint needs."""
        if (number := full_disk(root_error(error))) is None:
            return root_cause(error)
        # The nbytes of a DTensor are those of the whole tensor, so this counts the shards of all ranks.
        whole = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))
        needed = whole // len(self.disk.leaders) + sum(map(len, run_files.values()))
        return lack_of_room(number, partial, needed, partial)

    def _describe_own(self, partial: Path, run_files: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The manifest's entries for the files that this rank has written."""
        paths = sorted(partial.glob(f"__{dist.get_rank()}_*.distcp"))
        if dist.get_rank() == 0:
            paths += [partial / ".metadata", *(partial / name for name in run_files)]
        return {path.name: manifest.entry(path) for path in paths}

    def _publish(self, final: Path, meta: dict[str, Any], everyone: list[tuple[int, dict[str, Any], Any]]) -> None:
        """Publish the checkpoint with the files that `everyone` has written, offer it to the uploader, and remove old ones."""
        files = {name: entry for _, own, _ in everyone for name, entry in own.items()}
        meta = {**meta, "files": files}
        publish(_partial(final), final, meta)
        if self.uploader:
            here = [name for where, own, _ in everyone for name in own if where == self.disk.machine]
            self.uploader.offer(meta["step"], final, meta, here)
        in_use = self.uploader.in_use() if self.uploader else set()
        prune(self.disk.directory, meta["step"], self.keep, self.keep_every, in_use)


def _is_bug(error: BaseException) -> bool:
    """Whether writing failed because of a bug, and not because the disk refused or another process is gone."""
    root = root_error(error)
    by_torchs_writer = "inline_container.cc" in str(root)
    return not (isinstance(root, UserError) or is_refusal(root) or is_loss_of_peer(root) or by_torchs_writer)


def _partial(final: Path) -> Path:
    """The directory in which a checkpoint is written before it is published."""
    return final.with_name(final.name + ".tmp")


def _state(model: TrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The tensors that training changes. Frozen weights can be read again from the model from which the run started."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"model": trained, "optimizer": get_optimizer_state_dict(model, optimizer)}


def load(path: Path, model: TrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Restore the trained weights and the optimizer in place, on any number of ranks; collective."""
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=path)  # into the weights themselves
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def read_trained(path: Path, names: Iterable[str], dtype: Callable[[str], torch.dtype]) -> dict[str, torch.Tensor]:
    """Read the weights of the parameters `names` from a checkpoint, unsharded, on the CPU, each in the data type dtype(name).

    Parameters that the checkpoint does not hold are left out. Any number of processes may have written it. Raises UserError
    if it cannot be read.
    """
    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        found = {
            name: torch.empty(saved[f"model.{name}"].size, dtype=dtype(name))
            for name in names
            if f"model.{name}" in saved
        }
        dcp.load({"model": found}, checkpoint_id=path)
    except (Exception, CheckpointException) as error:  # bytes that changed can raise anything when they are unpickled
        if is_ours(root_error(error)):
            raise
        raise UserError(f"{path}: the checkpoint cannot be read ({root_cause(error)}); take another one") from None
    return found


def publish(partial: Path, final: Path, meta: dict[str, Any]) -> None:
    """Make the files in `partial` durable, with `meta` as their manifest, and rename the directory to `final`."""
    write_whole(partial / manifest.NAME, manifest.dumps(meta), durable=True)
    publish_directory(partial, final)  # may replace a directory of that name, which is incomplete
    write_whole(final.parent / "latest", f"{final.name}\n", durable=True)


def listing(directory: Path) -> manifest.Listing:
    """List the checkpoints under `directory` whose manifest can be read, without looking at their files."""
    found, passed_over = [], []
    for path in _newest_first(directory):
        try:
            found.append((path, manifest.read(path)))
        except manifest.DamagedError as error:
            passed_over.append(f"{path}: passed over: {error}")
    return manifest.Listing(found, passed_over)


def complete(directory: Path) -> manifest.Listing:
    """List the checkpoints under `directory` whose files are all there and have the right sizes."""
    listed = listing(directory)
    found, passed_over = [], listed.passed_over
    for path, meta in listed.found:
        if fault := _first_fault(path, meta):
            passed_over.append(f"{path}: passed over: {fault}")
        else:
            found.append((path, meta))
    return manifest.Listing(found, passed_over)


def newest(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint and its manifest, or None."""
    return next(iter(complete(directory).found), None)


def _newest_first(directory: Path) -> list[Path]:
    return sorted(filter(_is_checkpoint, directory.glob("step-*")), reverse=True)


def _is_checkpoint(path: Path) -> bool:
    """Whether `path` is a directory with a name that the trainer gives.

    Links, and names such as `step-bestever`, are the user's.
    """
    return manifest.step_of(path.name) is not None and path.is_dir() and not path.is_symlink()


def fault_of(path: Path) -> str | None:
    """Say what is wrong with a published checkpoint, judging by the sizes of its files; None if it is complete."""
    try:
        return _first_fault(path, manifest.read(path))
    except manifest.DamagedError as error:
        return str(error)


def _first_fault(path: Path, meta: dict[str, Any]) -> str | None:
    """Say which file of a checkpoint is missing or of another size than its manifest says; None if there is none."""
    return next(iter(manifest.faults(path, meta).values()), None)


def prune(directory: Path, newest: int, keep: int, keep_every: int = 0, in_use: set[int] = frozenset()) -> None:
    """Remove what need not be kept once step `newest` is published. This removes the remains of interrupted writes, and
    checkpoints that are damaged or of a later step. Of the other checkpoints it keeps the newest `keep`, those whose step is
    a multiple of `keep_every` (0: none), and the steps `in_use`. It never removes a directory without a manifest, or one
    whose name the trainer does not give.
    """
    found = {path: _step_if_whole(path) for path in _newest_first(directory) if (path / manifest.NAME).exists()}
    kept = manifest.kept((step for step in found.values() if step is not None), newest, keep, keep_every) | in_use
    for path in directory.glob("step-*.tmp"):
        if manifest.step_of(path.name.removesuffix(REPLACED).removesuffix(".tmp").removesuffix(".fetch")) is not None:
            shutil.rmtree(path, ignore_errors=True)
    for path, step in found.items():
        if step not in kept:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint. If this is interrupted, the remains have the name of an interrupted write."""
    with suppress(OSError):
        os.rename(path, _partial(path))
        shutil.rmtree(_partial(path))


def _step_if_whole(path: Path) -> int | None:
    """The step of a checkpoint whose files are complete as far as they are on this disk; None if it is damaged.

    If the checkpoint is of several machines, a missing file is no damage, because it may be on the disk of another one.
    """
    try:
        meta = manifest.read(path)
    except (manifest.DamagedError, UserError):
        return None
    faults = manifest.faults(path, meta)
    if meta["machines"] > 1:
        faults = {name: fault for name, fault in faults.items() if (path / name).exists()}
    return None if faults else meta["step"]


def _catchable(error: BaseException) -> Exception:
    """The error itself, or an Exception with the text of a CheckpointException, which has the tracebacks of all ranks.

    CheckpointException derives from BaseException, so that whoever reports bugs would not catch it.
    """
    return error if isinstance(error, Exception) else RuntimeError(str(error))


def root_error(error: BaseException) -> BaseException:
    """The original error, without the exceptions into which distributed checkpointing wraps it."""
    failures = getattr(error, "failures", None)  # CheckpointException: rank -> (exception, stack)
    if failures:
        error = next(iter(failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def root_cause(error: BaseException) -> str:
    """The first line of the original error, in the system's own words."""
    return first_line(root_error(error))
