"""The command line of the cleaner.

    python -m cleaning dump.json -o out
    python -m cleaning dumps/*.jsonl -o out --max_tokens 2048 --model Qwen/Qwen2.5-0.5B

`fastft clean` is the same. Exit code 0: conversations were written; 1: the job could not be done, or nothing was left
(one line on stderr says why); 2: the command was wrong.
"""

import argparse
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.console import Console

from cleaning.duplicates import NEAR
from cleaning.pipeline import Report, clean, print_ledger

SHOWN_WARNINGS = 3


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.max_tokens is not None and arguments.model is None:
        return _fail("--max_tokens needs --model: tokens are counted with its tokenizer and chat template", 2)
    try:
        report = clean(
            arguments.inputs,
            arguments.output_dir,
            max_tokens=arguments.max_tokens,
            model=arguments.model,
            template=arguments.template,
            overlap_rounds=arguments.overlap_rounds,
            overlong=arguments.overlong,
            blocked_phrases=_phrases(arguments.blocked_phrases) if arguments.blocked_phrases else (),
            near=arguments.near,
            keep=arguments.keep,
            against=arguments.against,
            contaminated=arguments.contaminated,
            holdout=arguments.holdout,
            seed=arguments.seed,
            workers=arguments.workers,
        )
    except ValueError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error.filename or arguments.output_dir}: {error.strerror or error}", 1)
    except BrokenProcessPool:
        return _fail("a worker process was killed, most likely for memory: use fewer --workers", 1)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", 130)
    return _tell(report, arguments.output_dir)


def _tell(report: Report, output_dir: str) -> int:
    for warning in report.warnings[:SHOWN_WARNINGS]:
        print(f"warning: {warning}", file=sys.stderr)
    if len(report.warnings) > SHOWN_WARNINGS:
        print(f"warning: {len(report.warnings) - SHOWN_WARNINGS} more of that kind, see report.json", file=sys.stderr)
    print_ledger(report, Console())
    directory = Path(output_dir)
    if not report.kept:
        return _fail(f"no conversation is left after cleaning; {directory / 'rejected.jsonl'} says why", 1)
    for name in ("conversations.jsonl", "conversations.holdout.jsonl", "rejected.jsonl", "report.json"):
        if (directory / name).exists():
            print(directory / name)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cleaning",
        description="Raw dumps of shared chats in, markdown conversations out; every input accounted for.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IN",
        help="ShareGPT or OpenAI-style dumps: .json, .jsonl, .parquet, also .gz, .zst",
    )
    parser.add_argument("-o", "--output_dir", required=True, metavar="DIR", help="where the results go")
    parser.add_argument(
        "--max_tokens",
        type=int,
        metavar="N",
        help="split dialogues into parts of at most N tokens (without it: no split)",
    )
    parser.add_argument("--model", metavar="DIR_OR_NAME", help="whose tokenizer and chat template count the tokens")
    parser.add_argument("--template", metavar="NAME", help="a chat template by name, for a tokenizer that has none")
    parser.add_argument(
        "--blocked_phrases", metavar="FILE", help="reject conversations that hold one of these, a phrase a line"
    )
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
        "--against", nargs="+", default=(), metavar="FILE", help="benchmark questions that must not be in the data"
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
    return parser


def _phrases(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not a UTF-8 text file") from None


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
