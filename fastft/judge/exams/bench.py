"""Exams beside Orca's published figures: `fastft bench --model DIR|URL#name --tasks bbh,agieval --data DIR -o bench`.

    fastft bench --model runs/first/model --data exams -o bench                 # exams/bbh/*.json, exams/agieval/*.jsonl
    OPENAI_API_KEY=… fastft bench --model https://api.openai.com/v1#gpt-4.1 --tasks snarks --data exams --dry_run

lm-evaluation-harness runs the tasks of fastft.judge.exams, zero-shot: one question, no examples, no system message. OUTPUT/
holds the tasks, answers.jsonl (an interrupted run goes on), results.json, results.md and report.html.
"""

import argparse
import json
import logging
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastft.errors import UserError
from fastft.judge.answer import add_endpoint_options, add_model_options, answer_all
from fastft.judge.exams.items import METRICS, MODELS, Published, chosen, load_items, write_task
from fastft.judge.questions import Question

Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Result:
    """A task. `low` and `high`: Wilson's 95 % interval of the accuracy by the first capital letter; all in percent."""

    exam: Published
    items: int
    skipped: int
    accuracy: float
    low: float
    high: float
    lone_letter: float
    no_letter: float


@dataclass(frozen=True)
class Average:
    """The unweighted mean over the tasks of a suite, as Orca's tables have it, and the same of their columns."""

    suite: str
    tasks: int
    accuracy: float
    low: float
    high: float
    lone_letter: float
    no_letter: float
    published: dict[str, float | None]


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 where questions are left."""
    parser = argparse.ArgumentParser(prog="fastft bench", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds bbh/ and agieval/")
    parser.add_argument("--tasks", default="bbh,agieval", help="suites and tasks, separated by commas")
    parser.add_argument("--limit", type=int, help="only the first so many items of each task: no result, a rehearsal")
    parser.add_argument("-o", "--output", type=Path, default=Path("bench"))
    add_model_options(parser, max_tokens=256)
    add_endpoint_options(parser, "model")
    arguments = parser.parse_args(argv)
    try:
        return bench(arguments)
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install 'fastft[bench]'", file=sys.stderr)
        return 1


def bench(arguments: argparse.Namespace) -> int:
    """Write the tasks, let the harness run them, show. Raises UserError for the user's mistakes."""
    from rich.console import Console

    if arguments.limit is not None and arguments.limit < 1:
        raise UserError("--limit must be at least 1")
    exams = chosen(arguments.tasks)
    loaded = [load_items(arguments.data, exam) for exam in exams]
    skipped = {exam.name: bad for exam, (_, bad) in zip(exams, loaded)}
    for line in (line for bad in skipped.values() for line in bad):
        print(f"skipped: {line}", file=sys.stderr)
    tasks = arguments.output / "tasks"
    for exam, (items, _) in zip(exams, loaded):
        write_task(tasks, exam, items[: arguments.limit])
    samples = run_harness(tasks, exams, arguments)
    if arguments.dry_run:
        return 0
    results = [result(exam, len(skipped[exam.name]), samples[exam.name]) for exam in exams]
    averages = [average([each for each in results if each.exam.suite == suite]) for suite in _suites(results)]
    name = arguments.name or arguments.model.rstrip("/").rpartition("#" if "#" in arguments.model else "/")[2]
    write_results(arguments, name, results, averages, skipped)
    show(name, results, averages, Console())
    for line in remarks(results, arguments.limit):
        print(line)
    print(f"report: {arguments.output / 'report.html'}")
    return 0


