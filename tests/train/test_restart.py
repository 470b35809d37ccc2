"""`torchrun --max-restarts`: the same agent, and its store, start the processes of a run again."""

import os
import signal

import pytest
from helpers.training import flags, losses, run, torchrun, train, weights

# The trainer, one rank of which is struck by a signal once, in step 6. Steps take so long that step 4 is published by then.
STRUCK = """
import os, signal, sys, time
from pathlib import Path
from fastft.common import logs
from fastft.common.command_line import leave, run
from fastft.common.distributed import first_to_fail
from fastft.train import loop
number, ours, once = int(sys.argv.pop(1)), sys.argv.pop(1), Path(sys.argv.pop(1))
step = loop.train_step
def struck(*given):
    time.sleep(0.3)
    if given[5] == 6 and os.environ["RANK"] == ours and not once.exists():
        once.touch()
        os.kill(os.getpid(), number)
    return step(*given)
loop.train_step = struck
logs.show()
leave(run(loop.main, first_to_fail))
"""


@pytest.fixture(scope="module")
def on_two(ground, tmp_path_factory):
    """The directory of a run on two processes that nothing has interrupted."""
    out = tmp_path_factory.mktemp("on_two") / "out"
    done = train(ground, out, "--checkpoint.every", "2", processes=2)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ours"), [(signal.SIGKILL, "1"), (signal.SIGKILL, "0"), (signal.SIGTERM, "1")])
def test_a_restart_by_torchrun_goes_on_and_ends_bit_identically(ground, on_two, tmp_path, number, ours):
    out, once, script = tmp_path / "out", tmp_path / "once", tmp_path / "script.py"
    script.write_text(STRUCK)
    arguments = [str(script), str(int(number)), ours, str(once), *flags(ground, out, "--checkpoint.every", "2")]
    # run() gives up after 240 s: no wait of ours may be longer than two minutes.
    done = run(torchrun("--max-restarts", "1", *arguments))
    assert done.returncode == 0, done.stderr
    assert once.exists() and f"from {out}/checkpoints/step-0000000" in done.stderr, done.stderr
    assert "this is a bug" not in done.stderr, done.stderr
    assert losses(out) == losses(on_two)
    expected, found = weights(on_two), weights(out)
    assert expected.keys() == found.keys() and all((expected[name] == found[name]).all() for name in expected)


# Two ranks that join, fail, and join again through the same store, which a real agent keeps.
JOIN_TWICE = """
import os, sys
import torch, torch.distributed as dist
from fastft.common import distributed
distributed.join_ranks()
total = torch.ones(1)
dist.all_reduce(total)
first = distributed.first_to_fail() if distributed.rank() == 0 else None
dist.barrier()
if distributed.rank() == 0:
    with open(sys.argv[1] + ".log", "a") as file:
        print(int(total), first, file=file)
dist.barrier()
if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) == 0:
    os._exit(1)
"""


@pytest.mark.slow
def test_what_a_start_puts_into_torchruns_store_does_not_outlive_it(tmp_path):
    """The count of failures, too: with an earlier start's, no rank would print its error."""
    script = tmp_path / "script.py"
    script.write_text(JOIN_TWICE)
    command = torchrun("--max-restarts", "1", str(script), str(tmp_path / "said"))
    done = run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "said.log").read_text() == "2 True\n2 True\n"
