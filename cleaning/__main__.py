"""The command line of the cleaner.

    python -m cleaning dump.json -o out
    python -m cleaning dumps/*.jsonl -o out --max_tokens 2048 --model Qwen/Qwen2.5-0.5B

`fastft clean` is the same. Exit code 0: conversations were written; 1: the job could not be done, or nothing was left
(one line on stderr says why); 2: the command was wrong.
"""

import argparse
import contextlib
import difflib
import os
import signal
import sys
import threading
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from cleaning.dedup.duplicates import NEAR
from cleaning.filters import MASKS, REFUSALS, STEPS, Settings, check, described_filters
from cleaning.pipeline import clean
from cleaning.report.explain import explain
from cleaning.report.ledger import Report, print_ledger
from cleaning.sources import ERAS, FORMATS
from fastft.errors import UserError

SHOWN_WARNINGS = 3


def main(argv: list[str] | None = None) -> int:
    try:
        code = _main(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # nobody reads on (`| head`), and only what has been done is still to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Console(Console):
    def on_broken_pipe(self) -> None:  # rich would leave with exit code 1
        raise BrokenPipeError


def _main(argv: list[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.explain is not None:
        return _explain(parser, arguments)
    if arguments.list_filters:
        return _list_filters(arguments)
    if not arguments.inputs or arguments.output_dir is None:
        parser.error("the following arguments are required: " + ("-o/--output_dir" if arguments.inputs else "IN"))
    if arguments.max_tokens is not None and arguments.model is None:
        return _fail("--max_tokens needs --model: tokens are counted with its tokenizer and chat template", 2)
    # An orderly end for SIGTERM too: the workers go.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        settings = _settings(arguments)
        output_dir = Path(arguments.output_dir)
        if output_dir.exists() and not output_dir.is_dir():
            raise UserError(f"-o {output_dir}: is a file; name a directory, which is made if it is missing")
        report = clean(
            arguments.inputs,
            output_dir,
            max_tokens=arguments.max_tokens,
            model=arguments.model,
            template=arguments.template,
            settings=settings,
            overlap_rounds=arguments.overlap_rounds,
            overlong=arguments.overlong,
            near=arguments.near,
            keep=arguments.keep,
            against=arguments.against,
            contaminated=arguments.contaminated,
            holdout=arguments.holdout,
            seed=arguments.seed,
            workers=arguments.workers,
            format=arguments.format,
            every_branch=arguments.branches == "all",
            era=arguments.era,
            ray=arguments.ray,
        )
    except ValueError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error.filename or arguments.output_dir}: {error.strerror or error}", 1)
    except BrokenProcessPool:
        return _fail("a worker process was killed, most likely for memory: use fewer --workers", 1)
    except MemoryError:
        return _fail("not enough memory; is one record of the input that large?", 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", 130)
    return _tell(report, output_dir)


def _explain(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.output_dir is None or arguments.inputs:
        parser.error("--explain ID goes with -o DIR, the directory of a finished run, and no input")
    try:
        explain(Path(arguments.output_dir), arguments.explain, _Console())
    except ValueError as error:
        return _fail(str(error), 1)
    return 0


def _list_filters(arguments: argparse.Namespace) -> int:
    try:
        settings = _settings(arguments)
        check(settings)
    except ValueError as error:
        return _fail(str(error), 1)
    print(*described_filters(settings), sep="\n")
    return 0


def _tell(report: Report, directory: Path) -> int:
    for warning in report.warnings[:SHOWN_WARNINGS]:
        print(f"warning: {warning}", file=sys.stderr)
    if len(report.warnings) > SHOWN_WARNINGS:
        print(f"warning: {len(report.warnings) - SHOWN_WARNINGS} more of that kind, see report.json", file=sys.stderr)
    print_ledger(report, _Console())
    if not report.input:
        return _fail("there is no record in the input", 1)
    if not report.kept:
        return _fail(f"no conversation is left after cleaning; {directory / 'rejected.jsonl'} says why", 1)
    if not report.parts:
        held = f"all {report.kept:,} that were kept are in {directory / 'conversations.holdout.jsonl'}"
        return _fail(f"--holdout {report.settings['holdout']} leaves no conversation to train on; {held}", 1)
    for name in ("conversations.jsonl", "conversations.holdout.jsonl", "rejected.jsonl", "report.html", "report.json"):
        if (directory / name).exists():
            print(directory / name)
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: argparse would print 30 lines of usage first."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message} (--help shows all)", 2))

    def parse_args(self, args: list[str] | None = None, namespace: None = None) -> argparse.Namespace:
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            option = next((each for each in unknown if each.startswith("-")), unknown[0]).partition("=")[0]
            near = difflib.get_close_matches(option.replace("-", "_"), self._names())
            self.error(f"unknown option {option}" + (f"; did you mean {self._names()[near[0]]}?" if near else ""))
        return arguments

    def _names(self) -> dict[str, str]:
        return {name.replace("-", "_"): name for action in self._actions for name in action.option_strings}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m cleaning",
        description="Raw dumps of shared chats in, markdown conversations out; every input accounted for.",
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="IN",
        help="dumps and exports (.json, .jsonl, also .gz, .zst; .parquet), saved pages (.html), - for standard input, "
        "or OWNER/NAME of a dataset on the Hub",
    )
    parser.add_argument("-o", "--output_dir", metavar="DIR", help="where the results go")
    parser.add_argument(
        "--max_tokens",
        type=int,
        metavar="N",
        help="split dialogues into parts of at most N tokens (without it: no split)",
    )
    parser.add_argument("--model", metavar="DIR_OR_NAME", help="whose tokenizer and chat template count the tokens")
    parser.add_argument("--template", metavar="NAME", help="a chat template by name, for a tokenizer that has none")
    parser.add_argument(
        "--overlap_rounds", type=int, default=0, metavar="K", help="begin a part with the last K rounds as context"
    )
    parser.add_argument(
        "--overlong", choices=("cut", "reject"), default="cut", help="what becomes of a round longer than N (cut)"
    )
    parser.add_argument(
        "--near",
        type=float,
        default=NEAR,
        metavar="S",
        help=f"similarity from which conversations are duplicates (default {NEAR}; 0: only equal ones are)",
    )
    parser.add_argument(
        "--keep", choices=("longest", "newest"), default="longest", help="which of several duplicates stays (longest)"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="benchmark questions that must not be in the data",
    )
    parser.add_argument(
        "--contaminated",
        choices=("reject", "flag"),
        default="reject",
        help="what becomes of conversations that hold them (reject; flag: they are kept and reported)",
    )
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="set aside this share of the conversations, say 0.01",
    )
    parser.add_argument("--seed", type=int, default=0, help="which conversations are set aside (default 0)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="work on a Ray cluster: `auto` or ray://HOST:PORT; without an address, one is started here",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        metavar="NAME",
        help="what the records are (default: recognised one by one): "
        + "; ".join(f"{name}: {each.description}" for name, each in FORMATS.items()),
    )
    parser.add_argument(
        "--branches",
        choices=("current", "all"),
        default="current",
        help="of a tree of messages, the branch shown last or ranked best, or every one (default: current)",
    )
    parser.add_argument(
        "--era",
        choices=ERAS,
        default="auto",
        help="what sharegpt.com had done to human text: before (2023-03-11: nothing but a branch counter in front), "
        "escaped_pager (until 2023-04-01: entities and a counter), escaped (entities), none (leave it alone), "
        "auto: from evidence (default)",
    )
    parser.add_argument("--explain", metavar="ID", help="tell what the finished run in DIR did to one conversation")
    _add_filters(parser.add_argument_group("filters", "--list_filters shows them all, with their defaults"))
    return parser


