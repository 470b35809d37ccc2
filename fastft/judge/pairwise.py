"""Ask judges about answers: choose the pairs, their order and the prompt, and turn each reply into a judgment.

`fastft.judge.command` and `fastft.judge.api` call `plan` and `judge_all`. In a prompt, the texts to be judged are enclosed
in marks that contain a hash of all these texts, so no answer can contain its own closing mark.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastft.errors import UserError
from fastft.inference.budget import Money
from fastft.inference.client import Client, Unanswered, estimate_tokens, run_all
from fastft.inference.completion import Reply
from fastft.judge.judgment import Judgment, Mode, Reading, held, no_reply
from fastft.judge.questions import Answer, Question
from fastft.judge.replies.parsing import is_refusal, parse_single, spoken
from fastft.judge.replies.verdicts import Asked, asked_by, read_pair

PROMPTS = Path(__file__).with_name("prompts")
USUAL_REPLY_TOKENS = 200  # a few sentences and the scores: what the estimate before a run assumes
AGAIN = "That could not be read. Reply with the JSON object alone."
AGAIN_VERDICT = "That could not be read. Reply with the verdict alone, in the form that was asked for."
# Words with which an answer tries to decide its own score. None of the 560 answers of Vicuna's evaluation matches.
_INJECTION = re.compile(
    r"\bscore_[12]\b|\bscore [12]\s*[:=：]"
    r"|\"score\"|\bassistant\s*[12AB]\s+(?:is|was|performed)\s+(?:\w+\s+)?better\b|\[\[\s*(?:[ABC]|\d+)\s*\]\]"
    r"|\b(?:ignore|disregard|forget)\s+(?:all\s+|any\s+)?(?:of\s+)?(?:the\s+|your\s+)?(?:previous|prior|above|earlier)\s+(?:instructions?|prompts?|text)"
    r"|\bscore\s*(?:of|is|:|=)?\s*(?:10|ten)\b|\[The (?:Start|End) of Assistant"
    r"|</?\s*(?:answer|question|reference)(?:\s+of\b|\s*\w*\s*>)"  # the marks of our prompts, with any hash
    r"|\[(?:answer|question) \d+, (?:for context|to be judged)\]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class JudgeTask:
    """One request to a judge: about one answer (`second` is None), or about two in one order."""

    question: Question
    turn: int
    first: Answer
    second: Answer | None

    @property
    def mode(self) -> Mode:
        return "pairwise" if self.second else "single"

    @property
    def answers(self) -> list[Answer]:
        return [self.first, self.second] if self.second else [self.first]

    @property
    def reference(self) -> tuple[str, ...] | None:
        """The reference answers up to this turn, where the question has any for it."""
        whole = self.question.reference or ()
        return whole[: self.turn] if len(whole) >= self.turn else None


def check_answers(
    questions: list[Question], files: dict[str, list[Answer]], allow_missing: bool
) -> dict[str, dict[str, Answer]]:
    """Return the answers by model and question. `files` maps the name of a file to the answers in it.

    Raises UserError if two files hold answers of one model, if an answer is to none of the questions, and, unless
    `allow_missing`, if a model has not answered all of them.
    """
    by_model: dict[str, dict[str, Answer]] = {}
    home: dict[str, str] = {}
    known = {question.id: question for question in questions}
    for path, answers in files.items():
        for answer in answers:
            if home.setdefault(answer.model, path) != path:
                raise UserError(
                    f"{path}: has answers of {answer.model}, and so has {home[answer.model]}; rename the model in one of them"
                )
            if answer.question_id not in known:
                raise UserError(f"{path}: answers question {answer.question_id}, which is not among the questions")
            if not answer.error and len(answer.turns) == len(known[answer.question_id].turns):
                by_model.setdefault(answer.model, {})[answer.question_id] = answer
    for model, path in home.items():
        missing = [question.id for question in questions if question.id not in by_model.get(model, {})]
        if missing and not allow_missing:
            some = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
            raise UserError(
                f"{path}: {model} has no whole answer to {len(missing)} of {len(questions)} questions ({some}); run "
                "fastft answer again, or --allow_missing to judge the others"
            )
    return by_model


def plan(
    questions: list[Question],
    answers: dict[str, dict[str, Answer]],
    mode: Mode = "pairwise",
    baseline: str | None = None,
    both_orders: bool = True,
) -> list[JudgeTask]:
    """Return everything that a judge will be asked, question by question and turn by turn.

    In mode "pairwise" that is every pair of models, or `baseline` with each of the others, in both orders or in one. In mode
    "single" it is each answer alone. Raises UserError if there is nothing to compare.
    """
    if mode == "pairwise" and len(answers) < 2:
        raise UserError("there is only one model, so nothing to compare; give answers of another, or --mode single")
    if baseline is not None and baseline not in answers:
        raise UserError(f"--baseline {baseline}: is not among the models ({', '.join(answers)})")
    if mode == "single":
        groups: list[tuple[str, ...]] = [(model,) for model in answers]
    elif baseline:
        groups = [(baseline, model) for model in answers if model != baseline]
    else:
        groups = list(itertools.combinations(answers, 2))
    if both_orders:
        groups = [order for group in groups for order in dict.fromkeys((group, group[::-1]))]
    tasks = []
    for question in questions:
        for group in groups:
            found = [answers[model].get(question.id) for model in group]
            if all(found):
                second = found[1] if len(found) == 2 else None
                tasks += [JudgeTask(question, turn, found[0], second) for turn in range(1, len(question.turns) + 1)]
    if not tasks:
        raise UserError("there is nothing to judge: no question has an answer of each model that is to be compared")
    return tasks


def load_prompts(directory: Path | None = None) -> dict[str, str]:
    """Return the four prompts by name, ours or those of the same name in `directory`.

    Raises UserError for a directory without any, and for a prompt that lacks a placeholder, such as {question}.
    """
    prompts = {}
    for name in ("pairwise", "pairwise-reference", "single", "single-reference"):
        path = (directory or PROMPTS) / f"{name}.txt"
        path = path if path.is_file() else PROMPTS / f"{name}.txt"
        text = path.read_text(encoding="utf-8")
        needed = (
            ["mark", "question", "answer_1"] + ["answer_2"] * ("pair" in name) + ["reference"] * ("reference" in name)
        )
        if missing := [place for place in needed if f"{{{place}}}" not in text]:
            raise UserError(f"{path}: has no {{{missing[0]}}}")
        prompts[name] = text
    if directory and not any((directory / f"{name}.txt").is_file() for name in prompts):
        raise UserError(f"{directory}: holds none of {', '.join(f'{name}.txt' for name in prompts)}")
    return prompts


def write_prompt(task: JudgeTask, prompts: dict[str, str]) -> str:
    """Return the prompt. All placeholders are filled in one pass, so what looks like one in an answer stays as it is."""
    values = {
        "question": _shown(task.question.turns[: task.turn], "question"),
        "answer_1": _shown(task.first.turns[: task.turn], "answer"),
        "answer_2": _shown(task.second.turns[: task.turn], "answer") if task.second else "",
        "reference": _shown(task.reference, "answer") if task.reference else "",
    }
    values["mark"] = hashlib.sha256("\0".join(values.values()).encode()).hexdigest()[:12]
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), _template(task, prompts))


def _template(task: JudgeTask, prompts: dict[str, str]) -> str:
    return prompts[f"{task.mode}-reference" if task.reference else task.mode]


def _asked(task: JudgeTask, prompts: dict[str, str]) -> Asked:
    """What the judge is asked for. One answer alone always gets a score."""
    return asked_by(_template(task, prompts)) if task.second else "scores"


def _shown(turns: tuple[str, ...], what: str) -> str:
    """Return a single turn unchanged.

    If there are several, the last is labelled as the one to be judged, the others as context.
    """
    if len(turns) == 1:
        return turns[0]
    before = "\n\n".join(f"[{what} {number}, for context]\n{turn}" for number, turn in enumerate(turns[:-1], 1))
    return f"{before}\n\n[{what} {len(turns)}, to be judged]\n{turns[-1]}"


async def judge_one(task: JudgeTask, client: Client, prompts: dict[str, str], max_tokens: int) -> Judgment:
    """Ask for scores or a verdict. If the reply cannot be read, ask once more; a second such reply is recorded as unparsed."""
    messages, options = _request(task, prompts, max_tokens)
    asked = _asked(task, prompts)
    words, reply, reading, usd, failed = "", None, None, 0.0, False
    for attempt in range(2):
        try:
            reply = await client.ask(messages, attempt, **options)
        except Unanswered as error:
            words, failed = "\n\n".join(filter(None, [words, no_reply(str(error))])), True
            break
        words = reply.text
        usd += client.usd(reply.prompt_tokens, reply.completion_tokens)
        reading = _read(words, task.mode, asked)
        # A judge that used up its tokens by thinking would use them up again.
        only_thought = not words.strip() and reply.finish_reason == "length"
        if reading or only_thought:
            break
        # Some endpoints refuse an empty turn, so after an empty reply the question is asked again as it was.
        if words.strip():
            again = AGAIN if asked == "scores" else AGAIN_VERDICT
            messages = [*messages[:1], {"role": "assistant", "content": words}, {"role": "user", "content": again}]
    return Judgment(
        question_id=task.question.id,
        category=task.question.category,
        mode=task.mode,
        judge=client.label,
        model_a=task.first.model,
        model_b=task.second.model if task.second else None,
        text=words,
        turn=task.turn,
        referenced=task.reference is not None,
        flags=tuple(_flags(task, words, reply, reading is not None, failed)),
        usd=usd or None,
        **held(reading),
    )


def _read(words: str, mode: Mode, asked: Asked) -> Reading | None:
    if mode == "pairwise":
        return read_pair(words, asked)
    score = parse_single(words)
    return None if score is None else (score,)


def _flags(task: JudgeTask, words: str, reply: Reply | None, parsed: bool, failed: bool) -> Iterable[str]:
    """Yield the flags of a judgment; `fastft.judge.tables.FLAGS` says what each means."""
    if failed:
        yield "failed"
    if not parsed and is_refusal(words):
        yield "refusal"
    if reply and reply.finish_reason == "length":
        yield "cut"
    if not words.strip():
        yield "empty"
    texts = [answer.turns[task.turn - 1] for answer in task.answers]
    attacks = [found[0].lower() for text in texts for found in _INJECTION.finditer(text)]
    if attacks:
        yield "injection"
        said = (spoken(words) if parsed else words).lower()
        if any(attack in said for attack in attacks):
            yield "quotes_injection"


def _request(task: JudgeTask, prompts: dict[str, str], max_tokens: int) -> tuple[list[dict[str, str]], dict]:
    messages = [{"role": "user", "content": write_prompt(task, prompts)}]
    options = {"temperature": 0, "max_tokens": max_tokens}
    if _asked(task, prompts) == "scores":  # a schema would forbid a verdict in any other form
        options["response_format"] = _schema(task.mode)
    return messages, options


def _schema(mode: Mode) -> dict:
    scores = {"pairwise": ("score_1", "score_2"), "single": ("score",)}[mode]
    properties = {"explanation": {"type": "string"}} | {score: {"type": "number"} for score in scores}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "judgment", "strict": True, "schema": schema}}


def estimate(
    tasks: list[JudgeTask], clients: list[Client], prompts: dict[str, str], max_tokens: int
) -> tuple[int, int, int, float]:
    """Estimate the calls, prompt tokens, reply tokens and dollars for everything that is not in the cache."""
    calls, prompt, usd = 0, 0, 0.0
    for task in tasks:
        messages, options = _request(task, prompts, max_tokens)
        tokens = estimate_tokens(messages)
        for client in clients:
            if not client.cached(messages, 0, options):
                calls, prompt, usd = calls + 1, prompt + tokens, usd + client.usd(tokens, USUAL_REPLY_TOKENS)
    return calls, prompt, USUAL_REPLY_TOKENS * calls, usd


def judge_all(
    tasks: list[JudgeTask], clients: list[Client], prompts: dict[str, str], max_tokens: int, money: Money
) -> tuple[list[Judgment], str | None]:
    """Return the judgments, task by task and judge by judge, and why it stopped early, or None if all was asked."""
    found: dict[int, Judgment] = {}
    works = [partial(judge_one, task, client, prompts, max_tokens) for task in tasks for client in clients]
    stopped = run_all(works, "judging", money, found.__setitem__)
    return [found[index] for index in sorted(found)], stopped
