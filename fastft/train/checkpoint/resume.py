"""Where a run goes on: the newest checkpoint of the same run that can be read.

What must be the same is named (`run_identity`), and saved with every checkpoint; a difference is an error that says what was
and what is, unless --allow_change says that it is meant. Everything else may change: processes, micro-batches, paths.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from fastft.common.distributed import everywhere, on_first
from fastft.common.files import short_name
from fastft.common.object_store import Store
from fastft.config import TrainConfig, stages_of
from fastft.data.step_plan import Curriculum
from fastft.errors import UserError
from fastft.model.build import TrainedModel
from fastft.train.checkpoint import local as checkpoint
from fastft.train.checkpoint.lease import Lease
from fastft.train.checkpoint.remote import MODEL, trained_model

logger = logging.getLogger(__name__)


def open_store(url: str | None, disk: checkpoint.Disk) -> Store | None:
    """Object storage, where it is wanted; collective. Raises UserError where it is not as it must be."""
    if url is None:
        if not disk.shared:
            raise UserError(
                f"{disk.directory}: the machines do not share it, so none would find the others' parts of a checkpoint; give "
                "--checkpoint.remote, or an --output_dir that they share"
            )
        return None
    return everywhere(lambda: Store(url))


def take_lease(store: Store | None, at_exit: ExitStack) -> Lease | None:
    """On rank 0 the lease on storage, until the run leaves; collective. Raises UserError when another run has it."""
    lease = everywhere((lambda: Lease(store)) if store and dist.get_rank() == 0 else None)
    if lease:
        at_exit.callback(lease.release)
    return lease


def finished_model(output_dir: Path, store: Store | None, identity: dict, last: int, adapters: bool) -> str | None:
    """Where the trained model of this run is, None while it is not everywhere that it should be, or its adapters, where some
    are trained, are not beside it; collective. In storage it stands for itself: its checkpoints may be gone.
    """

    def look() -> str | None:
        if store:
            place, made_by = f"{store.url}/{MODEL}", trained_model(store)
        else:
            place, found = str(output_dir / "model"), checkpoint.newest(output_dir / "checkpoints", lambda line: None)
            results = ["model", "adapter"] if adapters else ["model"]
            made_by = found[1] if found and all((output_dir / name).is_dir() for name in results) else None
        if made_by and made_by["step"] == last and not any(_differences("", made_by["identity"], identity)):
            return place
        return None

    return on_first(look)


def find_starts(
    config: TrainConfig, disk: checkpoint.Disk, store: Store | None, identity: dict
) -> list[checkpoint.Candidate]:
    """Checkpoints to go on from, the newest first; collective. Raises UserError when they are another run's."""
    starts = checkpoint.candidates(disk, store)
    if not starts:
        for result in (Path(config.output_dir, name) for name in ("model", "report.json")):  # a model's, the cleaner's
            if result.exists():
                raise UserError(
                    f"{result}: is not this run's; choose another --output_dir, what lies there would be written over"
                )
        if store and on_first(lambda: trained_model(store)):
            raise UserError(
                f"{store.url}/{MODEL}: is the model of another run, or of this one with other settings; give this one another "
                "name, or remove it"
            )
        return []
    where = store.url if store and starts[0].remote else config.output_dir
    if not config.resume:
        raise UserError(f"{where}: holds an earlier run; choose another --output_dir or remove it")
    changed = list(_differences("", starts[0].meta["identity"], identity))
    if not config.stages:
        changed = [difference.removeprefix("stages.") for difference in changed]
    if changed and not config.allow_change:
        raise UserError(
            f"{where}: its checkpoints belong to another run ({'; '.join(changed)}); use another --output_dir, or "
            "the settings of that run, or --allow_change true to go on with these"
        )
    for difference in changed:
        logger.info(f"changed: {difference}")
    return starts


def resume(
    starts: list[checkpoint.Candidate],
    disk: checkpoint.Disk,
    store: Store | None,
    model: TrainedModel,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> dict:
    """Load the newest checkpoint whose files are proven; return what it says of itself, the beginning's without any."""
    for start in starts:
        path, meta = disk.directory / start.name, start.meta
        if fault := checkpoint.fetch(start, disk, store):
            logger.info(f"{path}: passed over: {fault}")
            continue
        try:
            checkpoint.load(path, model, optimizer)
        except (Exception, CheckpointException) as error:  # its bytes are right, but not for this model
            if config.optimizer.name == "adamw_8bit" and meta["world_size"] != dist.get_world_size():
                raise UserError(
                    f"{path}: its 8-bit moments come in blocks that {dist.get_world_size()} processes would tear; "
                    f"go on with {meta['world_size']}"
                ) from None
            logger.info(f"{path}: passed over: cannot be read ({type(error).__name__})")
            continue
        logger.info(f"resumed: step {meta['step']} from {path}")
        if disk.is_holder:
            checkpoint.restore_run_files(path, disk.directory.parent)
        return meta
    if starts:
        raise UserError(f"{disk.directory}: none of its checkpoints can be read; remove them to start again")
    return {"step": 0, "skipped": {}}


def run_identity(config: TrainConfig, curriculum: Curriculum, model: str) -> dict:
    """What must not change under a run that is resumed, by name. Paths may move; their contents may not."""
    values = asdict(config)
    same = (
        "seq_len",
        "overlong",
        "extend",
        "resize_embeddings",
        "lora",
        "global_batch_size",
        "seed",
        "max_grad_norm",
        "z_loss",
        "float8",
        "optimizer",
    )
    identity = {key: values[key] for key in same}
    identity["optimizer"]["betas"] = list(identity["optimizer"]["betas"])
    del identity["optimizer"]["lr"]  # a stage's own
    identity["stages"] = [
        {
            "data": [
                {"file": short_name(s.path), "contents": s.contents, "weight": s.weight, "epochs": s.epochs}
                for s in schedule.data.sources
            ],
            "epochs": stage.epochs,
            "max_steps": stage.max_steps,
            "lr": stage.optimizer.lr,
            "schedule": asdict(stage.schedule),
        }
        for stage, schedule in zip(stages_of(config), curriculum.stages)
    ]
    return {**identity, **curriculum.stages[0].data.digests, "model": model}


def _differences(where: str, earlier: Any, now: Any) -> Iterator[str]:
    """A line for each value that is another: "stages.0.lr was 1e-05 and is 2e-05", "stages.0.data: the contents of …". What is
    alone in its list has no number; a file may have another name.
    """
    if isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
        if len(now) == 1:
            yield from _differences(where, earlier[0], now[0])
            return
        earlier, now = dict(enumerate(earlier)), dict(enumerate(now))
    if isinstance(earlier, dict) and isinstance(now, dict):
        if "contents" in now and earlier["contents"] != now["contents"]:
            yield f"{where}: the contents of {now['file']} are not those that {earlier['file']} had"
        for key in (key for key in now if key not in ("file", "contents")):
            yield from _differences(f"{where}.{key}" if where else str(key), earlier.get(key), now[key])
    elif earlier != now:
        yield f"{where} was {earlier!r} and is {now!r}"
