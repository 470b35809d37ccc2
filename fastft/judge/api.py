"""The judge from Python and from notebooks: `from fastft.judge import compare`."""

import html
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from fastft.common.records import repair_text
from fastft.errors import UserError
from fastft.inference.budget import Money
from fastft.inference.client import make_clients
from fastft.inference.endpoint import USUAL_LIMITS, Limits
from fastft.judge.judgment import Judgment, Mode
from fastft.judge.pairwise import judge_all, load_prompts, plan
from fastft.judge.questions import Answer, Question, load_questions
from fastft.judge.statistics.stats import Figures, compute

MAX_TOKENS = 1024  # of a judge's reply, as in `fastft judge`
Result = TypeVar("Result")


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns; a notebook shows its tables.

    `figures` has all numbers, `judgments` every judgment of every judge; `stopped` says why some are missing, if any are.
    """

    figures: Figures
    judgments: list[Judgment]
    stopped: str | None = None

    def _repr_html_(self) -> str:
        from fastft.judge.tables import remarks, tables

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
    """Judge `answers` ({model: {question id: text}}) to `questions` (by default our own 80), in both orders.

        compare({"mine": {"1": "…"}, "theirs": {"1": "…"}}, "http://localhost:8000/v1#judge", [Question("1", "generic", ("…",))])

    A judge is URL#name. `key_env` names the environment variables with the judges' keys, where they need any; without it,
    OPENAI_API_KEY is sent to OpenAI and to nobody else. Questions that some model has not answered are left out. Raises
    UserError if none is left, or if a judge cannot be asked. It works in a thread of its own, so it can be called
    inside a running event loop, such as a notebook's.
    """
    asked = list(questions) if questions is not None else load_questions()
    shared = [question for question in asked if all(question.id in texts for texts in answers.values())]
    if not shared or any(len(question.turns) != 1 for question in shared):
        raise UserError("compare needs questions of one turn that all models have answered")
    given = {
        model: {question.id: Answer(question.id, model, (repair_text(texts[question.id]),)) for question in shared}
        for model, texts in answers.items()
    }
    tasks, judges = plan(shared, given, mode, baseline), [judge] if isinstance(judge, str) else list(judge)
    if not judges:
        raise UserError("compare needs a judge, such as http://localhost:8000/v1#judge")

    def work() -> tuple[list[Judgment], str | None]:
        money = Money()
        clients = make_clients(judges, list(key_env), limits, money=money)
        return judge_all(tasks, clients, load_prompts(), MAX_TOKENS, money)

    judgments, stopped = _in_thread(work)
    if not judgments:
        raise UserError(stopped or "nothing was judged")
    lengths = {(question.id, model): len(texts[question.id]) for model, texts in answers.items() for question in shared}
    return Comparison(compute(judgments, lengths), judgments, stopped)


def _in_thread(work: Callable[[], Result]) -> Result:
    """Call `work` in a thread, because asyncio.run does not start inside a loop that is running already."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
