"""Secrets come from environment variables, whose names are options: a key in an option would be in the list of processes."""

import os

from fastft.errors import UserError


def from_environment(where: str, name: str) -> str:
    """The value of a variable. `where` is the option, or the place in a file, that names it. Raises UserError if it is empty."""
    if not (value := os.environ.get(name)):
        raise UserError(f"{where} {name}: there is no such environment variable, or it is empty")
    return value
