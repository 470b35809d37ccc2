"""The judge from Python and from notebooks: `from fastft.judge import compare`."""

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fastft.common.records import repair_text
from fastft.errors import UserError
from fastft.inference.budget import Money
from fastft.inference.client import USUAL_LIMITS, Client, Limits, tell_apart
from fastft.judge.answer import endpoint_keys
from fastft.judge.judgment import Judgment, Mode
from fastft.judge.pairwise import judge_all, load_prompts, plan
from fastft.judge.questions import Answer, Question, load_questions
from fastft.judge.stats import Figures, compute


@dataclass(frozen=True)
class Comparison:
    """`figures` has all numbers, `judgments` every look of every judge; `stopped` says why some are missing, if any are.
    A notebook shows its tables.
    """

    figures: Figures
    judgments: list[Judgment]
    stopped: str | None = None

    def _repr_html_(self) -> str:
        from fastft.judge.report import remarks, tables

        parts = []
        for title, heads, rows in tables(self.figures):
            head = "".join(f"<th>{html.escape(each)}</th>" for each in heads)
            body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            parts.append(f"<h4>{html.escape(title)}</h4><table><tr>{head}</tr>{body}</table>")
        lines = [*remarks(self.figures), *([f"Not all was judged: {self.stopped}."] if self.stopped else [])]
        return "".join([*parts, *(f"<p>{html.escape(line)}</p>" for line in lines)])


def compare(
    answers: Mapping[str, Mapping[str, str]],
    judge: str | Iterable[str],
    questions: Iterable[Question] | None = None,
    mode: Mode = "pairwise",
    baseline: str | None = None,
    limits: Limits = USUAL_LIMITS,
    key_env: Iterable[str] = (),
) -> Comparison:
    """Judge `answers` ({model: {question id: text}}) to `questions` (our own 80), in both orders; judges are URL#name, `key_env`
    the environment variables with their keys, where they have any (OPENAI_API_KEY goes to OpenAI unasked, and nowhere else).

        compare({"mine": {"1": "…"}, "theirs": {"1": "…"}}, "http://localhost:8000/v1#judge", [Question("1", "generic", ("…",))])

    Questions that not all models have answered are left out. Raises UserError where there are none, or a judge cannot be
    asked. Inside a running event loop (a notebook's) it works in a thread of its own.
    """
    asked = list(questions) if questions is not None else load_questions()
    shared = [question for question in asked if all(question.id in texts for texts in answers.values())]
    if not shared or any(len(question.turns) != 1 for question in shared):
        raise UserError("compare needs questions of one turn that all models have answered")
    given = {
        model: {question.id: Answer(question.id, model, (repair_text(texts[question.id]),)) for question in shared}
        for model, texts in answers.items()
    }
    money = Money()
    jobs = plan(shared, given, mode, baseline)

    judges = [judge] if isinstance(judge, str) else list(judge)
    keys = endpoint_keys(list(key_env), judges)

    def work() -> tuple[list[Judgment], str | None]:
        clients = [Client(each, limits, money=money, key_env=key) for each, key in zip(judges, keys)]
        tell_apart(clients)
        return judge_all(jobs, clients, load_prompts(), 1024, money)

    judgments, stopped = _in_thread(work)
    if not judgments:
        raise UserError(stopped)
    lengths = {(question.id, model): len(texts[question.id]) for model, texts in answers.items() for question in shared}
    return Comparison(compute(judgments, lengths), judgments, stopped)


def _in_thread(work):
    """asyncio.run does not start inside a loop that runs already."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
