"""`torchrun -m fastft.train`, and `python -m fastft.train` on one process."""

from fastft.common import logs
from fastft.common.command_line import leave, run
from fastft.common.distributed import first_to_fail
from fastft.train.loop import main

if __name__ == "__main__":
    logs.show()
    leave(run(main, first_to_fail))  # an error that several ranks meet is printed by one of them
