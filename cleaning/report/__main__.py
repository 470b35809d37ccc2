"""`python -m cleaning.report DIR` writes report.html again from the files of a finished run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cleaning.report.page import write_report
from fastft.common import logs
from fastft.common.command_line import option, parse, run


@dataclass
class CleaningReportConfig:
    directory: str = option(positional=True)
    """The output directory (-o) of a finished run."""


def main(argv: Sequence[str]) -> None:
    [config] = parse(argv, "python -m cleaning.report", "Write the page of a cleaning run again.", CleaningReportConfig)
    print(write_report(Path(config.directory)))


if __name__ == "__main__":
    logs.show()
    sys.exit(run(lambda: main(sys.argv[1:])))
