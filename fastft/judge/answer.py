"""Have a model answer questions, into a file that a later run continues; `fastft answer` is fastft.compose.answer.

    answerer = answerer_for(config, endpoint, Path("first.jsonl"))       # of a Hugging Face directory, or of URL#name
    answers, usd = answer_all(questions, Path("first.jsonl"), answerer)

A second run with the same file asks only the questions that are missing or have failed. The later turns of a question follow
the model's own answers to the earlier ones. An endpoint's replies are kept in first.cache.jsonl, too, so that none is paid for
twice. Each row records the model's address or a digest of its weights, the parameters, seconds, tokens, and why the answer ended.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fastft.common.command_line import option
from fastft.common.files import require_place
from fastft.errors import UserError
from fastft.inference.budget import Cache, Money
from fastft.inference.client import Client, Unanswered, estimate_tokens, make_clients, run_all
from fastft.inference.endpoint import EndpointConfig, is_address
from fastft.judge.judgment import write_rows
from fastft.judge.questions import Answer, Question, read_answers

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ModelConfig:
    """The model that answers, and how it is asked."""

    model: str
    """A model's directory, or URL#name of an OpenAI-compatible endpoint."""
    name: str | None = None
    """The model's name in tables; by default its directory's or endpoint's."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    max_tokens: int = 1024
    """The longest answer, in tokens."""
    batch_size: int = 16
    """Questions at a time, for a model's directory."""
    dry_run: bool = False
    """Say what would be asked and what that would cost, and ask nothing."""
    model_key_env: list[str] = option(several=True)
    """The environment variable with the key for --model."""

    def __post_init__(self) -> None:
        for key, least in (("max_tokens", 1), ("batch_size", 1), ("temperature", 0)):
            if not getattr(self, key) >= least:
                raise UserError(f"--{key} must be at least {least}")

    @property
    def shown_name(self) -> str:
        """What tables call the model."""
        own = self.model.partition("#")[2] if is_address(self.model) else Path(self.model).resolve().name
        return self.name or own

    @property
    def parameters(self) -> dict[str, Any]:
        """How each answer is made."""
        return {"temperature": self.temperature, "max_tokens": self.max_tokens}


class Answerer(Protocol):
    """A model, or several that take turns, ready to answer questions."""

    name: str
    """What tables call it."""
    made_with: dict[str, Any]
    """How its answers are made, for the `parameters` of each. Answers that were made in another way are not continued."""
    money: Money
    """What endpoints have cost."""

    def would_ask(self, questions: Sequence[Question]) -> str:
        """Say in one line what answering would take."""
        ...

    def answer(self, questions: Sequence[Question], keep: Callable[[Answer], None]) -> str | None:
        """Answer the questions, and call `keep` for each answer at once. Returns why this stopped early, or None."""
        ...


def answerer_for(config: ModelConfig, endpoint: EndpointConfig, path: Path) -> Answerer:
    """The answerer for a directory or an endpoint, whose answers will be in `path`. Raises UserError."""
    return EndpointAnswerer(config, endpoint, path) if is_address(config.model) else DirectoryAnswerer(config)


class EndpointAnswerer:
    """A model behind an OpenAI-compatible endpoint, which is asked many questions at a time."""

    def __init__(self, config: ModelConfig, endpoint: EndpointConfig, path: Path):
        self.name, self.parameters, self.money = config.shown_name, config.parameters, Money(endpoint.max_usd)
        cache, prices = Cache(cache_beside(path)), endpoint.prices(1)
        [self.client] = make_clients([config.model], config.model_key_env, endpoint.limits, prices, cache, self.money)
        self.has_price = bool(endpoint.usd_per_million)
        self.made_with = {"model": f"{self.client.url}#{self.client.name}", **config.parameters}

    def would_ask(self, questions: Sequence[Question]) -> str:
        turns, most = [turn for question in questions for turn in question.turns], self.parameters["max_tokens"]
        usd = self.client.usd(estimate_prompt(turns), most * len(turns)) if self.has_price else None
        return what_it_takes(turns, most, usd)

    def answer(self, questions: Sequence[Question], keep: Callable[[Answer], None]) -> str | None:
        works = [partial(ask, self.client, self.name, each, self.parameters) for each in questions]
        return run_all(works, "answering", self.money, lambda _, answer: keep(answer))


