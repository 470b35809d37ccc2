"""Run exams and show the result beside Orca's published figures: `fastft bench --model DIR|URL#name --data DIR -o bench`.

    fastft bench --model runs/first/model --data exams -o bench                 # exams/bbh/*.json, exams/agieval/*.jsonl
    OPENAI_API_KEY=… fastft bench --model https://api.openai.com/v1#gpt-4.1 --tasks snarks --data exams --dry_run

lm-evaluation-harness runs the tasks of fastft.judge.exams.items zero-shot: one question, no examples, no system message. OUTPUT/
holds the tasks, answers.jsonl (from which an interrupted run goes on), results.json, results.md and report.html.
"""

import importlib.util
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastft.common.command_line import option, parse, run_module
from fastft.common.files import write_whole
from fastft.errors import UserError
from fastft.inference.endpoint import EndpointConfig
from fastft.judge.answer import ModelConfig, answer_all, answerer_for
from fastft.judge.exams.items import METRICS, MODELS, Published, chosen, load_items, write_task
from fastft.judge.questions import Question

logger = logging.getLogger(__name__)

Z = 1.959964  # of a 95 % interval


@dataclass(kw_only=True)
class BenchConfig(ModelConfig):
    """Which exams are taken, and where their results are kept."""

    data: Path
    """The folder that holds bbh/ and agieval/."""
    tasks: str = "bbh,agieval"
    """Suites and tasks, separated by commas."""
    limit: int | None = None
    """Ask only the first N items of each task: for a trial run, not for a result."""
    max_tokens: int = 256
    """The longest answer, in tokens."""
    output: Path = option(Path("bench"), short="-o")
    """A directory for the tasks, the answers and the results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit < 1:
            raise UserError("--limit must be at least 1")
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"{self.output}: is a file; -o names a directory")


@dataclass(frozen=True)
class TaskResult:
    """The result of one task, in percent. `low` and `high` are Wilson's 95 % interval of the accuracy.

    `accuracy` takes the first capital letter as the answer, `lone_letter` the first letter that stands alone.
    """

    exam: Published
    items: int
    skipped: int
    accuracy: float
    low: float
    high: float
    lone_letter: float
    no_letter: float


@dataclass(frozen=True)
class SuiteResult:
    """The unweighted mean over the tasks of a suite, as in Orca's tables, and the same mean of their columns."""

    suite: str
    tasks: int
    accuracy: float
    low: float
    high: float
    lone_letter: float
    no_letter: float
    published: dict[str, float | None]


def main(argv: Sequence[str]) -> int:
    """Run `fastft bench`. Raises UserError if questions are still unanswered at the end."""
    config, endpoint = parse(
        argv,
        "fastft bench",
        "Run exams and show the result beside Orca's published figures.",
        BenchConfig,
        EndpointConfig,
    )
    bench(config, endpoint)
    return 0


def bench(config: BenchConfig, endpoint: EndpointConfig) -> None:
    """Write the tasks, let the harness run them, show and write the results. Raises UserError for the user's mistakes."""
    from rich.console import Console

    for package in ("lm_eval", "statsmodels"):
        if not importlib.util.find_spec(package):
            raise UserError(f"{package} is missing: pip install 'fastft[bench]'")
    exams = chosen(config.tasks)
    loaded = [load_items(config.data, exam) for exam in exams]
    skipped = {exam.name: bad for exam, (_, bad) in zip(exams, loaded)}
    for line in (line for bad in skipped.values() for line in bad):
        logger.warning("skipped: %s", line)
    for exam, (items, _) in zip(exams, loaded):
        write_task(config.output / "tasks", exam, items[: config.limit])
    samples = run_harness(exams, config, endpoint)
    if config.dry_run:
        return
    results = [result(exam, len(skipped[exam.name]), samples[exam.name]) for exam in exams]
    averages = [average([each for each in results if each.exam.suite == suite]) for suite in _suites(results)]
    write_results(config, results, averages, skipped)
    show(config.shown_name, results, averages, Console())
    for line in remarks(results, config.limit):
        print(line)
    print(f"report: {config.output / 'report.html'}")


