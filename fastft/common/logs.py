"""What a program says while it works: the standard library's logging, shown by rich on stderr, a message a line.

    logger = logging.getLogger(__name__)          # in every module that has something to say
    logger.info("data: %s: %d conversations", path, count)

    logs.show()                                   # once, where a command begins; a library that is imported says nothing
    logs.show_live("step 3/100  loss 1.234")      # the one line at the bottom of a terminal that is written over

Messages are whole lines, never wrapped, so that they can be searched for. Warnings and errors begin with their kind.
"""

import logging
import shutil
import sys
from contextlib import suppress

OURS = ("fastft", "cleaning")  # the loggers that are shown; those of other libraries stay as they are
_notice: str | None = None  # what the live line begins with until it is no longer so
_live = False  # whether the last thing on the terminal is a live line


def show(level: int = logging.INFO) -> None:
    """Show the messages of this project from `level` on, on stderr. Calling it again changes the level."""
    handler = _handler()
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)


def show_live(line: str | None) -> None:
    """Write `line` over the last one at the bottom of the terminal; None ends it. Does nothing if stderr is no terminal."""
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
    """Begin each live line with `notice` from now on; None ends that."""
    global _notice
    _notice = notice


def clear_live() -> None:
    """Remove the live line, so that something else can be printed; the next `show_live` brings it back."""
    global _live
    if _live:
        write("\r\x1b[K")
    _live = False


def write(text: str) -> None:
    """Write to stderr. A terminal that has been closed takes nothing more, which is no reason to fail."""
    with suppress(OSError):
        print(text, end="", file=sys.stderr, flush=True)


def _handler() -> logging.Handler:
    from rich.console import Console
    from rich.highlighter import NullHighlighter
    from rich.logging import RichHandler

    class LineHandler(RichHandler):
        """rich's handler without its columns, which would wrap a message at the terminal's width."""

        def render(self, *, record, traceback, message_renderable):
            return message_renderable

        def emit(self, record: logging.LogRecord) -> None:
            clear_live()
            super().emit(record)

    handler = LineHandler(console=Console(stderr=True, soft_wrap=True), highlighter=NullHighlighter(), keywords=[])
    handler.setFormatter(_LineFormatter())
    return handler


class _LineFormatter(logging.Formatter):
    """Puts "warning: " or "error: " before a message of that level, and nothing before others."""

    def format(self, record: logging.LogRecord) -> str:
        kind = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return kind + super().format(record)
