"""Have a stronger model compare answers: `fastft judge --answers A.jsonl B.jsonl … --judge URL#name -o judged`.

    OPENAI_API_KEY=… fastft judge --answers mine.jsonl theirs.jsonl --judge https://api.openai.com/v1#gpt-4.1 --dry_run
    fastft judge --answers A.jsonl B.jsonl C.jsonl --baseline gpt35 --judge URL#one --judge URL#two
    fastft judge --reviews DIR --scores field                                      # the judgments of others, counted again

OUTPUT/ holds judgments.jsonl, copies of the questions and answers, results.json, results.md and report.html. cache.jsonl keeps
every reply, so that a run that was killed, or is repeated, pays for nothing twice.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastft.common.command_line import option, parse, run_module
from fastft.common.files import make_directory
from fastft.errors import UserError
from fastft.inference.budget import Cache, Money
from fastft.inference.client import make_clients
from fastft.inference.endpoint import EndpointConfig
from fastft.judge.judgment import Judgment, Mode, write_rows
from fastft.judge.pairwise import check_answers, estimate, judge_all, load_prompts, plan
from fastft.judge.questions import OWN, Answer, Question, load_questions, read_answers
from fastft.judge.statistics.stats import Figures

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class JudgeConfig:
    """What is judged, by which judge, and how."""

    answers: list[str] = option(several=True)
    """Files of answers as JSON Lines; all answers of a model are in one file."""
    questions: Path = OWN
    """What was asked; by default our own 80."""
    references: Path | None = None
    """Answers that a judge may trust, for questions that have none of their own."""
    judge: list[str] = option(several=True)
    """URL#name of an OpenAI-compatible endpoint; give it again for several judges."""
    judge_key_env: list[str] = option(several=True)
    """The environment variable with the key for --judge; once for each of several, '' for none."""
    mode: Mode = "pairwise"
    """Compare two answers at a time, or grade each answer alone."""
    baseline: str | None = None
    """Compare every model with this one alone; by default every pair is compared."""
    one_order: bool = False
    """Judge each pair in one order: half the calls, but the bias for the answer shown first stays unknown."""
    prompts: Path | None = None
    """A directory with prompts of your own, named like ours."""
    allow_missing: bool = False
    """Judge the answers that there are, even if some are missing."""
    max_tokens: int = 1024
    """The longest reply of a judge, in tokens."""
    output: Path | None = option(None, short="-o")
    """A directory for the results; by default judged, and none with --reviews."""
    dry_run: bool = False
    """Say how many calls, tokens and dollars it would take, and ask nothing."""
    reviews: list[str] = option(several=True)
    """Files or directories of others' judgments, to be counted again: Vicuna's, QLoRA's, FastChat's, Arena-Hard's, …"""
    scores: Literal["field", "text"] = "text"
    """For --reviews: the results as they were entered, or as they are read from the judge's words where there are any."""
    difference: float | None = None
    """The difference to be detected, for the number of questions needed: points of win rate (5) or of score (0.5)."""

    def __post_init__(self) -> None:
        if self.difference is not None and not 0 < self.difference < 50:
            raise UserError("--difference must be between 0 and 50 points")
        if not self.reviews and not (self.answers and self.judge):
            raise UserError("give --answers FILE … and --judge URL#name, or --reviews FILE or DIR")
        if self.max_tokens < 1:
            raise UserError("--max_tokens must be at least 1")
        if self.baseline and self.mode == "single":
            raise UserError("--baseline is for pairs: with --mode single no answer is compared with another")
        if self.output and self.output.exists() and not self.output.is_dir():
            raise UserError(f"{self.output}: is a file; -o names a directory")
        if len({*self.answers}) < len(self.answers):
            raise UserError("the same file is given twice in --answers")


def main(argv: Sequence[str]) -> int:
    """Run `fastft judge`. Raises UserError if not everything could be judged, once the rest is written."""
    config, endpoint = parse(
        argv, "fastft judge", "Have a stronger model compare answers.", JudgeConfig, EndpointConfig
    )
    if config.reviews:
        show_reviews(config)
    else:
        judge(config, endpoint)
    return 0


