"""The processes of a run: join them, act on some of them, and tell all of them how it went.

A machine that disappears closes no connection, so its peers can only notice that it is silent. In the training loop no rank
is ever late, and every collective has a limit of 110 s. Elsewhere one process may tokenize for hours, upload or export while
the others wait. There, a thread of each process tells the others every 5 s that it is alive, and ends its process if one of
them has been silent for 110 s.
"""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from fastft.errors import PeerError, UserError

logger = logging.getLogger(__name__)

SET_UP_LIMIT = timedelta(hours=12)  # one machine may tokenize for hours while the others wait
STEP_LIMIT = timedelta(seconds=110)  # in the loop no rank that lives is later than that
SILENCE_LIMIT = timedelta(seconds=110)  # together with BEAT_S, a dead peer ends the run within two minutes
BEAT_S = 5.0  # seconds between two signs of life
JOIN_S = 600.0  # torchrun starts all ranks at the same time, but a cold disk may take minutes to give one its imports
SPEAKING_S = 10.0  # how long the rank with an error has to print it before another rank ends

Result = TypeVar("Result")


def join_ranks() -> torch.device:
    """Join the process group, torchrun's or one of this process alone, and return this rank's device."""
    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            store, this_rank, size = next(dist.rendezvous("env://", timeout=SET_UP_LIMIT))
            store = _part_of_this_start(store, this_rank, size)
            dist.init_process_group(backend, store=store, rank=this_rank, world_size=size, timeout=SET_UP_LIMIT)
            threading.Thread(
                target=_watch_peers, args=(dist.new_group(backend="gloo"),), name="peers", daemon=True
            ).start()
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def _part_of_this_start(store: dist.Store, this_rank: int, size: int) -> dist.Store:
    """The part of `store` that no earlier start has written to; collective. Raises UserError if a rank does not come.

    With --max-restarts torchrun keeps its store, and in it the addresses and counters of the processes that are gone. Its
    count of restarts is no name for a start, because each machine counts for itself. So rank 0 draws a name, and tells it
    to every rank that asks by a name of its own: nothing is ever read that an earlier start wrote.
    """
    until = time.monotonic() + JOIN_S
    if this_rank:
        own = secrets.token_hex(8)
        store.set(f"fastft/asks/{this_rank}", own)
        store.wait([f"fastft/answer/{own}"], timedelta(seconds=JOIN_S))
        name = store.get(f"fastft/answer/{own}").decode()
        store.add(f"{name}/joined", 1)
        return dist.PrefixStore(name, store)
    name, answered = f"fastft/{secrets.token_hex(8)}", set()
    while store.add(f"{name}/joined", 0) < size - 1:
        if time.monotonic() > until:
            raise UserError(
                f"not all of the run's {size} processes have joined it within {JOIN_S:.0f} s; start it again"
            )
        asking = [key for key in (f"fastft/asks/{other}" for other in range(1, size)) if store.check([key])]
        for own in {store.get(key).decode() for key in asking} - answered:
            store.set(f"fastft/answer/{own}", name)
            answered.add(own)
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def _watch_peers(group: dist.ProcessGroup) -> None:
    """End this process if another one of the run is silent; runs in a thread of every rank."""
    while dist.is_initialized():
        began = time.monotonic()
        try:
            group.monitored_barrier(SILENCE_LIMIT)
        except RuntimeError as error:
            # A peer that ended with an error has closed its connections, and this process's own collectives fail with
            # more to say than this thread knows: give them the time.
            time.sleep(max(0.0, began + SILENCE_LIMIT.total_seconds() - time.monotonic()))
            if dist.is_initialized():
                logger.error("a process of the run is gone: %s", str(error).splitlines()[0])
                os._exit(1)
            return
        time.sleep(BEAT_S)


def rank() -> int:
    """Number of this process in the run, known before it has joined."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def machine() -> int:
    """Return the number of this machine in the run."""
    return int(os.environ.get("GROUP_RANK", 0))


def world_size() -> int:
    """Return the number of processes of the run, which is 1 before a group is joined."""
    return dist.get_world_size() if dist.is_initialized() else 1


def limit_waiting(limit: timedelta, patient: Collection[dist.ProcessGroup] = ()) -> None:
    """Set how long collectives wait for a rank that does not answer before they fail, in all groups but the `patient` ones."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if group not in patient:
            dist.distributed_c10d._set_pg_timeout(limit, group)


def everywhere(action: Callable[[], Result] | None) -> Result | None:
    """Do `action` on the ranks that have one, and return its result there; collective.

    An error on any rank is an error on every rank, of the same kind: a UserError or an OSError is a UserError everywhere. The
    rank that meets a bug raises it with its traceback, and the others raise PeerError.
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
        time.sleep(SPEAKING_S)  # as in `first_to_fail`
        raise PeerError
    if found:
        raise UserError(found[0][1])
    return result


def on_first(action: Callable[[], Result]) -> Result:
    """Do `action` on rank 0, and return its result on every rank; collective. Raises what `everywhere` does."""
    box = [everywhere(action if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(box)
    return box[0]


def is_loss_of_peer(error: BaseException) -> bool:
    """Whether `error` is that of a collective whose other end is gone: the peer's own error, or its end, is the cause."""
    network = dist.DistNetworkError, dist.DistStoreError
    return isinstance(error, network) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def first_to_fail() -> bool:
    """True on the rank that meets an error first, and after `SPEAKING_S` False on the others.

    The others meet the same error or its consequence. torchrun ends all processes once one has ended, so they wait for the
    first to print its error, and usually end with it.
    """
    if dist.is_initialized():
        try:
            first = dist.distributed_c10d._get_default_store().add("fastft/failures", 1) == 1
        except dist.DistError:
            # The process that has the store is gone. If it printed an error, this one is ended while it waits.
            time.sleep(SPEAKING_S)
            return True
    else:
        first = rank() == 0
    if not first:
        time.sleep(SPEAKING_S)
    return first
