"""The processes of a run: joining them, doing something on some and hearing on all how it went, leaving.

A machine that is gone closes no connection: only time tells. In the loop nobody is late, and every collective has a limit
of 110 s. Elsewhere one process may make tokens for hours, upload or export while the others wait, so there a thread of each
process tells the others every 5 s that it is there, and ends its process when one has been silent for 110 s.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from fastft.errors import PeerError, UserError

SET_UP_LIMIT = timedelta(hours=12)  # one machine may make the tokens for hours while others wait
STEP_LIMIT = timedelta(seconds=110)  # in the loop nobody has a reason to be later than that: who is, is dead
SILENCE_LIMIT = timedelta(seconds=110)  # with BEAT_S: a dead peer ends the run within two minutes
BEAT_S = 5.0
SPEAKING_S = 10.0  # that rank 0 has to print a mistake which all ranks find before they have joined

Result = TypeVar("Result")


def join_ranks() -> torch.device:
    """Join the process group (torchrun's, or one of this process alone) and return this rank's device."""
    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=SET_UP_LIMIT)
            threading.Thread(
                target=_watch_peers, args=(dist.new_group(backend="gloo"),), name="peers", daemon=True
            ).start()
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def _watch_peers(group: dist.ProcessGroup) -> None:
    """End this process when another one of the run is silent; runs in a thread of every rank."""
    while dist.is_initialized():
        began = time.monotonic()
        try:
            group.monitored_barrier(SILENCE_LIMIT)
        except RuntimeError as error:
            # One that ended has closed its connections: this process hears of it where it waits itself, and knows more.
            time.sleep(max(0.0, began + SILENCE_LIMIT.total_seconds() - time.monotonic()))
            if dist.is_initialized():
                print(f"error: a process of the run is gone: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
                os._exit(1)
            return
        time.sleep(BEAT_S)


def rank() -> int:
    """Number of this process in the run, known before it has joined."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def machine() -> int:
    """Number of this machine in the run."""
    return int(os.environ.get("GROUP_RANK", 0))


def world_size() -> int:
    """How many processes the run has; 1 where none has been joined."""
    return dist.get_world_size() if dist.is_initialized() else 1


def limit_waiting(limit: timedelta, patient: Collection[dist.ProcessGroup] = ()) -> None:
    """How long the collectives to come, in all but the `patient` groups, wait for a rank that does not answer before they
    end the run.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        if group not in patient:
            dist.distributed_c10d._set_pg_timeout(limit, group)


def everywhere(action: Callable[[], Result] | None) -> Result | None:
    """Do `action` on the ranks that have one, and return what it gave; collective.

    An error keeps its kind on its way: a UserError or an OSError on any rank is a UserError on every rank. Of a bug, the rank
    that has it raises it with its traceback, and the others raise PeerError.
    """
    result, error = None, None
    try:
        result = action() if action else None
    except Exception as caught:  # noqa: BLE001  raised again below, once all ranks know
        error = caught
    is_bug = error is not None and not isinstance(error, (UserError, OSError))
    errors: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else (is_bug, str(error)))
    found = [each for each in errors if each]
    if is_bug:
        raise error
    if any(bug for bug, _ in found):
        raise PeerError
    if found:
        raise UserError(found[0][1])
    return result


def on_first(action: Callable[[], Result]) -> Result:
    """What `action` gives on rank 0, on every rank; raises as `everywhere` does."""
    box = [everywhere(action if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(box)
    return box[0]


def first_to_fail() -> bool:
    """True on the rank that meets an error first: the others have the same one, or are its consequence."""
    if not dist.is_initialized():
        if rank() != 0:  # torchrun ends all once one has ended, and rank 0 may be slower to find the same mistake
            time.sleep(SPEAKING_S)
        return rank() == 0
    try:
        return dist.distributed_c10d._get_default_store().add("fastft/failures", 1) == 1
    except dist.DistError:  # the machine with the store is gone: an error that is printed twice beats one that is lost
        return True
