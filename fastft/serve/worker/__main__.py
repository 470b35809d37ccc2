"""`python -m fastft.serve.worker`: see fastft.serve.worker.service."""

import sys

from fastft.common import logs
from fastft.common.command_line import leave, run
from fastft.serve.worker.service import main

if __name__ == "__main__":
    logs.show()
    # Do not wait for the generating thread: one step may take seconds.
    leave(run(lambda: main(sys.argv[1:])))
