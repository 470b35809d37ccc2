"""`python -m fastft.demo` is `fastft demo`."""

from fastft.common import logs
from fastft.common.command_line import leave, run
from fastft.demo.run import main

if __name__ == "__main__":
    logs.show()
    leave(run(main))
