"""A blend that answers questions offline: the same draws as behind the gateway, over the history that all its models share.

    answerer = BlendAnswerer(read_blend("blend:runs/a/model,runs/b/model"), config, endpoint, Path("blend.jsonl"))
    answers, usd = answer_all(questions, Path("blend.jsonl"), answerer)

The question's id is the id of the conversation, so a gateway that is sent this id draws the same models. Every model reads
the whole conversation in its own chat template, as if it had said all of it. One directory's model is in memory at a time: it
answers all turns that wait for it before the next one is loaded. Each turn is written to blend.turns.jsonl at once, so that a
killed run loses none; the file is removed when every question is answered. No other model fails over for one that cannot
answer: the question stays unanswered, and the next run asks the same model again.
"""

import gc
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastft.common.files import require_place
from fastft.compose.blend_parts import Blend
from fastft.compose.policy import Choice
from fastft.data.conversation import Conversation, Message
from fastft.errors import UserError
from fastft.inference.budget import Cache, Money
from fastft.inference.client import Client, Unanswered, make_clients, run_all
from fastft.inference.endpoint import EndpointConfig, is_address
from fastft.judge.answer import (
    ModelConfig,
    cache_beside,
    cut_torn_line,
    estimate_prompt,
    fingerprint,
    what_it_takes,
    whole_answer,
)
from fastft.judge.questions import Answer, Question
from fastft.judge.rows import read_objects

logger = logging.getLogger(__name__)

Keep = Callable[[Answer], None]


@dataclass(frozen=True)
class BlendedTurn:
    """One model's answer to one turn of a question: a line of the file of turns."""

    question_id: str
    turn: int
    """From 1."""
    model: str
    probabilities: dict[str, float]
    why: str
    text: str
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str


@dataclass
class _AskedQuestion:
    """A question, and the turns of it that are answered."""

    question: Question
    turns: list[BlendedTurn] = field(default_factory=list)
    error: str | None = None

    @property
    def is_open(self) -> bool:
        return self.error is None and len(self.turns) < len(self.question.turns)

    @property
    def messages(self) -> list[Message]:
        """The conversation up to the turn that is to be answered."""
        said = []
        for asked, answered in zip(self.question.turns, self.turns):
            said += [Message("user", asked), Message("assistant", answered.text)]
        return [*said, Message("user", self.question.turns[len(self.turns)])]

    def answer(self, name: str) -> Answer:
        if self.error is not None:
            return Answer(self.question.id, name, (), error=self.error)
        answer = whole_answer(self.question.id, name, self.turns, sum(each.seconds for each in self.turns))
        by = [{"model": each.model, "probabilities": each.probabilities, "why": each.why} for each in self.turns]
        return replace(answer, answered_by=tuple(by))


