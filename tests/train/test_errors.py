"""What several processes print: messages once, an error once, and a bug with its traceback, whichever rank meets it."""

import pytest
from helpers.training import command, flags, run, torchrun, train

# Rank 1 meets an error: in the third step, while rank 0 waits for it, or where the ranks hear of each other's errors.
FAILS_ON_RANK_1 = """
import os, sys
from fastft.common import logs
from fastft.common.command_line import leave, run
from fastft.common.distributed import everywhere, first_to_fail
from fastft.errors import UserError
from fastft.train import loop
kind, moment = sys.argv[1:3]
del sys.argv[1:3]
on_rank_1, step, taken = os.environ["RANK"] == "1", loop.train_step, 0
def fail():
    raise RuntimeError("a bug of rank 1") if kind == "bug" else UserError("a mistake that rank 1 finds; mend it")
def third_fails(*given):
    global taken
    taken += 1
    return fail() if on_rank_1 and taken == 3 else step(*given)
if moment == "step":
    loop.train_step = third_fails
else:
    loop.open_reporter = lambda *given: everywhere(fail if on_rank_1 else None)
logs.show()
leave(run(loop.main, first_to_fail))
"""


def start(tmp_path, ground, by_torchrun: bool, *arguments: str):
    script = tmp_path / "script.py"
    script.write_text(FAILS_ON_RANK_1)
    target = [str(script), *arguments, *flags(ground, tmp_path / "out")]
    if by_torchrun:
        return run(torchrun(*target))
    return run(command(2, target))


@pytest.mark.parametrize(
    ("by_torchrun", "moment"),
    [
        (False, "step"),
        (False, "together"),
        pytest.param(True, "together", marks=pytest.mark.slow),
        pytest.param(True, "step", marks=pytest.mark.slow),
    ],
)
def test_a_bug_on_one_rank_ends_with_its_traceback_once(ground, tmp_path, by_torchrun, moment):
    done = start(tmp_path, ground, by_torchrun, "bug", moment)
    assert done.returncode == 1, done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith(("RuntimeError: ", "error: "))]
    assert ours[0] == "RuntimeError: a bug of rank 1" and "this is a bug in fastft" in ours[1], done.stderr
    assert len(ours) == 2 and done.stderr.count("Traceback (most recent call last)") == 1 + by_torchrun, done.stderr


@pytest.mark.parametrize("moment", ["step", "together"])
def test_a_mistake_on_one_rank_ends_with_one_line(ground, tmp_path, moment):
    done = start(tmp_path, ground, False, "mistake", moment)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: a mistake that rank 1 finds; mend it"]


def test_messages_are_those_of_one_rank(ground, tmp_path):
    done = train(ground, tmp_path / "out", "--max_steps", "1", processes=2)
    assert done.returncode == 0, done.stderr
    for words in ("data: ", "plan: ", "attention: ", "step 1/1", "first step after", "done: 1 steps"):
        assert done.stderr.count(words) == 1, done.stderr


def test_a_mistake_in_the_command_is_one_line_of_one_rank(ground, tmp_path):
    done = train(ground, tmp_path / "out", "--sed", "1", processes=2)
    assert done.returncode == 1 and done.stderr == "error: unknown key 'sed'; the nearest valid one is 'seed'\n"


BUGS_WHILE_A_CHECKPOINT_IS_WRITTEN = {
    "ours": "from fastft.train.checkpoint import manifest\nmanifest.entry = planted\n",
    # torch raises a CheckpointException, which is no Exception.
    "in torch's writer": "from torch.distributed.checkpoint import FileSystemWriter\nFileSystemWriter.write_data = planted\n",
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("where", BUGS_WHILE_A_CHECKPOINT_IS_WRITTEN)
def test_a_bug_while_a_checkpoint_is_written_is_no_full_disk(ground, tmp_path, where, processes):
    script = tmp_path / "script.py"
    script.write_text(
        "from fastft.common import logs\n"
        "from fastft.common.command_line import leave, run\n"
        "from fastft.common.distributed import first_to_fail\n"
        "from fastft.train import loop\n"
        "def planted(*given):\n"
        "    raise KeyError('planted')\n" + BUGS_WHILE_A_CHECKPOINT_IS_WRITTEN[where] + "logs.show()\n"
        "leave(run(loop.main, first_to_fail))\n"
    )
    options = [*flags(ground, tmp_path / "out"), "--max_steps", "2"]
    done = run(command(processes, [str(script), *options]))
    assert done.returncode == 1 and "Traceback" in done.stderr and "in planted" in done.stderr, done.stderr
    assert "make room" not in done.stderr and done.stderr.count("please report it") == 1, done.stderr
