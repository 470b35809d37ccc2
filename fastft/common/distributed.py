"""Connects the processes of a run: they join, run actions on chosen ranks, share errors, and notice when one of them is
gone.

A machine that disappears does not close its connections, so the others can only notice its silence. In the training loop no
rank is ever late, and every collective fails after 110 s. Elsewhere one process may tokenise, upload or export for hours
while the others wait. So a thread of each process signals every 5 s that it is alive, and ends its own process if another
one has been silent for 110 s.
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

from fastft.common.files import machine_error
from fastft.errors import PeerError, UserError

logger = logging.getLogger(__name__)

SET_UP_LIMIT = timedelta(hours=12)  # one machine may tokenise for hours while the others wait
STEP_LIMIT = timedelta(seconds=110)  # in the loop, no rank that is alive is later than that
SILENCE_LIMIT = timedelta(seconds=110)  # with BEAT_S, a run ends within two minutes after one of its processes is gone
BEAT_S = 5.0  # seconds between two signs of life
JOIN_S = 110.0  # torchrun starts all ranks at the same time, so only the difference of their imports is waited for
SPEAKING_S = 10.0  # time that the rank with an error has to print it before other ranks end

Result = TypeVar("Result")


def join_ranks() -> torch.device:
    """Join torchrun's process group, or without torchrun make one of this process alone; return this rank's device."""
    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            this_rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            store = _part_of_this_start(_open_store(this_rank), this_rank, size)
            dist.init_process_group(backend, store=store, rank=this_rank, world_size=size, timeout=SET_UP_LIMIT)
            threading.Thread(
                target=_watch_peers, args=(dist.new_group(backend="gloo"),), name="peers", daemon=True
            ).start()
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def _join_limit() -> float:
    """Seconds that a rank waits for one that does not come. After a restart, other machines may still be noticing the cause."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return JOIN_S + SILENCE_LIMIT.total_seconds() * restarted


def _open_store(this_rank: int) -> dist.Store:
    """The run's store of keys, which torchrun's agent serves, or else rank 0. Raises UserError if nobody serves it.

    Not PyTorch's env:// rendezvous, in which rank 0 waits for the others without saying who is missing.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = this_rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=_join_limit())
    try:
        store = dist.TCPStore(host, port, is_master=serves, timeout=limit, wait_for_workers=False)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).splitlines()[0]
        what = f"port {port} cannot be opened" if serves else f"{_named([0])} cannot be reached at {host}:{port}"
        raise UserError(f"{what} ({reason}); look at what machine 0 says, and start the run again") from None
    store.set_timeout(SET_UP_LIMIT)
    return store


def _part_of_this_start(store: dist.Store, this_rank: int, size: int) -> dist.Store:
    """A part of `store` that no earlier start has written to; collective. Raises UserError if not all ranks join.

    With --max-restarts torchrun keeps its store, with addresses and counters of processes that are gone. Its number of restarts
    cannot name a start, because each machine counts for itself. So rank 0 draws a random name. Every other rank asks for it with
    a random key of its own, under which rank 0 answers, so that no rank reads an answer to an earlier start.
    """
    if this_rank:
        own = secrets.token_hex(8)
        store.set(f"fastft/asks/{this_rank}", own)
        try:
            store.wait([f"fastft/answer/{own}"], timedelta(seconds=_join_limit()))
        except dist.DistStoreError:
            raise UserError(_not_joined([0])) from None
        name = store.get(f"fastft/answer/{own}").decode()
        store.set(f"{name}/joined/{this_rank}", "")
        return dist.PrefixStore(name, store)
    name, answered, missing = f"fastft/{secrets.token_hex(8)}", set(), [*range(1, size)]
    until = time.monotonic() + _join_limit()
    while missing := [other for other in missing if not store.check([f"{name}/joined/{other}"])]:
        if time.monotonic() > until:
            raise UserError(_not_joined(missing))
        asking = [key for key in (f"fastft/asks/{other}" for other in missing) if store.check([key])]
        for own in {store.get(key).decode() for key in asking} - answered:
            store.set(f"fastft/answer/{own}", name)
            answered.add(own)
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def _not_joined(missing: list[int]) -> str:
    size, seconds = os.environ["WORLD_SIZE"], f"{_join_limit():.0f} s"
    return (
        f"{_named(missing)} of the run's {size} did not join it within {seconds}; look at the last lines there, and start "
        "the run again"
    )


def _named(ranks: list[int]) -> str:
    """Ranks in words, with their machines if torchrun has started equally many on each: processes 2, 3 (machine 1)."""
    size, each = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    machines = sorted({other // each for other in ranks}) if each and size % each == 0 else []
    where = f" (machine{'s' * (len(machines) > 1)} {', '.join(map(str, machines))})" if machines else ""
    return f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks))}{where}"


def _watch_peers(group: dist.ProcessGroup) -> None:
    """End this process if another one has been silent for SILENCE_LIMIT; runs in a thread of every rank."""
    while dist.is_initialized():
        began = time.monotonic()
        try:
            group.monitored_barrier(SILENCE_LIMIT)
        except RuntimeError as error:
            # A process that ended with an error has closed its connections. Then the collectives of the main thread fail, too,
            # with a message that says more than this thread knows, so give them time to print it.
            time.sleep(max(0.0, began + SILENCE_LIMIT.total_seconds() - time.monotonic()))
            if dist.is_initialized():
                logger.error("a process of the run is gone: %s", str(error).splitlines()[0])
                os._exit(1)
            return
        time.sleep(BEAT_S)


def rank() -> int:
    """Return the number of this process in the run; known before it has joined."""
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
    """Set the time after which collectives fail if a rank does not answer, in all groups except the `patient` ones."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if group not in patient:
            dist.distributed_c10d._set_pg_timeout(limit, group)