def run_harness(directory: Path, exams: list[Published], arguments: argparse.Namespace) -> dict[str, list[dict]]:
    """The harness over the tasks in `directory`: its samples by task, {} in a dry run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from datasets.utils.logging import disable_progress_bar
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Answering(LM):
        """`fastft answer` as the harness knows models: all questions at once, those answered before not again."""

        def generate_until(self, requests, disable_tqdm=False) -> list[str]:
            questions = [
                Question(f"{request.task_name}:{request.doc_id}", request.task_name, (request.args[0],))
                for request in requests
            ]
            options = argparse.Namespace(**vars(arguments) | {"output": arguments.output / "answers.jsonl"})
            answers, _ = answer_all(questions, options)
            return [answers[question.id].turns[0] if answers else "" for question in questions]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError("the tasks are generative")

        loglikelihood_rolling = loglikelihood

    disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("lm-eval").setLevel(logging.ERROR)
    found = simple_evaluate(
        model=Answering(),
        tasks=[exam.name for exam in exams],
        task_manager=TaskManager(include_path=str(directory), include_defaults=False),
        bootstrap_iters=0,  # intervals are made here
    )
    return {} if arguments.dry_run else found["samples"]


def result(exam: Published, skipped: int, samples: list[dict[str, Any]]) -> Result:
    from statsmodels.stats.proportion import proportion_confint

    right = sum(sample["first_capital"] for sample in samples)
    low, high = proportion_confint(right, len(samples), method="wilson")
    means = {name: 100 * sum(sample[name] for sample in samples) / len(samples) for name in METRICS}
    return Result(
        exam,
        len(samples),
        skipped,
        means["first_capital"],
        100 * low,
        100 * high,
        means["lone_letter"],
        means["no_letter"],
    )


def average(results: list[Result]) -> Average:
    """The tasks are given, their items are drawn: the variances of the means add up (p(1 - p) / n, at least one answer's)."""
    mean = lambda values: sum(values) / len(results)  # noqa: E731
    accuracy = mean([each.accuracy for each in results])
    variance = 0.0
    for each in results:
        share = (each.accuracy * each.items / 100 + 1) / (each.items + 2)  # Agresti-Coull: 0 of n is not certain either
        variance += share * (1 - share) / (each.items + 2)
    half = 100 * Z * math.sqrt(variance) / len(results)
    columns: dict[str, float | None] = {}
    for model in MODELS:
        values = [each.exam.accuracy[model] for each in results]
        columns[model] = mean(values) if None not in values else None
    return Average(
        results[0].exam.suite,
        len(results),
        accuracy,
        max(0.0, accuracy - half),
        min(100.0, accuracy + half),
        mean([each.lone_letter for each in results]),
        mean([each.no_letter for each in results]),
        columns,
    )


def _suites(results: list[Result]) -> list[str]:
    return list(dict.fromkeys(each.exam.suite for each in results))


# What is shown ---------------------------------------------------------------------------------------------------------


def rows(name: str, results: list[Result], averages: list[Average]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the table, each suite followed by its average."""
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


def _figures(each: Result | Average) -> list[str]:
    interval = f"[{each.low:.1f}, {each.high:.1f}]"
    return [f"{each.accuracy:.1f}", interval, f"{each.lone_letter:.1f}", f"{each.no_letter:.1f}"]


def _published(accuracy: dict[str, float | None]) -> list[str]:
    return ["–" if accuracy[model] is None else f"{accuracy[model]:.1f}" for model in MODELS]


def remarks(results: list[Result], limit: int | None) -> list[str]:
    """What a reader of the table must know."""
    lines = [
        "Percent right. An answer is the first capital letter that is an option (Orca's rule); lone letter: the first that "
        "stands alone; no letter: answers without any. Intervals: 95 %, Wilson's; of a mean, over the items of its tasks.",
        "The other columns: Orca's tables 8 and 11 (arXiv:2306.02707), made with prompts of their own at temperature 0.7: "
        "a few points are no difference.",
    ]
    if skipped := sum(each.skipped for each in results):
        lines.append(f"{skipped} malformed items were skipped; results.json names them.")
    if limit:
        lines.append(f"Only the first {limit} items of each task were asked: a rehearsal, no result.")
    odd = [
        f"{each.exam.task} has {each.items + each.skipped}"
        for each in results
        if not limit and not each.exam.items <= each.items + each.skipped <= each.exam.items + 2
    ]
    if odd:
        lines.append(f"Other files than Orca's: {', '.join(odd)} items.")
    return lines


def show(name: str, results: list[Result], averages: list[Average], console: Any) -> None:
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
    arguments: argparse.Namespace,
    name: str,
    results: list[Result],
    averages: list[Average],
    skipped: dict[str, list[str]],
) -> None:
    """results.json, results.md and report.html, each whole or not there."""
    from fastft.common.html import write_page
    from fastft.judge.report import markdown_table

    content = {
        "model": name,
        "parameters": {"temperature": arguments.temperature, "max_tokens": arguments.max_tokens},
        "limit": arguments.limit,
        "tasks": [asdict(each) for each in results],
        "averages": [asdict(each) for each in averages],
        "skipped": [line for bad in skipped.values() for line in bad],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (arguments.output / "results.json").write_text(text, encoding="utf-8")
    heads, lines = rows(name, results, averages)
    notes = remarks(results, arguments.limit)
    text = markdown_table(heads, lines) + "\n\n" + "\n".join(f"- {line}" for line in notes) + "\n"
    (arguments.output / "results.md").write_text(text, encoding="utf-8")
    write_page(
        arguments.output / "report.html",
        Path(__file__).with_name("bench.html.jinja"),
        title=f"Exams: {name}",
        heads=heads,
        lines=lines,
        notes=notes,
        skipped=content["skipped"],
        plots=[(mean, [each for each in results if each.exam.suite == mean.suite]) for mean in averages],
        models=MODELS,
    )
