"""Lock a run's directory, OUTPUT_DIR, so that no other run writes there at the same time.

The first process of each machine locks the file OUTPUT_DIR/.lock for as long as it lives. The system releases the lock when
that process ends, however it ends. The file itself stays, and says who had the lock last.
"""

import fcntl
import json
import logging
import os
import secrets
import socket
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from fastft.common.distributed import everywhere, local_rank, on_first
from fastft.common.files import make_directory, room_for
from fastft.errors import UserError

logger = logging.getLogger(__name__)

NAME = ".lock"


def lock(directory: Path, at_exit: ExitStack) -> None:
    """Create `directory` and lock it until `at_exit` closes; collective.

    Raises UserError if another run has the lock, which the message names, and if nothing can be written there.
    """
    token = on_first(lambda: secrets.token_hex(8))
    is_first, is_first_here = dist.get_rank() == 0, local_rank() == 0
    # Rank 0 goes first, so that a machine which shares its directory finds the run's own token in the file.
    for takes_lock in (is_first, is_first_here and not is_first):
        everywhere((lambda: _take(directory, token, at_exit)) if takes_lock else None)


def _take(directory: Path, token: str, at_exit: ExitStack) -> None:
    """Take the lock for the run with this `token`, or find that another machine of the same run has it."""
    path = directory / NAME
    make_directory(directory)
    try:
        with room_for(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"output_dir {directory}: cannot be written to ({error.strerror})") from None
    at_exit.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(descriptor)
        if holder.get("token") == token:
            return  # another machine of this run has it, on the disk that they share
        raise UserError(
            f"output_dir {directory}: another run is writing there ({_who(holder)}); wait until it has ended, or choose "
            "another --output_dir"
        ) from None
    except OSError as error:
        logger.warning(
            "output_dir %s: cannot be locked there (%s), so nothing stops a second run; start only one",
            directory,
            error.strerror,
        )
        return
    if _holder(descriptor).get("token") == token:
        return  # the machines share the directory, but its file system does not share locks
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": token}).encode()
    with room_for(path, len(text)):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
        os.fsync(descriptor)


def _holder(descriptor: int) -> dict:
    """What the lock file says about the run that has the lock; {} if a run has not written it."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _who(holder: dict) -> str:
    """The holder of the lock, for a message."""
    return f"{holder.get('host')}, process {holder.get('pid')}" if holder else "which has not said yet who it is"