class DirectoryAnswerer:
    """A model's directory, which answers a batch of questions at a time on this machine."""

    def __init__(self, config: ModelConfig):
        self.config, self.name, self.money = config, config.shown_name, Money()
        self.made_with = {"model": fingerprint(Path(config.model)), **config.parameters}

    def would_ask(self, questions: Sequence[Question]) -> str:
        return what_it_takes([turn for question in questions for turn in question.turns], self.config.max_tokens)

    def answer(self, questions: Sequence[Question], keep: Callable[[Answer], None]) -> str | None:
        for answer in generate(questions, self.config):
            keep(answer)
        return None


def cache_beside(path: Path) -> Path:
    """The file in which the replies of endpoints are kept, beside the answers."""
    return path.with_suffix(".cache.jsonl")


def estimate_prompt(turns: Sequence[str]) -> int:
    """About how many tokens the prompts of these turns have, without what was said before them."""
    return sum(estimate_tokens([{"content": turn}]) for turn in turns)


def what_it_takes(turns: Sequence[str], max_tokens: int, usd: float | None = None) -> str:
    """Say what answering `turns` would take; `usd` is the most that it can cost, None if nothing has a price."""
    cost = f", at most ${usd:.2f}" if usd is not None else ""
    most = max_tokens * len(turns)
    return (
        f"would ask {len(turns)} turns: {estimate_prompt(turns):,} prompt tokens, at most {most:,} reply tokens{cost}"
    )


def answer_all(
    questions: list[Question], path: Path, answerer: Answerer, dry_run: bool = False
) -> tuple[dict[str, Answer], float]:
    """Answer the questions that `path` holds no answer to, into `path`. Returns all answers by question, and the dollars spent.

    A dry run asks nothing and returns no answers. Raises UserError for the user's mistakes, and if questions are left
    unanswered: the answers so far are in `path`, and the next call continues with the others.
    """
    done = answered_before(path, answerer.name, answerer.made_with, questions)
    missing = [question for question in questions if question.id not in done]
    logger.info("%s: %d of %d questions to answer", answerer.name, len(missing), len(questions))
    if dry_run:
        print(answerer.would_ask(missing))
        return {}, 0.0
    stopped = _answer_missing(missing, path, answerer, done) if missing else None
    if done:  # in the questions' order, each once
        write_rows(path, [done[question.id] for question in questions if question.id in done])
    _check_complete(questions, done, stopped)
    return done, answerer.money.spent


def _answer_missing(missing: list[Question], path: Path, answerer: Answerer, done: dict[str, Answer]) -> str | None:
    """Answer the questions `missing`. Each answer is added to `done` and to the file at once, so that a killed run loses none.

    Returns why an endpoint's run stopped early, or None.
    """
    require_place(path)
    with open(path, "ab", buffering=0) as file:

        def keep(answer: Answer) -> None:
            done[answer.question_id] = answer = replace(answer, parameters=answerer.made_with)
            file.write((json.dumps(asdict(answer), ensure_ascii=False) + "\n").encode())

        return answerer.answer(missing, keep)


def _check_complete(questions: list[Question], done: dict[str, Answer], stopped: str | None) -> None:
    """Raise UserError if questions are left unanswered, with the reason for the first."""
    failed = [answer for answer in done.values() if answer.error]
    left = len(questions) - len(done) + len(failed)
    if stopped or left:
        why = f" ({stopped})" if stopped else f" ({failed[0].question_id}: {failed[0].error})" if failed else ""
        raise UserError(f"{left} of {len(questions)} questions are not answered{why}; run the same command again")


