"""`python -m fastft.demo` is `fastft demo`."""

from fastft.common.command_line import run_module
from fastft.demo.run import main

if __name__ == "__main__":
    run_module(main)