class BlendAnswerer:
    """Several models, directories or endpoints, of which each turn draws one."""

    def __init__(self, blend: Blend, config: ModelConfig, endpoint: EndpointConfig, path: Path):
        """The answers will be in `path`, and the turns beside it. Raises UserError for an endpoint that cannot be asked."""
        self.blend, self.policy, self.config, self.endpoint = blend, blend.policy, config, endpoint
        self.name, self.money = blend.policy.name, Money(endpoint.max_usd)
        self.cache, self.turns_path = Cache(cache_beside(path)), path.with_suffix(".turns.jsonl")
        clients = self._clients()
        models = {
            name: f"{clients[name].url}#{clients[name].name}" if name in clients else fingerprint(Path(place))
            for name, place in blend.places.items()
        }
        self.made_with = {"model": models, **blend.described, **config.parameters}

    def would_ask(self, questions: Sequence[Question]) -> str:
        clients, drawn = self._clients(), {name: [] for name in self.policy.models}
        for question in questions:
            for number, turn in enumerate(question.turns, 1):
                drawn[self._draw(Conversation(question.id), number).model].append(turn)
        usd, most = None, self.config.max_tokens
        if self.endpoint.usd_per_million:
            usd = sum(clients[name].usd(estimate_prompt(drawn[name]), most * len(drawn[name])) for name in clients)
        shares = ", ".join(f"{name} {len(turns)}" for name, turns in drawn.items())
        turns = [turn for each in drawn.values() for turn in each]
        return f"{what_it_takes(turns, most, usd)} ({shares})"

    def answer(self, questions: Sequence[Question], keep: Keep) -> str | None:
        with _TurnFile(self.turns_path, {"blend": self.name, "made_with": self.made_with}).opened() as turns:
            dialogues = [_AskedQuestion(question, turns.found.get(question.id, [])) for question in questions]
            for dialogue in dialogues:
                if not dialogue.is_open:  # a run was killed between its last turn and its answer
                    keep(dialogue.answer(self.name))
            stopped = self._answer_open(dialogues, turns, keep)
        if stopped is None and not any(each.error for each in dialogues):
            self.turns_path.unlink()
        return stopped

    def _answer_open(self, dialogues: list[_AskedQuestion], turns: "_TurnFile", keep: Keep) -> str | None:
        """Answer what is open: by the endpoints as far as that goes, then by one directory as far as that goes, and so on."""
        memory = _OneInMemory()
        while waiting := self._waiting(dialogues):
            remote = [each for name in waiting if is_address(self.blend.places[name]) for each in waiting[name]]
            if remote:
                if stopped := self._ask_endpoints(remote, turns, keep):
                    return stopped
                continue
            name = memory.name if memory.name in waiting else max(waiting, key=lambda each: len(waiting[each]))
            logger.info("%s: %d turns wait for it", name, len(waiting[name]))
            # No name here may refer to the model: it would keep it in memory while the next one is loaded.
            for dialogue in self._generate(memory.load(name, self.blend.places[name]), name, waiting[name], turns):
                if not dialogue.is_open:
                    keep(dialogue.answer(self.name))
        return None

    def _waiting(self, dialogues: list[_AskedQuestion]) -> dict[str, list[_AskedQuestion]]:
        """The open dialogues by the model that is to answer next."""
        waiting: dict[str, list[_AskedQuestion]] = {}
        for dialogue in dialogues:
            if dialogue.is_open:
                waiting.setdefault(self._next(dialogue).model, []).append(dialogue)
        return waiting

    def _next(self, dialogue: _AskedQuestion) -> Choice:
        conversation = Conversation(dialogue.question.id, dialogue.messages)
        return self._draw(conversation, len(dialogue.turns) + 1)

    def _draw(self, conversation: Conversation, turn: int) -> Choice:
        return self.policy.choose(conversation, turn, self.policy.models)

    def _ask_endpoints(self, dialogues: list[_AskedQuestion], turns: "_TurnFile", keep: Keep) -> str | None:
        """Ask the next turns of all dialogues at once, until each is answered or waits for a directory."""
        clients = self._clients()

        def done(_: int, dialogue: _AskedQuestion) -> None:
            if not dialogue.is_open:
                keep(dialogue.answer(self.name))

        works = [partial(self._ask_on, clients, each, turns) for each in dialogues]
        return run_all(works, "answering", self.money, done)

    async def _ask_on(self, clients: dict[str, Client], dialogue: _AskedQuestion, turns: "_TurnFile") -> _AskedQuestion:
        while dialogue.is_open and (choice := self._next(dialogue)).model in clients:
            messages = [{"role": each.role, "content": each.content} for each in dialogue.messages]
            try:
                reply = await clients[choice.model].ask(messages, **self.config.parameters)
            except Unanswered as error:
                dialogue.error = f"turn {len(dialogue.turns) + 1}, {choice.model}: {error}"
            else:
                turns.add(dialogue, choice, reply, reply.seconds)
        return dialogue

    def _clients(self) -> dict[str, Client]:
        """A client for each endpoint, by the model's name. Clients hold connections, which end with their event loop."""
        places = {name: place for name, place in self.blend.places.items() if is_address(place)}
        prices, limits = self.endpoint.prices(len(places)), self.endpoint.limits
        keys = self.config.model_key_env
        return dict(zip(places, make_clients([*places.values()], keys, limits, prices, self.cache, self.money)))

    def _generate(
        self, chat: Any, name: str, dialogues: list[_AskedQuestion], turns: "_TurnFile"
    ) -> Iterator[_AskedQuestion]:
        """Answer the next turn of each dialogue with a model in memory, a batch of similar length at a time."""
        from rich.console import Console
        from rich.progress import track

        def length(dialogue: _AskedQuestion) -> int:
            return sum(len(message.content) for message in dialogue.messages)

        size, ordered = self.config.batch_size, sorted(dialogues, key=length)
        batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        for batch in track(batches, name, console=Console(stderr=True)):
            began = time.monotonic()
            said = [dialogue.messages for dialogue in batch]
            replies = chat.answer_batch(said, self.config.max_tokens, self.config.temperature)
            seconds = (time.monotonic() - began) / len(batch)
            for dialogue, reply in zip(batch, replies):
                turns.add(dialogue, self._next(dialogue), reply, seconds)
                yield dialogue


class _OneInMemory:
    """The one directory's model that is in memory."""

    name: str | None = None
    _chat: Any = None

    def load(self, name: str, directory: str) -> Any:
        """The model `name`, ready to answer. The one before it is freed first."""
        if name != self.name:
            import torch

            from fastft.inference.engine import ChatModel

            self._chat = None
            gc.collect()  # a model refers to itself, so only the collector frees it
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.name, self._chat = name, ChatModel(directory)
        return self._chat


class _TurnFile:
    """The turns that are answered, in a file to which each is appended at once. Its first line says how they are made."""

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path, self.header = path, header
        self.found: dict[str, list[BlendedTurn]] = {}
        """The turns of each question that earlier runs have left."""

    @contextmanager
    def opened(self) -> Iterator["_TurnFile"]:
        """Read what earlier runs have left, and keep the file open. Raises UserError if it was made in another way."""
        require_place(self.path)
        if self.path.exists():
            cut_torn_line(self.path)
            self._read()
        with open(self.path, "ab", buffering=0) as self.file:
            if not self.file.tell():
                self._write(self.header)
            yield self

    def _read(self) -> None:
        for number, record in enumerate(read_objects(self.path)):
            if number == 0:
                if record.value != self.header:
                    raise UserError(
                        f"{self.path}: holds turns that were made with {record.value}, and now it is {self.header}; "
                        "give another file with -o, or remove this one"
                    )
                continue
            try:
                turn = BlendedTurn(**record.value)
            except TypeError:
                raise UserError(f"{record.where}: is no turn of a blend; remove the line") from None
            self.found.setdefault(turn.question_id, []).append(turn)

    def add(self, dialogue: _AskedQuestion, choice: Choice, reply: Any, seconds: float) -> None:
        """Add a reply to its dialogue and to the file."""
        turn = BlendedTurn(
            question_id=dialogue.question.id,
            turn=len(dialogue.turns) + 1,
            model=choice.model,
            probabilities=choice.probabilities,
            why=choice.why,
            text=reply.text,
            seconds=round(seconds, 3),
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            finish_reason=reply.finish_reason,
        )
        self._write(asdict(turn))
        dialogue.turns.append(turn)

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
