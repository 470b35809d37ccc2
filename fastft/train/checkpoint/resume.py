"""Continue a run at the newest checkpoint that belongs to it and can be read.

`find_candidates` looks for checkpoints on the disks and in the storage. `resume` checks all bytes of a checkpoint before it
loads them, and takes the next older one if they are wrong. Only a checkpoint that disagrees with its manifest is passed over.
If the storage does not answer, the disk is full or access is refused, the start ends with an error after minutes of trying,
and the same command continues later.
"""

import logging
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from fastft.common.distributed import everywhere, gather_from_all, on_first
from fastft.common.object_store import Store
from fastft.config import TrainConfig
from fastft.errors import UserError, is_ours
from fastft.model.build import TrainedModel
from fastft.train.checkpoint import local, manifest, remote
from fastft.train.checkpoint.identity import differences
from fastft.train.checkpoint.lease import Lease
from fastft.train.checkpoint.local import RUN_FILES, Disk

logger = logging.getLogger(__name__)


def open_store(url: str | None, disk: Disk) -> Store | None:
    """Open the object storage at `url`, if one is given; collective.

    Raises UserError if it cannot be opened, and if none is given although the machines do not share `disk`.
    """
    if url is None:
        if not disk.shared:
            raise UserError(
                f"{disk.directory}: the machines do not share it, so none would find the others' parts of a checkpoint; give "
                "--checkpoint.remote, or an --output_dir that they share"
            )
        return None
    return everywhere(lambda: Store(url))


def take_lease(store: Store | None, at_exit: ExitStack) -> Lease | None:
    """Take the lease on the storage, on rank 0, until the run ends; collective. Raises UserError if another run holds it."""
    lease = everywhere((lambda: Lease(store)) if store and dist.get_rank() == 0 else None)
    if lease:
        at_exit.callback(lease.release)
    return lease


