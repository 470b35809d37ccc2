"""The demo's page: what was cleaned, how the training went, and the answers before and after it."""

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
    """Write the page to `path`; an older page is replaced only by a whole new one.

    `ledger` is the cleaner's report.json, and `metrics` the rows of metrics.jsonl. A sample is {"question", "before",
    "after"}; an answer that is None or missing was not asked for. `settings` may be nested. `files` maps names to paths.
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
