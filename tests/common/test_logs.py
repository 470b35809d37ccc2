"""Messages: whole lines on stderr, their kind in front of them, and one live line at the bottom of a terminal."""

import io
import logging
import subprocess
import sys

import pytest

from fastft.common import logs
from fastft.common.command_line import run
from fastft.errors import UserError

logger = logging.getLogger("fastft.some.module")


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def loggers():
    """The loggers as they were."""
    before = {name: (list(logging.getLogger(name).handlers), logging.getLogger(name).level) for name in logs.OURS}
    yield
    for name, (handlers, level) in before.items():
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).setLevel(level)
    logs.show_live(None)


def test_a_message_is_one_line_however_long(capsys):
    logs.show()
    long = "word " * 100 + "[bold]not markup[/bold] :smile: GET /path/that/is/long"
    logger.info(long)
    logger.warning("%d of %d", 1, 2)
    logging.getLogger("cleaning.anything").error("no disk")
    logger.debug("nobody asked")
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [long, "warning: 1 of 2", "error: no disk"]
    assert captured.out == ""


def test_the_level_is_changed_by_calling_again(capsys):
    logs.show()
    logs.show(logging.ERROR)
    logger.warning("quiet")
    logger.error("loud")
    assert capsys.readouterr().err == "error: loud\n"


def test_other_libraries_stay_as_they_are(capsys):
    logs.show()
    logging.getLogger("somebody").info("chatter")
    assert capsys.readouterr().err == ""


def test_a_library_that_is_imported_says_nothing():
    code = "import logging, fastft.common.logs; logging.getLogger('fastft.x').info('hello')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_live_line_is_written_over_and_makes_room_for_messages(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logs.show()
    logs.show_live("step 1")
    logs.show_live("step 2 " + "x" * 50)
    logger.info("saved")
    logs.show_live("step 3")
    logs.show_live(None)
    logs.show_live(None)
    logger.info("done")
    clear = "\r\x1b[K"
    written = terminal.getvalue()
    assert written == f"\rstep 1\x1b[K\rstep 2 {'x' * 12}\x1b[K{clear}saved\n\rstep 3\x1b[K\ndone\n"


def test_no_live_line_where_stderr_is_no_terminal(capsys):
    logs.show_live("step 1")
    logs.show_live(None)
    assert capsys.readouterr().err == ""


def test_an_error_does_not_stand_on_the_live_line(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def main() -> int:
        logs.show_live("step 1")
        raise UserError("no disk")

    assert run(main) == 1
    assert terminal.getvalue() == "\rstep 1\x1b[K\r\x1b[Kerror: no disk\n"
