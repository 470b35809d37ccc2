"""Compare the arms of an experiment with its control: `fastft abtest figures FILE --control NAME -o DIR`.

Writes DIR/figures.json and DIR/report.html, and prints the verdict, warnings before it, and the tables.
"""

from dataclasses import dataclass
from pathlib import Path

import orjson

from fastft.common.command_line import option, parse, run_module
from fastft.common.files import make_directory, write_whole
from fastft.compose.abtest.activity import ColumnsConfig, read_activity
from fastft.compose.abtest.report import show, write_abtest_page
from fastft.compose.abtest.results import compute
from fastft.compose.abtest.verdict import verdict
from fastft.compose.abtest.winsor import require_quantile
from fastft.errors import UsageError, UserError


@dataclass
class FiguresConfig:
    """What is compared."""

    file: str = option(positional=True)
    """Who used it when: CSV or JSON Lines, also packed, such as the output of fastft record export --as events."""
    control: str
    """The arm that the others are compared with."""
    output: str = option(short="-o")
    """The directory for figures.json and report.html."""
    days: int | None = None
    """The horizon that was fixed before the start, in days after joining. Default: 30, or the last retention column's day."""
    shares: list[str] = option([], several=True)
    """How many users each arm was meant to get, as ARM=SHARE for every arm. Default: what the gateway's events say, else the
    same number."""
    winsor: float = 0.999
    """Amounts above this quantile are set to it, so that one heavy user does not decide; 1 leaves all as they are."""
    complete: bool = False
    """Only users for whom all days of the horizon have passed: the same ones on every day."""


def main(argv: list[str]) -> int:
    """`fastft abtest figures`."""
    from rich.console import Console

    description = "Compare the arms of an experiment with its control: retention, engagement, and how sure it is."
    config, columns = parse(argv, "fastft abtest figures", description, FiguresConfig, ColumnsConfig)
    _check(config)
    activity = read_activity(Path(config.file), columns)
    results = compute(activity, config.control, config.days, config.shares, config.winsor, config.complete)
    if results.comparisons:
        results.verdict = verdict(results)
    make_directory(directory := Path(config.output))
    # orjson writes NaN and infinity, which JSON does not have, as null.
    options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE
    write_whole(directory / "figures.json", orjson.dumps(results.as_json(), option=options))
    write_abtest_page(directory / "report.html", results)
    show(results, Console())
    if results.sample_ratio.verdict == "stop":
        raise UserError(results.verdict)
    print(f"\n{directory / 'report.html'}")
    return 0


def _check(config: FiguresConfig) -> None:
    if config.days is not None and config.days < 1:
        raise UsageError(f"--days is {config.days}; it must be 1 or more")
    require_quantile(config.winsor)


if __name__ == "__main__":
    run_module(main)
