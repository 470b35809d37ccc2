"""`python -m fastft` is `fastft`."""

from fastft.cli import command

command()
