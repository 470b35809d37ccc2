"""The cleaner's command line.

    python -m cleaning dump.json -o out
    python -m cleaning dumps/*.jsonl -o out --max_tokens 2048 --model Qwen/Qwen2.5-0.5B

`fastft clean` is the same. The exit code is 0 if conversations were written; 1 if the job could not be done or no
conversation was left, with one line on stderr that says why; 2 if the command was wrong.
"""

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from cleaning.filters.chosen import check, described_filters
from cleaning.filters.steps import MASKS, REFUSALS, STEPS
from cleaning.pipeline import clean
from cleaning.report.explain import explain
from cleaning.report.ledger import Report, output_console, print_ledger
from cleaning.settings import FilterSettings, RunSettings
from cleaning.sources.eras import ERAS
from cleaning.sources.formats import FORMATS
from fastft.common import logs
from fastft.common.command_line import option, parse, run
from fastft.errors import UsageError, UserError

logger = logging.getLogger("cleaning")  # not __name__, which is "__main__" where this module is the program

DESCRIPTION = "Turn raw dumps of shared chats into conversations in markdown, every input accounted for."
RENAMED = {"with_filters": "with", "without_filters": "without"}  # of options that had another name in the last release
SHOWN_WARNINGS = 3
CONTINUES = "the same command continues from here"


@dataclass
class CleanConfig:
    """What is read, and where the results go."""

    inputs: list[str] = option(positional=True, several=True)
    """Dumps and exports (.json, .jsonl, also .gz, .zst; .parquet), saved pages (.html), - for standard input, or OWNER/NAME
    of a dataset on the Hub."""
    output_dir: str | None = option(None, short="-o")
    """Directory for the results, made if it is missing."""
    format: Literal[tuple(FORMATS)] | None = option(
        None,
        help="What the records are, instead of recognising each by its shape. "
        + "; ".join(f"{name}: {each.description}" for name, each in FORMATS.items()),
    )
    branches: Literal["current", "all"] = "current"
    """Of a tree of messages, take the branch that was shown last or ranked best, or every branch."""
    era: Literal[tuple(ERAS)] = "auto"
    """What sharegpt.com had done to human text. before (until 2023-03-11): only a branch counter in front; escaped_pager
    (until 2023-04-01): HTML entities and a counter; escaped: HTML entities; none: leave it alone; auto: decide from
    evidence."""
    workers: int | None = None
    """Number of worker processes, by default one a core."""
    ray: str | None = option(None, alone="")
    """Work on the Ray cluster at this address, `auto` or ray://HOST:PORT; without an address, on one started here."""
    explain: str = ""
    """Explain what the finished run in output_dir did to the conversation with this id."""
    list_filters: bool = False
    """List the filters with their defaults, and stop."""


@dataclass
class FilterConfig:
    """Filters. --list_filters shows them all, with their defaults."""

    with_filters: list[str] = option(repeated=True, separator=",", name="--with")
    """Switch filters on: a,b,c."""
    without_filters: list[str] = option(repeated=True, separator=",", name="--without")
    """Switch filters off: a,b,c."""
    filters: list[str] = option(repeated=True, separator=",")
    """Filters of your own, FILE.py:FUNCTION. The file is run; the function gets a Conversation and returns what is wrong with
    it, or None."""
    keep_refusals: bool = option(False, help=f"The same as --without {','.join(REFUSALS)}.")
    mask_pii: bool = option(False, help=f"The same as --with {','.join(MASKS)}.")
    consecutive: Literal["merge", "last"] = "merge"
    """Merge answers in a row, or keep the last of them."""
    blocked_phrases: list[str] = option(repeated=True)
    """File of phrases, one a line; a conversation that contains one is rejected."""
    languages: list[str] = option(repeated=True, separator=",")
    """Keep conversations in these languages (ISO 639-1: en,zh) and in unknown ones."""
    models: list[str] = option(repeated=True, separator=",")
    """Keep answers of these models only; patterns as for file names, gpt-4*."""
    min_turns: int | None = None
    """Reject conversations with fewer questions and answers, counted together."""
    max_turns: int | None = None
    """Reject conversations with more questions and answers, counted together."""
    max_chars: int | None = None
    """Reject conversations with more characters in all turns together."""
    moderation: str | None = None
    """URL of an OpenAI-compatible /v1/moderations that judges all texts; its key is read from $FASTFT_MODERATION_KEY."""
    moderation_model: str | None = None
    """The `model` that the endpoint is asked for."""

    def settings(self) -> FilterSettings:
        """Return what the filters get, with shortcuts written out and the phrases read from their files."""
        refusals = [step.name for step in STEPS if step.name in REFUSALS and step.default] if self.keep_refusals else []
        return FilterSettings(
            with_filters=(*self.with_filters, *(MASKS if self.mask_pii else ())),
            without_filters=(*self.without_filters, *sorted(refusals)),
            own_filters=tuple(self.filters),
            blocked_phrases=tuple(phrase for path in self.blocked_phrases for phrase in _phrases(path)),
            languages=tuple(self.languages),
            models=tuple(self.models),
            **{name: getattr(self, name) for name in self._unchanged()},
        )

    def _unchanged(self) -> Iterator[str]:
        """Yield the names of the options that `FilterSettings` has by the same name and that are passed on as they are."""
        names = {field.name for field in fields(FilterSettings)}
        return (f.name for f in fields(self) if f.name in names and "option" not in f.metadata)


