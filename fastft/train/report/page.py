"""Write the page of a training run, RUN/report.html: curves, answers over time, data, settings. `fastft report RUN`.

The trainer writes it at every checkpoint and held-out loss, and at the end. It can be made again at any time from the files of
the run's directory. The look that all pages share is in `fastft.common.html`, the drawing of curves in
`fastft.train.report.curves`.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from fastft.common.files import is_refusal, short_name
from fastft.common.html import flatten, write_page
from fastft.errors import UserError
from fastft.train.report.curves import Training, file_rows
from fastft.train.report.run_dir import Run, read_run

logger = logging.getLogger(__name__)

FILES = ("config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "tensorboard", "checkpoints", "model", "adapter")
SHOWN_ANSWERS = 6  # of each prompt: the first, the last, and four between them


def write_run_report(directory: Path) -> Path:
    """Write the page and return its path. Raises UserError if `directory` is not that of a run."""
    run, page = read_run(directory), directory / "report.html"
    write_page(
        page,
        Path(__file__).with_name("run.html.jinja"),
        title=run.name,
        now=datetime.now().astimezone(),
        facts=run.facts,
        step=max((row["step"] for row in run.metrics), default=0),
        training=Training(run.metrics) if run.metrics else None,
        prompts=answers_over_time(run.samples),
        data=list(_data(run)),
        settings=list(flatten(_settings(run))),
        files=file_rows({name: str(directory / name) for name in FILES if (directory / name).exists()}, page),
    )
    return page


def refresh_page(directory: Path) -> None:
    """Write the page during a run, and only log it if that fails."""
    try:
        write_run_report(directory)
    except (UserError, OSError) as error:
        if not (isinstance(error, UserError) or is_refusal(error)):
            raise
        logger.warning("report.html could not be written (%s)", error)


def answers_over_time(samples: list[dict[str, Any]]) -> list[tuple[str, list[tuple[int, str]]]]:
    """(prompt, its answers as (step, text)) from the rows of samples.jsonl.

    If there are many answers, a few of them, evenly spaced, are selected.
    """
    prompts: dict[str, dict[int, str]] = {}
    for row in samples:
        prompts.setdefault(row["prompt"], {})[row["step"]] = row["answer"]
    found = []
    for prompt, answers in prompts.items():
        in_order = sorted(answers.items())
        last, shown = len(in_order) - 1, min(len(in_order), SHOWN_ANSWERS)
        found.append((prompt, [in_order[round(i * last / max(shown - 1, 1))] for i in range(shown)]))
    return found


def _data(run: Run) -> Iterator[dict[str, Any]]:
    """The files of all stages and the held-out ones, with what each was used for."""
    stages = run.facts["data"]
    for number, files in enumerate(stages, 1):
        yield from ({**file, "use": f"stage {number}" if len(stages) > 1 else "training"} for file in files)
    yield from ({**file, "use": "held out"} for file in run.facts["eval_data"])


def _settings(run: Run) -> dict[str, Any]:
    """The settings of the run. Files have their last name, as everywhere on the page."""
    values = asdict(run.config)
    for group, name in ((values, "model"), (values, "output_dir"), (values, "eval_data"), (values, "template")):
        group[name] = short_name(group[name]) if group[name] else None
    prompts = values["samples"]["prompts"]
    values["samples"]["prompts"] = short_name(prompts) if prompts else None
    for part in (values, *values["stages"]):
        data = part["data"] or []
        part["data"] = short_name(data) if isinstance(data, str) else [short_name(source["path"]) for source in data]
    values["stages"] = {str(number): stage for number, stage in enumerate(values["stages"], 1)} or None
    return values
