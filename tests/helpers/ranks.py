"""torchrun for tests: ranks are forked from a process that has imported what all need, so that four cost the imports of one.

    python tests/helpers/ranks.py 4 -m fastft.train --model …        # or a script instead of -m and its module

What torchrun itself does (its signals, its exit code) is tested with torchrun.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # where a script of tests/helpers finds the others

from helpers.forks import PRELOADED, become_main  # noqa: E402
from helpers.ports import free_port  # noqa: E402


def main(processes: int, target: list[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in PRELOADED:
        importlib.import_module(name)
    port = free_port()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [start(rank, target) for rank in range(processes)]
    failed = False
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return int(failed)


def start(rank: int, target: list[str]) -> int:
    """The rank's process id; in the rank itself it does not return."""
    if pid := os.fork():
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    become_main(target)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
