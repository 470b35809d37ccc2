"""Have a judge score answers, and keep those out that it scores below the threshold.

It is asked as `fastft judge` asks (fastft.judge.pairwise, one answer at a time). Its replies are in judge.cache.jsonl, so none is
paid twice.
"""

from functools import partial
from pathlib import Path

from fastft.distill.plan import read_plan
from fastft.distill.settings import DistillConfig
from fastft.distill.teachers.answers import Answers, key_of
from fastft.distill.verify.checks import KEPT, AnswerVerdict
from fastft.inference.budget import FREE, Cache, Money
from fastft.inference.client import Client, run_all
from fastft.judge.judgment import Judgment
from fastft.judge.pairwise import JudgeTask, judge_one, load_prompts
from fastft.judge.questions import Answer, Question


def judge_answers(
    config: DistillConfig, plan: Path, answers: Answers, verdicts: dict[str, list[AnswerVerdict | None]]
) -> tuple[str | None, float]:
    """Change, in place, the verdicts on answers that the judge does not find good enough.

    An answer without a judgment is failed; the same command asks for it again. Returns why the judge stopped early, if it did,
    and the dollars that it has cost in all starts.
    """
    settings, money = config.verify.judge, Money(config.verify.judge.max_usd)
    cache = Cache(config.directory / "judge.cache.jsonl")
    money.spent = cache.usd
    address = f"{settings.url.rstrip('/')}#{settings.model}"
    client = Client(address, cache=cache, price=settings.usd_per_million or FREE, money=money, key_env=settings.key_env)
    places, tasks = _tasks(config, plan, answers, verdicts)
    judged: dict[int, Judgment] = {}
    prompts = load_prompts()
    works = [partial(judge_one, task, client, prompts, settings.max_tokens) for task in tasks]
    stopped = run_all(works, "judging", money, judged.__setitem__)
    for index, (name, place) in enumerate(places):
        checked = verdicts[name][place].checked
        judgment = judged.get(index)
        if judgment is None:
            verdicts[name][place] = AnswerVerdict("failed", "not judged", stopped or "", checked)
        elif not judgment.parsed:
            verdicts[name][place] = AnswerVerdict(
                "unverified", "the judge's score cannot be read", judgment.text[:200], checked
            )
        elif judgment.score_a < settings.least:
            detail = f"{judgment.score_a:g} of 10"
            verdicts[name][place] = AnswerVerdict("unverified", f"judged below {settings.least:g}", detail, checked)
    return f"judge: {stopped}" if stopped else None, money.spent


def _tasks(
    config: DistillConfig, plan: Path, answers: Answers, verdicts: dict[str, list[AnswerVerdict | None]]
) -> tuple[list[tuple[str, int]], list[JudgeTask]]:
    """The (teacher, place in the plan) of the answers that are kept so far, and what the judge is asked about each."""
    places, tasks = [], []
    for place, row in enumerate(read_plan(plan)):
        for teacher in config.teachers:
            verdict = verdicts[teacher.name][place]
            if verdict and verdict.status == KEPT:
                text = answers.get(key_of(teacher, row))["text"]
                reference = (row["gold"],) if row["gold"] else None
                question = Question(row["id"], row["collection"], (row["query"],), reference)
                tasks.append(JudgeTask(question, 1, Answer(row["id"], teacher.name, (text,)), None))
                places.append((teacher.name, place))
    return places, tasks
