"""The two kinds of error: a user's mistake, which is one helpful line, and everything else, which is a bug.

`fastft.common.command_line.run` is where both end: a `UserError` is printed as "error: …", a bug keeps its traceback.
"""

import copyreg
from typing import Any

BUG = "this is a bug in fastft and not your mistake: please report it with the lines above"
OURS = ("fastft", "cleaning", "__main__")  # the last is the module that `python -m` has started


class UserError(Exception):
    """A mistake that the user can correct: the message says what is wrong, where, and what to do, in one line.

    A file that does not exist, a value out of range, an endpoint that refuses, a package that is not installed. Raise it
    where the mistake is known, in the user's words; never for errors that only a programmer could cause.
    """

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes get the same class, words and attributes, whatever arguments its constructor takes."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__


class UsageError(UserError):
    """The command itself is wrong: an unknown option, a value of the wrong type, a verb that does not exist."""

    exit_code = 2


class PeerError(Exception):
    """Another process of the run met an error and reports it, so this process prints nothing."""


def is_ours(error: BaseException) -> bool:
    """Whether our own code raised `error`, and not a library that it called: then it is a bug, whatever its class.

    For libraries that raise errors of a dozen classes for one mistake of the user's. A library in C has no frames of its own,
    so what it raises counts as ours: name its classes instead.
    """
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in OURS


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or the error's class if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