def finished_model(output_dir: Path, store: Store | None, identity: dict, last: int, adapters: bool) -> str | None:
    """Where the trained model of this run is, or None if the run is not finished; collective.

    Where there is storage, the run is finished if the model of step `last` is there: the checkpoints may have been removed.
    Otherwise it is finished if the newest checkpoint is that of step `last` and the model is beside it, with its adapters if
    `adapters` are trained.
    """

    def look() -> str | None:
        if store:
            place, made_by = f"{store.url}/{remote.MODEL}", remote.trained_model(store)
        else:
            place, found = str(output_dir / "model"), local.newest(output_dir / "checkpoints")
            results = ["model", "adapter"] if adapters else ["model"]
            made_by = found[1] if found and all((output_dir / name).is_dir() for name in results) else None
        if made_by and made_by["step"] == last and not differences(made_by["identity"], identity):
            return place
        return None

    return on_first(look)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint from which a run may continue, on disks, in storage, or in both."""

    meta: dict[str, Any]
    """Its manifest."""
    remote: str | None
    """Its directory in storage, if it is there."""

    @property
    def name(self) -> str:
        """The name of its directory on a disk."""
        return f"step-{self.meta['step']:08d}"


def find_candidates(config: TrainConfig, disk: Disk, store: Store | None, identity: dict) -> list[Candidate]:
    """Find the checkpoints that this run may continue from, the newest first; collective.

    Raises UserError if they belong to another run, or if this run would overwrite something that is not its own.
    """
    candidates = list_checkpoints(disk, store)
    if not candidates:
        _refuse_to_overwrite(config, store)
        return []
    where = store.url if store and candidates[0].remote else config.output_dir
    if not config.resume:
        raise UserError(f"{where}: holds an earlier run; choose another --output_dir or remove it")
    changed = differences(candidates[0].meta["identity"], identity)
    if not config.stages:
        changed = [difference.removeprefix("stages.") for difference in changed]
    if changed and not config.allow_change:
        raise UserError(
            f"{where}: its checkpoints belong to another run ({'; '.join(changed)}); use another --output_dir, or "
            "the settings of that run, or --allow_change true to continue with these"
        )
    for difference in changed:
        logger.info("changed: %s", difference)
    return candidates


def _refuse_to_overwrite(config: TrainConfig, store: Store | None) -> None:
    """Raise UserError if a run without a checkpoint would overwrite results that are there; collective."""
    for result in (Path(config.output_dir, name) for name in ("model", "report.json")):  # the latter is the cleaner's
        if result.exists():
            raise UserError(f"{result}: is not this run's and would be overwritten; choose another --output_dir")
    if store and on_first(lambda: remote.trained_model(store)):
        raise UserError(
            f"{store.url}/{remote.MODEL}: is the model of another run, or of this one with other settings; give this one "
            "another --checkpoint.remote, or remove it"
        )


def list_checkpoints(disk: Disk, store: Store | None) -> list[Candidate]:
    """All checkpoints with a manifest, the newest first; of the same step those on disk come first. Collective.

    Raises UserError if there are checkpoints but no manifest can be read, because a run must not silently begin again from
    its first step.
    """
    here = everywhere((lambda: local.listing(disk.directory)) if disk.is_leader else None)
    everyone = gather_from_all(here or manifest.Listing([], []))

    def join() -> list[Candidate]:
        stored = remote.checkpoints(store) if store else manifest.Listing([], [])
        passed_over = [line for listing in (*everyone, stored) for line in listing.passed_over]
        for line in passed_over:
            logger.warning(line)
        places = {_contents(meta): name for name, meta in reversed(stored.found)}
        on_disk = {_contents(meta): meta for listing in everyone for _, meta in listing.found}
        found = [Candidate(meta, places.get(key)) for key, meta in on_disk.items()]
        found += [Candidate(meta, name) for name, meta in stored.found if _contents(meta) not in on_disk]
        found.sort(key=lambda c: c.meta["step"], reverse=True)  # a stable sort, so those on disk stay before the others
        if passed_over and not found:
            raise UserError(
                f"{passed_over[0]}; there is no other checkpoint. Put its manifest back, or move it away to start again from "
                "the first step"
            )
        if store and not found:
            _warn_of_unfinished_uploads(store)
        return found

    return on_first(join)


def _warn_of_unfinished_uploads(store: Store) -> None:
    """Warn, before the run starts at its first step, if the storage holds files of checkpoints but no manifest."""
    if left := remote.directories(store):
        logger.warning(
            f"{store.url}: holds files of {len(left)} checkpoints ({left[-1]}, …) but no manifest ({remote.COMMITTED}), which is "
            "written last: no upload was finished, or somebody removed them. The run starts at its first step"
        )


def _contents(meta: dict[str, Any]) -> str:
    """A text that identifies a checkpoint's contents: equal for two copies of one checkpoint, different for two
    checkpoints."""
    return manifest.dumps({"step": meta["step"], "files": meta["files"]})


def resume(
    candidates: list[Candidate],
    disk: Disk,
    store: Store | None,
    model: TrainedModel,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> dict[str, Any]:
    """Load the newest of `candidates` that can be read, and return its manifest; collective.

    Without `candidates` this returns the manifest of a run before its first step. Raises UserError if none can be read.
    """
    damaged = []
    for candidate in candidates:
        path, meta = disk.directory / candidate.name, candidate.meta
        if fault := fetch(candidate, disk, store):
            damaged.append(fault)
            logger.warning("%s: passed over: %s", path, fault)
            continue
        try:
            local.load(path, model, optimizer)
        except torch.OutOfMemoryError:
            raise
        except (Exception, CheckpointException) as error:  # the bytes are right, but do not fit this model
            if is_ours(local.root_error(error)):
                raise
            if config.optimizer.name == "adamw_8bit" and meta["world_size"] != dist.get_world_size():
                raise UserError(
                    f"{path}: {dist.get_world_size()} processes would cut its 8-bit moments within their blocks; "
                    f"continue with {meta['world_size']} process{'es' if meta['world_size'] > 1 else ''}"
                ) from None
            raise UserError(
                f"{path}: its files are what was written, but cannot be loaded ({local.root_cause(error)}); use the settings "
                "and the versions of fastft and torch that wrote it, or move it away to continue from an older one"
            ) from None
        logger.info("resumed: step %d from %s", meta["step"], path)
        if disk.is_leader:
            _restore_run_files(path, disk.directory.parent)
        return meta
    if damaged:
        raise UserError(
            f"{disk.directory}: none of its checkpoints can be read: each disagrees with its manifest ({damaged[0]}); move "
            "them away to start again from the first step"
        )
    return {"step": 0, "skipped": {}}


def fetch(candidate: Candidate, disk: Disk, store: Store | None) -> str | None:
    """Bring all files of a checkpoint to the disk of every machine, and check their contents; collective.

    Returns what disagrees with the manifest, or None. Raises UserError on every rank if a machine could not check.
    """
    path = disk.directory / candidate.name
    fault = everywhere((lambda: complete_files(candidate, path, store)) if disk.is_leader else None)
    return next(filter(None, gather_from_all(fault)), None)


def complete_files(candidate: Candidate, path: Path, store: Store | None) -> str | None:
    """Download the files of a checkpoint that are missing or damaged in its directory `path`.

    Returns what is wrong if there is no good copy in storage, otherwise None. Raises UserError or OSError if the disk or the
    storage does not answer.
    """
    lacking = manifest.faults(path, candidate.meta, contents=True)
    has_manifest = (path / manifest.NAME).exists()
    if not lacking and has_manifest:
        return None
    if candidate.remote is None or store is None:
        return next(iter(lacking.values()), f"{manifest.NAME} is missing")
    damaged = [fault for name, fault in lacking.items() if candidate.meta["machines"] == 1 or (path / name).exists()]
    if has_manifest and damaged:  # it was complete once; of several machines, each has only what it wrote
        logger.warning("%s: %s; fetching it from storage", path, damaged[0])
    partial = path.with_name(path.name + ".fetch.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name in candidate.meta["files"].keys() - lacking.keys():
            os.link(path / name, partial / name)
        files = {name: candidate.meta["files"][name] for name in lacking}
        if fault := remote.download(store, candidate.remote, files, partial):
            return fault
        local.publish(partial, path, {key: value for key, value in candidate.meta.items() if key != "format"})
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return None


def _restore_run_files(path: Path, output_dir: Path) -> None:
    """Copy the run's own files, as they were after the checkpoint's step, into an output directory that lacks them."""
    for name in RUN_FILES:
        if (path / name).exists() and not (output_dir / name).exists():
            shutil.copyfile(path / name, output_dir / name)
