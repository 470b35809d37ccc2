"""The verb: `fastft judge --answers A.jsonl B.jsonl … --judge URL#name -o judged`.

    OPENAI_API_KEY=… fastft judge --answers mine.jsonl theirs.jsonl --judge https://api.openai.com/v1#gpt-4.1 --dry_run
    fastft judge --answers A.jsonl B.jsonl C.jsonl --baseline gpt35 --judge URL#one --judge URL#two
    fastft judge --reviews DIR --scores field                                      # Vicuna's original reviews

OUTPUT/ holds judgments.jsonl, copies of questions and answers, results.json, results.md and report.html; cache.jsonl has every
reply, so that a run that was killed, or is repeated, pays for nothing twice.
"""

import argparse
import sys
from pathlib import Path

from fastft.errors import UserError
from fastft.inference.budget import Money
from fastft.inference.client import Cache, Client, tell_apart
from fastft.judge.answer import add_endpoint_options, endpoint_keys, endpoint_limits, endpoint_prices
from fastft.judge.judgment import Judgment, write_rows
from fastft.judge.pairwise import check_answers, estimate, judge_all, load_prompts, plan
from fastft.judge.questions import OWN, Answer, Question, load_questions, read_answers


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 where not all could be judged."""
    parser = argparse.ArgumentParser(prog="fastft judge", description=__doc__.splitlines()[0])
    parser.add_argument("--answers", nargs="+", default=[], metavar="FILE", help="a model's answers each, JSON Lines")
    parser.add_argument("--questions", default=str(OWN), help="what was asked; without, our own 80")
    parser.add_argument(
        "--references", help="answers that a judge may trust, where the questions have none of their own"
    )
    parser.add_argument("--judge", action="append", default=[], metavar="URL#name", help="repeated: several judges")
    parser.add_argument("--mode", choices=("pairwise", "single"), default="pairwise")
    parser.add_argument("--baseline", help="compare all with this model alone; without, every pair")
    parser.add_argument(
        "--one_order", action="store_true", help="half the calls; what the first place is worth stays unknown"
    )
    parser.add_argument("--prompts", type=Path, help="a directory with prompts of your own, named as ours")
    parser.add_argument("--allow_missing", action="store_true", help="judge what there is where answers are missing")
    parser.add_argument("--max_tokens", type=int, default=1024, help="length of a judge's words")
    parser.add_argument("-o", "--output", type=Path, help="a directory; judged/, and nothing for --reviews")
    parser.add_argument(
        "--dry_run", action="store_true", help="say how many calls, tokens and dollars, and ask nothing"
    )
    parser.add_argument("--reviews", type=Path, help="a directory of Vicuna's reviews (review_FIRST_SECOND.jsonl)")
    parser.add_argument(
        "--scores", choices=("field", "text"), default="text", help="of --reviews: as entered, or as read"
    )
    parser.add_argument(
        "--difference", type=float, help="count the questions that would show it: points of win rate (5) or score (0.5)"
    )
    add_endpoint_options(parser, "judge")
    arguments = parser.parse_args(argv)
    if arguments.difference is not None and not 0 < arguments.difference < 50:
        raise UserError("--difference must be between 0 and 50 points")
    return show_reviews(arguments) if arguments.reviews else judge(arguments)


def show_reviews(arguments: argparse.Namespace) -> int:
    """The figures of reviews that were made long ago; files only where --output is given."""
    from rich.console import Console

    from fastft.judge.replies.importers import read_reviews
    from fastft.judge.report import answer_lengths, show, write_judge_page
    from fastft.judge.stats import compute

    judgments, contradictions, questions, answers = read_reviews(arguments.reviews, arguments.scores)
    figures = compute(judgments, answer_lengths(answers), arguments.difference)
    show(figures, Console())
    for line in contradictions:
        print(f"contradiction: {line}")
    if arguments.output:
        write_results(arguments.output, judgments, questions, answers, arguments.difference)
        write_judge_page(arguments.output / "report.html", figures, judgments, questions, answers)
        print(f"report: {arguments.output / 'report.html'}")
    return is_nothing_read(judgments)


def judge(arguments: argparse.Namespace) -> int:
    """Plan, ask, write. Raises UserError for the user's mistakes, before anything is asked."""
    from rich.console import Console

    from fastft.judge.report import show, write_judge_page

    if not arguments.answers or not arguments.judge:
        raise UserError("give --answers FILE … and --judge URL#name, or --reviews DIR")
    if arguments.max_tokens < 1:
        raise UserError("--max_tokens must be at least 1")
    if arguments.baseline and arguments.mode == "single":
        raise UserError("--baseline is for pairs: an answer judged alone is compared with none")
    questions = load_questions(arguments.questions, arguments.references)
    files = {path: read_answers(path) for path in arguments.answers}
    if len(files) < len(arguments.answers):
        raise UserError("the same file is given twice in --answers")
    answers = check_answers(questions, files, arguments.allow_missing)
    jobs = plan(questions, answers, arguments.mode, arguments.baseline, not arguments.one_order)
    prompts = load_prompts(arguments.prompts)
    money, prices = Money(arguments.max_usd), endpoint_prices(arguments, len(arguments.judge))
    output = arguments.output or Path("judged")
    cache = Cache(output / "cache.jsonl")
    limits = endpoint_limits(arguments)
    keys = endpoint_keys(arguments.key_env, arguments.judge)
    clients = [
        Client(address, limits, cache, price, money, key) for address, price, key in zip(arguments.judge, prices, keys)
    ]
    tell_apart(clients)
    calls, (new, prompt, reply, usd) = len(jobs) * len(clients), estimate(jobs, clients, prompts, arguments.max_tokens)
    priced = f", ${usd:.2f}" if arguments.usd_per_million else ""
    cached = f"; {calls - new:,} more are cached" if new < calls else ""
    print(f"{new:,} calls: about {prompt:,} prompt and {reply:,} reply tokens{priced}{cached}", file=sys.stderr)
    if arguments.dry_run:
        return 0
    judgments, stopped = judge_all(jobs, clients, prompts, arguments.max_tokens, money)
    if judgments:
        given = [answer for model in answers.values() for answer in model.values()]
        figures = write_results(output, judgments, questions, given, arguments.difference)
        show(figures, Console())
        write_judge_page(output / "report.html", figures, judgments, questions, given)
    if money.spent:
        print(f"spent ${money.spent:.2f}")
    failed = sum("failed" in judgment.flags for judgment in judgments)
    missing = calls - len(judgments)
    if missing or failed:
        why = stopped or next(judgment.text for judgment in judgments if "failed" in judgment.flags)
        print(
            f"error: {missing + failed} of {calls} are not judged ({why}); the same command goes on with them",
            file=sys.stderr,
        )
        return 1
    print(f"report: {output / 'report.html'}")
    return is_nothing_read(judgments)


def is_nothing_read(judgments: list[Judgment]) -> int:
    """1, and one line that says why, where no figure has a judgment to stand on; else 0."""
    if any(judgment.parsed for judgment in judgments):
        return 0
    cut = all("cut" in judgment.flags for judgment in judgments)
    do = "give a larger --max_tokens" if cut else "report.html and judgments.jsonl have the words"
    why = f"{judgments[0].judge} wrote {judgments[0].text.strip()[-80:]!r}"
    print(f"error: none of {len(judgments)} judgments could be read ({why}); {do}", file=sys.stderr)
    return 1


def write_results(
    directory: Path, judgments: list[Judgment], questions: list[Question], answers: list[Answer], to_see: float | None
):
    """All files of a judged directory but the cache and the page, what was paid for first. Returns the figures."""
    from fastft.judge.report import ANSWERS, JUDGMENTS, QUESTIONS, write_figures

    directory.mkdir(parents=True, exist_ok=True)
    write_rows(directory / JUDGMENTS, judgments)
    for name, rows in ((QUESTIONS, questions), (ANSWERS, answers)):
        if rows:
            write_rows(directory / name, rows)
    return write_figures(directory, judgments, answers, to_see)
