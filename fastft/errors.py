"""The two kinds of error: a user's mistake, which is one helpful line, and everything else, which is a bug.

`fastft.common.command_line.run` is where both end: a `UserError` is printed as "error: …", a bug keeps its traceback.
"""


class UserError(Exception):
    """Something that the user can mend: the message says what is wrong, where, and what to do, in one line.

    A file that does not exist, a value out of range, an endpoint that refuses, a package that is not installed. Raise it
    where the mistake is known, with the words of the person who made it; never for what only a programmer could cause.
    """

    exit_code = 1


class UsageError(UserError):
    """The command itself is wrong: an unknown option, a value of the wrong type, a verb that does not exist."""

    exit_code = 2


class PeerError(Exception):
    """Another process of the run met an error, and says so itself: this one has nothing to add."""
