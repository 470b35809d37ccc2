"""Shows the messages of the standard library's logging on stderr, one a line, through rich's handler.

    logger = logging.getLogger(__name__)          # in every module that has messages
    logger.info("data: %s: %d conversations", path, count)

    logs.show()                                   # once, where a command begins; without it nothing is shown
    logs.show_live("step 3/100  loss 1.234")      # a line at the bottom of a terminal, replaced by the next one

Messages are never wrapped, so that they can be searched for. Warnings and errors begin with "warning: " and "error: ".
"""

import logging
import shutil
import sys
from contextlib import suppress

from fastft.errors import BUG

OURS = ("fastft", "cleaning")  # the loggers that are shown; those of other libraries stay as they are
_notice: str | None = None  # the words before every live line, if any
_live = False  # whether a live line is on the terminal now


def show(level: int = logging.INFO) -> None:
    """Show this project's messages of `level` and above on stderr. Another call changes the level."""
    handler = _handler()
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)


def log_bug(logger: logging.Logger, bug: BaseException, message: str, *values: object) -> None:
    """Log a bug after which a server goes on: a message, the traceback, and a line that asks for a report."""
    logger.error(message, *values, exc_info=bug)
    logger.error(BUG)


def show_live(line: str | None) -> None:
    """Replace the live line at the bottom of the terminal; None leaves the present one as ordinary output.

    Without a terminal, do nothing.
    """
    global _live
    if line is None:
        if _live:
            write("\n")
        _live = False
    elif sys.stderr.isatty():
        line = f"{_notice}  {line}" if _notice else line
        width = shutil.get_terminal_size().columns - 1
        write(f"\r{line[:width]}\x1b[K")
        _live = True


def set_notice(notice: str | None) -> None:
    """Put `notice` before every live line from now on, or nothing if it is None."""
    global _notice
    _notice = notice


def clear_live() -> None:
    """Remove the live line, so that something else can be printed; the next `show_live` brings it back."""
    global _live
    if _live:
        write("\r\x1b[K")
    _live = False


def write(text: str) -> None:
    """Write to stderr. Errors are ignored, because a run continues when its terminal is closed."""
    with suppress(OSError):
        print(text, end="", file=sys.stderr, flush=True)


def _handler() -> logging.Handler:
    from rich.console import Console
    from rich.highlighter import NullHighlighter
    from rich.logging import RichHandler

    class LineHandler(RichHandler):
        """rich's handler without its table, which would wrap messages at the terminal's width."""

        def render(self, *, record, traceback, message_renderable):
            return message_renderable

        def emit(self, record: logging.LogRecord) -> None:
            clear_live()
            super().emit(record)

    handler = LineHandler(console=Console(stderr=True, soft_wrap=True), highlighter=NullHighlighter(), keywords=[])
    handler.setFormatter(_LineFormatter())
    return handler


class _LineFormatter(logging.Formatter):
    """Puts "warning: ", "error: " or "critical: " before messages of these levels."""

    def format(self, record: logging.LogRecord) -> str:
        kind = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return kind + super().format(record)