def everywhere(action: Callable[[], Result] | None) -> Result | None:
    """Call `action` on the ranks that pass one, and return its result there, None elsewhere; collective.

    An error on any rank is an error on every rank, of the same kind. A UserError is raised on all of them with its class and
    its words, and so is what the machine refuses (`machine_error`). The rank that meets a bug raises it with its traceback,
    and the others raise PeerError.
    """
    result, error = None, None
    try:
        result = action() if action else None
    except Exception as caught:  # noqa: BLE001  raised again below, once all ranks know
        error = (machine_error(caught) if isinstance(caught, OSError) else None) or caught
    is_bug = error is not None and not isinstance(error, UserError)
    errors = gather_from_all((is_bug, None if is_bug else error))
    if is_bug:
        raise error
    if any(bug for bug, _ in errors):
        time.sleep(SPEAKING_S)  # as in `first_to_fail`
        raise PeerError
    if mistake := next((mistake for _, mistake in errors if mistake), None):
        raise error or mistake
    return result


def gather_from_all(value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
    """Return the values of all ranks of the group (default: of the run), in their order, on every rank; collective."""
    found: list[Result] = [value] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def raise_anywhere(error: Exception | None) -> None:
    """Raise, on all ranks as `everywhere` does, an error that a thread of some rank met before; collective."""

    def fail() -> None:
        raise error

    everywhere(fail if error else None)


def on_first(action: Callable[[], Result]) -> Result:
    """Call `action` on rank 0, and return its result on every rank; collective. Raises what `everywhere` does."""
    box = [everywhere(action if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(box)
    return box[0]


def is_loss_of_peer(error: BaseException) -> bool:
    """Whether `error` means that a collective failed because another process is gone, which then has the cause."""
    network = dist.DistNetworkError, dist.DistStoreError
    return isinstance(error, network) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def first_to_fail() -> bool:
    """True on the rank that meets an error first, and after `SPEAKING_S` False on the others.

    The others meet the same error or its consequence. torchrun ends all processes once one has ended, so they wait for the
    first to print its error, and usually end with it. Before they have joined, processes cannot know of each other's errors:
    the first one of each machine prints its own, and another one if it was not ended while it waited.
    """
    if dist.is_initialized():
        try:
            first = dist.distributed_c10d._get_default_store().add("fastft/failures", 1) == 1
        except dist.DistError:
            # The process that holds the store is gone. If it has printed an error, torchrun ends this one while it waits.
            time.sleep(SPEAKING_S)
            return True
    elif local_rank() == 0:
        return True
    else:
        time.sleep(SPEAKING_S)
        return True
    if not first:
        time.sleep(SPEAKING_S)
    return first
