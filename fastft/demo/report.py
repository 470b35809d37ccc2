"""TODO docstring of fastft.demo.report."""

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from fastft.common.html import flatten, funnel, write_page
from fastft.train.report.curves import Training, file_rows


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    ledger: dict[str, Any] | None,
    metrics: list[dict[str, Any]],
    samples: list[dict[str, Any]],
    settings: dict[str, Any],
    files: dict[str, str],
) -> None:
    """Write the page to `path`; an older one is replaced only by a whole new one.

    `ledger` is cleaning's report.json, `metrics` the rows of metrics.jsonl, a sample is {"question", "before", "after"}
    (None or missing: not asked), `settings` may be nested, `files` goes from a name to a path.
    """
    path = Path(path)
    write_page(
        path,
        Path(__file__).with_name("demo.html.jinja"),
        title=title,
        now=datetime.now().astimezone(),
        ledger=ledger,
        funnel=funnel(ledger) if ledger else [],
        training=Training(metrics) if metrics else None,
        samples=samples,
        settings=list(flatten(settings)),
        files=file_rows(files, path),
    )