def fingerprint(directory: Path) -> str:
    """Return a digest of a model's weights, from 64 pieces of each file.

    It distinguishes models of the same name, because the directory of most trained models is called `model`.
    """
    digest = hashlib.sha256()
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for piece in range(64):
                file.seek(size * piece // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:12]


def answered_before(path: Path, name: str, made_with: dict[str, Any], questions: list[Question]) -> dict[str, Answer]:
    """Return the good answers of an earlier run. Raises UserError if another model gave them, or with other parameters."""
    if not path.exists():
        return {}
    cut_torn_line(path)
    if not path.stat().st_size:
        return {}
    known, found = {question.id for question in questions}, {}
    for answer in read_answers(path):
        if answer.model != name:
            raise UserError(f"{path}: holds answers of {answer.model}; give those of {name} another file")
        if answer.question_id not in known:
            raise UserError(
                f"{path}: answers question {answer.question_id}, which is not asked here; give another file"
            )
        if answer.parameters != made_with:
            raise UserError(f"{path}: was made with {answer.parameters}, and now it is {made_with}; give another file")
        if not answer.error:
            found[answer.question_id] = answer
    return found


def cut_torn_line(path: Path) -> None:
    """Remove the last line of a file if a killed run has written only a part of it."""
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


async def ask(client: Client, name: str, question: Question, parameters: dict[str, Any]) -> Answer:
    """Ask an endpoint all turns of a question. The answer has `error` set if that failed for good."""
    messages, replies = [], []
    try:
        for turn in question.turns:
            messages.append({"role": "user", "content": turn})
            replies.append(await client.ask(messages, **parameters))
            messages.append({"role": "assistant", "content": replies[-1].text})
    except Unanswered as error:
        return Answer(question.id, name, (), error=str(error))
    return whole_answer(question.id, name, replies, sum(reply.seconds for reply in replies))


def whole_answer(question_id: str, name: str, replies: Sequence[Any], seconds: float) -> Answer:
    """The answer that consists of the replies to all turns, each with a text, tokens and a finish_reason."""
    empty = [number for number, reply in enumerate(replies, 1) if not reply.text.strip()]
    return Answer(
        question_id=question_id,
        model=name,
        turns=tuple(reply.text for reply in replies),
        seconds=round(seconds, 3),
        prompt_tokens=sum(reply.prompt_tokens for reply in replies),
        completion_tokens=sum(reply.completion_tokens for reply in replies),
        finish_reason=replies[-1].finish_reason if not empty else f"empty answer to turn {empty[0]}",
    )


def generate(questions: Sequence[Question], config: ModelConfig) -> Iterator[Answer]:
    """Answer with a local model, a batch of questions at a time."""
    from rich.console import Console
    from rich.progress import track

    from fastft.inference.engine import ChatModel

    chat = ChatModel(config.model)
    for batch in track(_batches(questions, config.batch_size), "answering", console=Console(stderr=True)):
        yield from _answer_batch(chat, batch, config)


def _batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Group questions of similar length. All questions of a batch have the same number of turns."""
    batches: list[list[Question]] = []
    for question in sorted(questions, key=lambda each: (len(each.turns), sum(map(len, each.turns)))):
        if not batches or len(batches[-1]) == size or len(batches[-1][0].turns) != len(question.turns):
            batches.append([])
        batches[-1].append(question)
    return batches


def _answer_batch(chat: Any, batch: list[Question], config: ModelConfig) -> Iterator[Answer]:
    """Answer all turns of a batch with a `ChatModel`. The seconds of the batch are divided evenly among its questions."""
    from fastft.data.conversation import Message

    began = time.monotonic()
    dialogues: list[list[Message]] = [[] for _ in batch]
    rounds = []
    for turn in range(len(batch[0].turns)):
        for dialogue, question in zip(dialogues, batch):
            dialogue.append(Message("user", question.turns[turn]))
        rounds.append(chat.answer_batch(dialogues, config.max_tokens, config.temperature))
        for dialogue, reply in zip(dialogues, rounds[-1]):
            dialogue.append(Message("assistant", reply.text))
    seconds = (time.monotonic() - began) / len(batch)
    for question, replies in zip(batch, zip(*rounds)):
        yield whole_answer(question.id, config.shown_name, replies, seconds)