def _add_filters(group: argparse._ArgumentGroup) -> None:
    names = {"type": _names, "action": "extend", "default": []}  # given twice, an option adds to what it had
    group.add_argument("--list_filters", "--list-filters", action="store_true", help="list them and stop")
    group.add_argument("--with", dest="with_filters", **names, metavar="NAMES", help="switch on: a,b,c")
    group.add_argument("--without", dest="without_filters", **names, metavar="NAMES", help="switch off: a,b,c")
    group.add_argument(
        "--filters",
        **names,
        metavar="FILE.py:FUNCTION",
        help="your own: a function Conversation -> text or None in a file, which is run",
    )
    group.add_argument("--keep_refusals", action="store_true", help=f"the same as --without {','.join(REFUSALS)}")
    group.add_argument("--mask_pii", action="store_true", help=f"the same as --with {','.join(MASKS)}")
    group.add_argument(
        "--consecutive", choices=("merge", "last"), default="merge", help="answers in a row: merge, or keep the last"
    )
    group.add_argument(
        "--blocked_phrases",
        action="append",
        default=[],
        metavar="FILE",
        help="reject conversations that hold one of these, a phrase a line",
    )
    group.add_argument("--languages", **names, metavar="en,zh", help="keep these (ISO 639-1), and unknown ones")
    group.add_argument("--models", **names, metavar="gpt-4*", help="keep answers of these models only")
    group.add_argument("--min_turns", type=int, metavar="N", help="questions and answers, counted together")
    group.add_argument("--max_turns", type=int, metavar="N")
    group.add_argument("--max_chars", type=int, metavar="N", help="of all turns of a conversation")
    group.add_argument(
        "--moderation", metavar="URL", help="an OpenAI-compatible /v1/moderations; the key: $FASTFT_MODERATION_KEY"
    )
    group.add_argument("--moderation_model", metavar="NAME", help="the `model` that the endpoint is asked for")


def _settings(arguments: argparse.Namespace) -> Settings:
    off_by_option = {name for name in REFUSALS if _is_default(name)} if arguments.keep_refusals else set()
    return Settings(
        with_filters=(*arguments.with_filters, *(MASKS if arguments.mask_pii else ())),
        without_filters=(*arguments.without_filters, *sorted(off_by_option)),
        own_filters=tuple(arguments.filters),
        blocked_phrases=tuple(phrase for path in arguments.blocked_phrases for phrase in _phrases(path)),
        consecutive=arguments.consecutive,
        languages=tuple(arguments.languages),
        models=tuple(arguments.models),
        min_turns=arguments.min_turns,
        max_turns=arguments.max_turns,
        max_chars=arguments.max_chars,
        moderation=arguments.moderation,
        moderation_model=arguments.moderation_model,
    )


def _is_default(name: str) -> bool:
    return next(step.default for step in STEPS if step.name == name)


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _phrases(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a UTF-8 text file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):  # the code tells, too
        print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