def _phrases(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"--blocked_phrases {path}: is not a UTF-8 text file") from None
    except OSError as error:
        raise UserError(f"--blocked_phrases {path}: {error.strerror}") from None


def options(argv: Sequence[str]) -> tuple[CleanConfig, RunSettings, FilterConfig]:
    """Read the command line. Raises UsageError."""
    classes = (CleanConfig, RunSettings, FilterConfig)
    config, run_settings, filters = parse(argv, "fastft clean", DESCRIPTION, *classes, renamed=RENAMED)
    return config, run_settings, filters


def main(argv: Sequence[str]) -> None:
    """Clean, list the filters, or explain what happened to a conversation. Raises UserError with one line."""
    config, run_settings, filters = options(argv)
    if config.explain:
        if config.output_dir is None or config.inputs:
            raise UsageError("--explain ID needs -o DIR, the directory of a finished run, and takes no input")
        explain(Path(config.output_dir), config.explain, output_console())
        return
    settings = filters.settings()
    if config.list_filters:
        check(settings)
        print(*described_filters(settings), sep="\n")
        return
    if not config.inputs or config.output_dir is None:
        missing = "output_dir: missing; say -o DIR" if config.inputs else "inputs: missing; name at least one dump"
        raise UsageError(f"{missing} (--help lists all options)")
    with _interruptible():
        report = clean(
            config.inputs,
            config.output_dir,
            run_settings=run_settings,
            settings=settings,
            format=config.format,
            every_branch=config.branches == "all",
            era=config.era,
            workers=config.workers,
            ray=config.ray,
        )
    _show(report, Path(config.output_dir))


@contextmanager
def _interruptible() -> Iterator[None]:
    """End in order after Ctrl-C and SIGTERM, workers included, and say how to continue."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere Python takes no handlers
    before = signal.signal(signal.SIGTERM, stop) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt:
        logger.error("interrupted; %s", CONTINUES)
        raise
    except SystemExit:
        logger.error("terminated; %s", CONTINUES)
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _show(report: Report, directory: Path) -> None:
    """Print the ledger and the files. Raises UserError if no conversation is left to train on."""
    for warning in report.warnings[:SHOWN_WARNINGS]:
        logger.warning("%s", warning)
    if len(report.warnings) > SHOWN_WARNINGS:
        logger.warning("%d more of that kind, see report.json", len(report.warnings) - SHOWN_WARNINGS)
    print_ledger(report, output_console())
    if not report.input:
        raise UserError("there is no record in the input")
    if not report.kept:
        raise UserError(f"no conversation is left after cleaning; {directory / 'rejected.jsonl'} says why")
    if not report.parts:
        held = f"all {report.kept:,} that were kept are in {directory / 'conversations.holdout.jsonl'}"
        raise UserError(f"--holdout {report.settings['holdout']} leaves no conversation to train on; {held}")
    for name in ("conversations.jsonl", "conversations.holdout.jsonl", "rejected.jsonl", "report.html", "report.json"):
        if (directory / name).exists():
            print(directory / name)


if __name__ == "__main__":
    logs.show()
    sys.exit(run(lambda: main(sys.argv[1:])))
