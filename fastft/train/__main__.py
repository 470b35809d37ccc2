"""`torchrun -m fastft.train`, and `python -m fastft.train` on one process."""

from fastft.common.command_line import run_module
from fastft.common.distributed import first_to_fail
from fastft.train.loop import main

if __name__ == "__main__":
    run_module(main, first_to_fail)  # an error that several ranks meet is printed by one of them