def show_reviews(config: JudgeConfig) -> None:
    """Show the figures of others' judgments, and write files only if --output is given."""
    from rich.console import Console

    from fastft.judge.replies.importers import read_reviews
    from fastft.judge.report import answer_lengths, write_judge_page
    from fastft.judge.statistics.stats import compute
    from fastft.judge.tables import show

    judgments, remarks, questions, answers = read_reviews(
        [Path(path) for path in config.reviews],
        config.scores,
        None if config.questions == OWN else config.questions,
        [Path(path) for path in config.answers],
        config.baseline,
    )
    figures = compute(judgments, answer_lengths(answers), config.difference)
    show(figures, Console())
    for line in remarks:
        print(line)
    if config.output:
        write_results(config.output, judgments, questions, answers, config.difference)
        write_judge_page(config.output / "report.html", figures, judgments, questions, answers)
        print(f"report: {config.output / 'report.html'}")
    check_readable(judgments)


def judge(config: JudgeConfig, endpoint: EndpointConfig) -> None:
    """Plan, ask, write.

    Raises UserError for the user's mistakes before anything is asked, and at the end for failed calls.
    """
    from rich.console import Console

    from fastft.judge.report import write_judge_page
    from fastft.judge.tables import show

    questions = load_questions(config.questions, config.references)
    files = {path: read_answers(path) for path in config.answers}
    answers = check_answers(questions, files, config.allow_missing)
    tasks = plan(questions, answers, config.mode, config.baseline, not config.one_order)
    prompts, output = load_prompts(config.prompts), config.output or Path("judged")
    money, cache, prices = Money(endpoint.max_usd), Cache(output / "cache.jsonl"), endpoint.prices(len(config.judge))
    clients = make_clients(config.judge, config.judge_key_env, endpoint.limits, prices, cache, money)
    calls, (new, prompt, reply, usd) = len(tasks) * len(clients), estimate(tasks, clients, prompts, config.max_tokens)
    priced = f", ${usd:.2f}" if endpoint.usd_per_million else ""
    cached = f"; {calls - new:,} more are cached" if new < calls else ""
    logger.info("%s calls: about %s prompt and %s reply tokens%s%s", *_grouped(new, prompt, reply), priced, cached)
    if config.dry_run:
        return
    judgments, stopped = judge_all(tasks, clients, prompts, config.max_tokens, money)
    if judgments:
        given = [answer for model in answers.values() for answer in model.values()]
        figures = write_results(output, judgments, questions, given, config.difference)
        show(figures, Console())
        write_judge_page(output / "report.html", figures, judgments, questions, given)
    if money.spent:
        print(f"spent ${money.spent:.2f}")
    check_complete(judgments, calls, stopped)
    print(f"report: {output / 'report.html'}")
    check_readable(judgments)


def _grouped(*numbers: int) -> list[str]:
    return [f"{number:,}" for number in numbers]


def check_complete(judgments: list[Judgment], calls: int, stopped: str | None) -> None:
    """Raise UserError if calls were not made, or failed for good."""
    failed = [judgment for judgment in judgments if "failed" in judgment.flags]
    missing = calls - len(judgments) + len(failed)
    if missing:
        why = stopped or f"no reply: {failed[0].failure}"
        raise UserError(f"{missing} of {calls} are not judged ({why}); the same command goes on with them")


def check_readable(judgments: list[Judgment]) -> None:
    """Raise UserError if not a single judgment could be read, and say why."""
    if any(judgment.parsed for judgment in judgments):
        return
    cut = all("cut" in judgment.flags for judgment in judgments)
    do = "give a larger --max_tokens" if cut else "report.html and judgments.jsonl have the judge's words"
    why = f"{judgments[0].judge} wrote {judgments[0].text.strip()[-80:]!r}"
    raise UserError(f"none of {len(judgments)} judgments could be read ({why}); {do}")


def write_results(
    directory: Path, judgments: list[Judgment], questions: list[Question], answers: list[Answer], to_see: float | None
) -> Figures:
    """Write all files of a judged directory except the cache and the page, beginning with those that cost money.

    Returns the figures.
    """
    from fastft.judge.report import ANSWERS, JUDGMENTS, QUESTIONS, write_figures

    make_directory(directory)
    write_rows(directory / JUDGMENTS, judgments)
    for name, rows in ((QUESTIONS, questions), (ANSWERS, answers)):
        if rows:
            write_rows(directory / name, rows)
    return write_figures(directory, judgments, answers, to_see)


if __name__ == "__main__":
    run_module(main)