def run_harness(exams: list[Published], config: BenchConfig, endpoint: EndpointConfig) -> dict[str, list[dict]]:
    """Run the harness over the written tasks. Returns its samples by task; none in a dry run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from datasets.utils.logging import disable_progress_bar
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class AnsweringLM(LM):
        """`fastft answer` as the harness knows models: all questions at once, and none that was answered before."""

        def generate_until(self, requests, disable_tqdm=False) -> list[str]:
            questions = [
                Question(f"{request.task_name}:{request.doc_id}", request.task_name, (request.args[0],))
                for request in requests
            ]
            path = config.output / "answers.jsonl"
            answers, _ = answer_all(questions, path, answerer_for(config, endpoint, path), config.dry_run)
            return [answers[question.id].turns[0] if answers else "" for question in questions]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError("the tasks are generative")

        loglikelihood_rolling = loglikelihood

    disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("lm-eval").setLevel(logging.ERROR)
    found = simple_evaluate(
        model=AnsweringLM(),
        tasks=[exam.name for exam in exams],
        task_manager=TaskManager(include_path=str(config.output / "tasks"), include_defaults=False),
        bootstrap_iters=0,  # intervals are computed here
    )
    return {} if config.dry_run else found["samples"]


def result(exam: Published, skipped: int, samples: list[dict[str, Any]]) -> TaskResult:
    """Return a task's result from the harness's samples of it, which hold the metrics of `items.score`."""
    from statsmodels.stats.proportion import proportion_confint

    right = sum(sample["first_capital"] for sample in samples)
    low, high = proportion_confint(right, len(samples), method="wilson")
    means = {name: 100 * sum(sample[name] for sample in samples) / len(samples) for name in METRICS}
    return TaskResult(
        exam=exam,
        items=len(samples),
        skipped=skipped,
        accuracy=means["first_capital"],
        low=100 * low,
        high=100 * high,
        lone_letter=means["lone_letter"],
        no_letter=means["no_letter"],
    )


def average(results: list[TaskResult]) -> SuiteResult:
    """Return the mean of a suite's tasks. Its interval treats the tasks as fixed and their items as drawn at random.

    So the variances of the tasks' accuracies, p (1 - p) / n each, add up. p and n are Agresti and Coull's, with one right and
    one wrong answer added, because 0 right answers of n do not prove that the accuracy is 0.
    """
    mean = lambda values: sum(values) / len(results)  # noqa: E731
    accuracy = mean([each.accuracy for each in results])
    variance = 0.0
    for each in results:
        share = (each.accuracy * each.items / 100 + 1) / (each.items + 2)
        variance += share * (1 - share) / (each.items + 2)
    half = 100 * Z * math.sqrt(variance) / len(results)
    columns: dict[str, float | None] = {}
    for model in MODELS:
        values = [each.exam.accuracy[model] for each in results]
        columns[model] = mean(values) if None not in values else None
    return SuiteResult(
        suite=results[0].exam.suite,
        tasks=len(results),
        accuracy=accuracy,
        low=max(0.0, accuracy - half),
        high=min(100.0, accuracy + half),
        lone_letter=mean([each.lone_letter for each in results]),
        no_letter=mean([each.no_letter for each in results]),
        published=columns,
    )


def _suites(results: list[TaskResult]) -> list[str]:
    return list(dict.fromkeys(each.exam.suite for each in results))


def rows(name: str, results: list[TaskResult], averages: list[SuiteResult]) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the lines of the table, each suite followed by its mean."""
    heads = ["task", "items", name, "95 %", "lone letter", "no letter", *MODELS]
    lines = []
    for mean in averages:
        own = [each for each in results if each.exam.suite == mean.suite]
        for each in own:
            lines.append([each.exam.task, str(each.items), *_figures(each), *_published(each.exam.accuracy)])
        if len(own) > 1:
            title = f"{mean.suite}, mean of {mean.tasks} tasks"
            items = sum(each.items for each in own)
            lines.append([title, str(items), *_figures(mean), *_published(mean.published)])
    return heads, lines


def _figures(each: TaskResult | SuiteResult) -> list[str]:
    interval = f"[{each.low:.1f}, {each.high:.1f}]"
    return [f"{each.accuracy:.1f}", interval, f"{each.lone_letter:.1f}", f"{each.no_letter:.1f}"]


def _published(accuracy: dict[str, float | None]) -> list[str]:
    return ["–" if accuracy[model] is None else f"{accuracy[model]:.1f}" for model in MODELS]


def remarks(results: list[TaskResult], limit: int | None) -> list[str]:
    """Return the notes that a reader of the table needs."""
    lines = [
        "Percent right. The first capital letter that is an option counts as the answer (Orca's rule). Lone letter: the accuracy "
        "if the first such letter that stands alone counts. No letter: answers without any. Intervals: 95 %, Wilson's; those of "
        "a mean treat the items of its tasks as drawn at random.",
        "The other columns are from Orca's tables 8 and 11 (arXiv:2306.02707), made with prompts of their own at temperature "
        "0.7, so differences of a few points mean nothing.",
    ]
    if skipped := sum(each.skipped for each in results):
        lines.append(f"{skipped} malformed items were skipped; results.json names them.")
    if limit:
        lines.append(f"Only the first {limit} items of each task were asked: a trial run, not a result.")
    odd = [
        f"{each.exam.task} has {each.items + each.skipped}"
        for each in results
        if not limit and not each.exam.items <= each.items + each.skipped <= each.exam.items + 2
    ]
    if odd:
        lines.append(f"These files are not the ones that Orca used: {', '.join(odd)} items.")
    return lines


def show(name: str, results: list[TaskResult], averages: list[SuiteResult], console: Any) -> None:
    from rich.table import Table

    heads, lines = rows(name, results, averages)
    console.width = max(console.width, 150)
    table = Table(show_edge=False)
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", no_wrap=index != 0)
    for line in lines:
        table.add_row(*line, style="bold" if ", mean of " in line[0] else None)
    console.print(table)


def write_results(
    config: BenchConfig, results: list[TaskResult], averages: list[SuiteResult], skipped: dict[str, list[str]]
) -> None:
    """Write results.json, results.md and report.html, each whole or not at all."""
    from fastft.common.html import write_page
    from fastft.judge.tables import markdown_table

    content = {
        "model": config.shown_name,
        "parameters": config.parameters,
        "limit": config.limit,
        "tasks": [asdict(each) for each in results],
        "averages": [asdict(each) for each in averages],
        "skipped": [line for bad in skipped.values() for line in bad],
    }
    write_whole(config.output / "results.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    heads, lines = rows(config.shown_name, results, averages)
    notes = remarks(results, config.limit)
    text = markdown_table(heads, lines) + "\n\n" + "\n".join(f"- {line}" for line in notes) + "\n"
    write_whole(config.output / "results.md", text)
    write_page(
        config.output / "report.html",
        Path(__file__).with_name("bench.html.jinja"),
        title=f"Exams: {config.shown_name}",
        heads=heads,
        lines=lines,
        notes=notes,
        skipped=content["skipped"],
        plots=[(mean, [each for each in results if each.exam.suite == mean.suite]) for mean in averages],
        models=MODELS,
    )


if __name__ == "__main__":
    run_module(main)
