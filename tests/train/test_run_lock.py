"""One run writes to a directory, whatever is started there: real processes, and the locks of the system."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import time

import pytest
from helpers import forks
from helpers.disks import small_disk
from helpers.ports import free_port
from helpers.training import HERE, command, fails, flags, run, train_here

from fastft.train.report.metrics import read_metrics

LONG = ("--epochs", "4000", "--max_steps", "8000", "--trackers", "none", "--checkpoint.every", "0")


@pytest.fixture
def running(ground, tmp_path):
    """A run on two processes, in the middle of its steps: (its directory, its process)."""
    out, log = tmp_path / "out", tmp_path / "log"
    with log.open("w") as file:
        process = forks.Process([HERE / "ranks.py", "2", "-m", "fastft.train", *flags(ground, out, *LONG)], stderr=file)
    while "first step after" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    yield out, process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_second_start_is_refused_by_name_and_touches_nothing(ground, running):
    out, process = running
    (out / "preempted").write_text("of the first")
    before = read_metrics(out / "metrics.jsonl")
    done = train_here(ground, out, *LONG)
    holder = json.loads((out / ".lock").read_text())
    who = f"({socket.gethostname()}, process {holder['pid']})"
    fails(
        done,
        f"output_dir {out}: another run is writing there {who}; wait until it has ended, or choose another --output_dir",
    )
    assert process.poll() is None and read_metrics(out / "metrics.jsonl")[: len(before)] == before
    assert (out / "preempted").read_text() == "of the first"
    os.killpg(process.pid, signal.SIGKILL)  # death releases it
    process.wait()
    with (out / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the ranks are dead, too, which nobody waits for
    done = train_here(ground, out, "--max_steps", "2", "--trackers", "none")
    assert done.returncode == 0, done.stderr


# The locks of one run on machines that share their directory, or do not; then another run comes to each.
MACHINES = """
import os, sys, time
from contextlib import ExitStack
from pathlib import Path
import torch.distributed as dist
from fastft.common import distributed
from fastft.errors import UserError
from fastft.train import run_lock
place = Path(sys.argv[1].replace("N", os.environ["GROUP_RANK"]))
distributed.join_ranks()
with ExitStack() as first, ExitStack() as second:
    run_lock.lock(place, first)
    try:
        run_lock.lock(place, second)
        print("taken twice")
    except UserError as error:
        print(error)
dist.barrier()
with ExitStack() as later:
    run_lock.lock(place, later)
print("free again")
"""


@pytest.mark.parametrize("place", ["shared", "machineN"])
def test_several_machines_of_one_run_may_share_a_directory_or_not(tmp_path, place):
    port = free_port()
    ranks = []
    for machine, local in ((0, 0), (0, 1), (1, 0), (1, 1)):
        where = {"RANK": 2 * machine + local, "LOCAL_RANK": local, "GROUP_RANK": machine, "WORLD_SIZE": 4}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = os.environ | {key: str(value) for key, value in where.items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        ranks.append(forks.Process(["-c", MACHINES, tmp_path / place], env=environment, **pipes))
    for rank in ranks:
        errors = rank.stderr.read()
        refused, free = rank.stdout.read().splitlines()
        assert f"another run is writing there ({socket.gethostname()}, process {ranks[0].pid})" in refused, errors
        assert free == "free again"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_one_warning(ground, tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    done = train_here(ground, tmp_path / "out", "--max_steps", "1", "--trackers", "none")
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert line.startswith(f"warning: output_dir {tmp_path / 'out'}: cannot be locked there ({os.strerror(number)})")


def test_a_file_in_its_place_or_a_lock_that_nobody_can_read_is_one_line(ground, tmp_path):
    (tmp_path / "out").write_text("")
    fails(
        train_here(ground, tmp_path / "out"), f"{tmp_path / 'out'}: cannot be made a directory (a file is in the way)"
    )
    held = tmp_path / "held"
    held.mkdir()
    with (held / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("not JSON")
        file.flush()
        fails(train_here(ground, held), "another run is writing there (which has not said yet who it is)")
    assert sorted(path.name for path in held.iterdir()) == [".lock"]


def test_a_directory_that_a_full_disk_cannot_make_is_one_line_with_its_numbers(ground, tmp_path):
    with small_disk(tmp_path / "disk", 64 << 10, inodes=1) as disk:
        done = train_here(ground, disk / "out")
    fails(done, f"{disk / 'out'}: No space left on device: ", " free; make room there")


@pytest.mark.slow
def test_processes_of_one_run_on_one_machine_do_not_lock_each_other_out(ground, tmp_path):
    out = tmp_path / "out"
    more = ("--max_steps", "2", "--trackers", "none")
    for _ in range(2):  # a finished run is no other run, and leaves no lock
        done = run(command(2, ["-m", "fastft.train", *flags(ground, out, *more)]))
        assert done.returncode == 0, done.stderr
    assert "finished: step 2 of 2" in done.stderr
