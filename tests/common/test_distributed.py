"""An error on one rank, as the others hear of it: its kind survives, a bug keeps its traceback, and somebody prints it."""

import contextlib
import os
import pickle
import subprocess
import sys

import pytest
from helpers.ports import free_port
from helpers.training import HERE, fails, flags, run

from fastft.common.files import FullDiskError
from fastft.common.storage_faults import NETWORK, StorageError
from fastft.data.template.skeleton import TemplateError
from fastft.errors import UsageError, UserError

# Two ranks, the second of which meets an error. Each writes the class of its error and its exit code, and what it prints.
EVERYWHERE = """
import os, sys, io, contextlib
from fastft.common import command_line, distributed
from fastft.common.files import FullDiskError
from fastft.common.storage_faults import NETWORK, StorageError
from fastft.data.template.skeleton import TemplateError
from fastft.errors import UsageError, UserError
distributed.SPEAKING_S = 0.0
distributed.join_ranks()
def fail():
    exec(sys.argv[2])
def main():
    try:
        distributed.everywhere(fail if distributed.rank() == 1 else None)
    except Exception as error:
        kind.append(type(error).__name__)
        raise
kind, said = [], io.StringIO()
with contextlib.redirect_stderr(said):
    code = command_line.run(main)
with open(f"{sys.argv[1]}{distributed.rank()}", "w") as file:
    print(*kind, code, said.getvalue(), file=file)
command_line.leave(0)
"""


def heard(tmp_path, failure: str) -> list[str]:
    """What each rank says if the second does `failure`: the class of the error, its exit code, and what it prints."""
    (tmp_path / "script.py").write_text(EVERYWHERE)
    done = run(
        [sys.executable, str(HERE / "ranks.py"), "2", str(tmp_path / "script.py"), str(tmp_path / "rank"), failure]
    )
    assert done.returncode == 0, done.stderr
    return [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize(
    "failure, says",
    [
        ("raise UsageError('no such key')", "UsageError 2 error: no such key"),
        ("raise TemplateError('no end of turn')", "TemplateError 1 error: no end of turn"),
        (
            "raise StorageError('s3://b', NETWORK, 'timed out')",
            "StorageError 1 error: s3://b: cannot be reached (timed out)",
        ),
        ("raise FullDiskError('/x: full', 28)", "FullDiskError 1 error: /x: full"),
        ("raise PermissionError(13, 'Permission denied', '/x')", "UserError 1 error: /x: Permission denied"),
        ("raise OSError(28, 'No space left on device', '/x')", "FullDiskError 1 error: /x: No space left on device: "),
    ],
)
def test_a_mistake_on_one_rank_is_the_same_on_all(tmp_path, failure, says):
    for said in heard(tmp_path, failure):
        assert said.startswith(says) and "Traceback" not in said


@pytest.mark.parametrize(
    "failure", ["open('/not/there')", "raise PermissionError(1, 'Not permitted')", "{}['planted']"]
)
def test_a_bug_keeps_its_traceback_on_the_rank_that_met_it(tmp_path, failure):
    """A file of ours that is missing, too: only the place that knows a path of the user's calls it a mistake."""
    first, second = heard(tmp_path, failure)
    assert first.split() == ["PeerError", "1"]
    assert " 1 Traceback (most recent call last)" in second and "in fail" in second and "please report it" in second


@pytest.mark.parametrize(
    "error", [UsageError("x"), TemplateError("x"), FullDiskError("x", 28), StorageError("s3://b", NETWORK, "x", 2.0)]
)
def test_a_mistake_survives_the_way_to_another_process(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    assert isinstance(again, UserError) and again.exit_code == error.exit_code


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", *arguments]


def test_the_second_machine_says_what_is_wrong_with_its_command(ground, tmp_path):
    """torchrun on two machines, of which the second was given another file: it has not joined when it finds out."""
    place = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    (tmp_path / "right.yaml").write_text("seed: 1\n")
    (tmp_path / "wrong.yaml").write_text("sed: 1\n")
    nodes = []
    for number, name in enumerate(("right", "wrong")):
        target = ["-m", "fastft.train", *flags(ground, tmp_path / "out"), "--config", str(tmp_path / f"{name}.yaml")]
        command = torchrun(*place, "--node-rank", str(number), *target)
        nodes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        said, _ = nodes[1].communicate(timeout=200)
    finally:
        for node in nodes:
            with contextlib.suppress(ProcessLookupError):
                node.terminate()
            node.communicate()
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert lines == ["error: unknown key 'sed'; the nearest valid one is 'seed'"], said
    assert nodes[1].returncode == 1


ONE_FAILS = """
import os
from fastft.common import command_line, distributed
from fastft.errors import UserError
def main():
    if os.environ["RANK"] == "1":
        raise UserError("only this process finds it")
    distributed.join_ranks()
command_line.leave(command_line.run(main, distributed.first_to_fail))
"""


@pytest.mark.slow
def test_a_process_that_fails_alone_before_it_has_joined_prints_its_line(tmp_path):
    (tmp_path / "script.py").write_text(ONE_FAILS)
    options = ["--standalone", "--nproc-per-node", "2"]
    done = run([sys.executable, "-m", "torch.distributed.run", *options, str(tmp_path / "script.py")])
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: only this process finds it"
    ]


# A rank that waits for the others for a second, and writes what it says; those in `absent` never come.
JOINS = """
import os, sys, time
from datetime import timedelta
from fastft.common import command_line, distributed
absent = sys.argv[1].split(",")
distributed.JOIN_S, distributed.SPEAKING_S = 1.0, 0.0
if os.environ["RANK"] in absent:
    time.sleep(300)
command_line.leave(command_line.run(distributed.join_ranks, distributed.first_to_fail))
"""


@pytest.mark.parametrize(
    ("rank", "size", "each", "says"),
    [
        (0, 2, None, "process 1 of the run's 2 did not join it within 1 s; look at the last lines there"),
        (0, 4, 2, "processes 1, 2, 3 (machines 0, 1) of the run's 4 did not join it within 1 s"),
        (1, 2, 1, "process 0 (machine 0) cannot be reached at 127.0.0.1:"),
    ],
)
def test_a_rank_alone_names_those_that_are_missing(tmp_path, rank, size, each, says):
    """PyTorch's own rendezvous waits for them in silence, for as long as its collectives may take: twelve hours here."""
    (tmp_path / "script.py").write_text(JOINS)
    port = free_port()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    place |= {"LOCAL_WORLD_SIZE": str(each)} if each else {}
    done = run([sys.executable, str(tmp_path / "script.py"), "none"], env={**os.environ, **place})
    fails(done, says, "start the run again")


@pytest.mark.slow
@pytest.mark.parametrize("absent", [0, 1])
def test_a_machine_whose_process_hangs_is_named_by_the_other(tmp_path, absent):
    """torchrun on two machines: all four processes have started, and those of one never join."""
    (tmp_path / "script.py").write_text(JOINS)
    place = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    hangs = ",".join(str(2 * absent + each) for each in range(2))
    nodes = []
    for number in range(2):
        command = torchrun(
            *place, "--node-rank", str(number), "--nproc-per-node", "2", str(tmp_path / "script.py"), hangs
        )
        nodes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        said, _ = nodes[1 - absent].communicate(timeout=200)
    finally:
        for node in nodes:
            with contextlib.suppress(ProcessLookupError):
                node.terminate()
            node.communicate()
    expected = "processes 2, 3 (machine 1) of the run's 4" if absent else "process 0 (machine 0) of the run's 4"
    assert f"error: {expected} did not join it within 1 s" in said, said
