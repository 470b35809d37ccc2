"""Let the weak model answer: by the likelihood of each label, by a constrained choice, or by a text.

    weak = WeakModel("runs/small/model")                        # or URL#name of an endpoint, with a client
    weak.answer(setting, questions, labels, file)

A model's directory is asked for the likelihood of each label, so that a model that knows the answer but not the format is not
counted as ignorant. An endpoint is asked for one of the labels (`response_format`); where it does not know that parameter, its
text is read. Every answer goes into the file at once.
"""

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastft.compose.grimoire.answering.answers import (
    AnswerFile,
    Setting,
    WeakAnswer,
    best_label,
    choice_format,
    read_choice,
    read_label,
)
from fastft.compose.grimoire.task import TaskQuestion
from fastft.data.conversation import Message
from fastft.errors import UserError
from fastft.inference.budget import Money
from fastft.inference.client import Client, Unanswered, run_all

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16"]
How = Literal["auto", "likelihood", "choice", "text"]
ANSWER_TOKENS = 64  # of a text, as in Grimoire's paper


class WeakModel:
    """A weak model, and how its answers are read. A directory is loaded at the first question."""

    def __init__(
        self,
        model: str,
        client: Client | None = None,
        how: How = "auto",
        template: str | None = None,
        batch_size: int = 16,
        dtype: Dtype | None = None,
    ):
        """`client` is the endpoint's if `model` is one. Raises UserError if the two do not allow `how`."""
        if client is None and not Path(model).is_dir():
            raise UserError(f"--weak {model}: must be a model's directory, or URL#name of an endpoint")
        if client is not None and how == "likelihood":
            raise UserError(
                "--answers likelihood needs a model's directory; an endpoint is asked for a choice, or for a text"
            )
        if client is None and how == "choice":
            raise UserError(
                "--answers choice is for endpoints; a model's directory is asked for likelihoods, or for a text"
            )
        self.model, self.client, self.template, self.dtype, self.batch_size = model, client, template, dtype, batch_size
        self.how = how if how != "auto" else "choice" if client is not None else "likelihood"
        self._chat: Any = None

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.client.label if self.client is not None else Path(self.model).resolve().name

    @property
    def identity(self) -> str:
        """Which model it is: its address, or a digest of its weights with what it is run with."""
        if self.client is not None:
            return f"{self.client.url}#{self.client.name}"
        from fastft.judge.answer import fingerprint

        return " ".join(filter(None, (fingerprint(Path(self.model)), self.template, self.dtype)))

    def answer(
        self, setting: Setting, questions: Sequence[TaskQuestion], labels: Sequence[str], file: AnswerFile
    ) -> list[WeakAnswer]:
        """Answer the questions that `file` holds no answer to, and return the answers to all of them.

        Raises UserError if the money or the endpoint ends before; what has been answered is in the file.
        """
        asked = file.missing(setting, questions)
        if asked and self.client is not None:
            self._ask_endpoint(setting, asked, labels, file, self.client.money)
        elif asked := self._that_fit(setting, asked, labels, file):
            (self._score if self.how == "likelihood" else self._generate)(setting, asked, labels, file)
        return file.of(setting, questions)

    # A model's directory ---------------------------------------------------------------------------------------------------

    @property
    def chat(self) -> Any:
        if self._chat is None:
            from fastft.inference.engine import ChatModel

            self._chat = ChatModel(self.model, self.template, self.dtype)
        return self._chat

    def _that_fit(
        self, setting: Setting, asked: list[TaskQuestion], labels: Sequence[str], file: AnswerFile
    ) -> list[TaskQuestion]:
        """Return the questions that the model's context holds. The others count as failed, as an endpoint would refuse them."""
        if not asked:
            return []
        from fastft.inference.likelihood import tokens_of_answers

        likelihood = self.how == "likelihood"
        room = max(map(len, tokens_of_answers(self.chat, labels))) if likelihood else ANSWER_TOKENS
        fit, too_long = [], []
        for each in asked:
            size = len(self.chat.template.encode_prompt(_messages(setting, each))) + room
            (fit if size <= self.chat.context_length else too_long).append(each)
        if too_long:
            error = f"is longer than the model's context of {self.chat.context_length} tokens"
            logger.warning("%s, %s: %d of %d questions: %s", self.name, setting.name, len(too_long), len(asked), error)
            file.add(
                WeakAnswer(setting.name, each.id, each.label, error=error, prompt=setting.digest(each))
                for each in too_long
            )
        return fit

    def _score(self, setting: Setting, asked: list[TaskQuestion], labels: Sequence[str], file: AnswerFile) -> None:
        from fastft.inference.likelihood import answer_likelihoods

        def keep(places: list[int], scores_BA: Any) -> None:
            answers = []
            for place, row in zip(places, scores_BA.tolist()):
                scores = dict(zip(labels, row))
                valid = min(1.0, sum(map(math.exp, row)))
                question = asked[place]
                answers.append(
                    WeakAnswer(
                        setting.name,
                        question.id,
                        question.label,
                        best_label(scores),
                        valid,
                        "likelihood",
                        scores,
                        prompt=setting.digest(question),
                    )
                )
            file.add(answers)

        logger.info("%s: %d questions, %s", self.name, len(asked), setting.name)
        answer_likelihoods(self.chat, [_messages(setting, each) for each in asked], labels, self.batch_size, keep)

    def _generate(self, setting: Setting, asked: list[TaskQuestion], labels: Sequence[str], file: AnswerFile) -> None:
        logger.info("%s: %d questions, %s", self.name, len(asked), setting.name)
        asked = sorted(asked, key=lambda each: len(each.text))  # similar lengths together
        for begin in range(0, len(asked), self.batch_size):
            some = asked[begin : begin + self.batch_size]
            replies = self.chat.answer_batch([_messages(setting, each) for each in some], ANSWER_TOKENS)
            file.add(_read(setting, each, reply.text, labels, "text") for each, reply in zip(some, replies))

    # An endpoint -----------------------------------------------------------------------------------------------------------

    def _ask_endpoint(
        self, setting: Setting, asked: list[TaskQuestion], labels: Sequence[str], file: AnswerFile, money: Money
    ) -> None:
        works = [partial(self._ask, setting, each, labels) for each in asked]
        what = f"{self.name}, {setting.name}"
        stopped = run_all(works, what, money, lambda index, answer: file.add([answer]))
        if stopped:
            left = len(file.missing(setting, asked))
            raise UserError(f"{setting.name}: {left} of {len(asked)} questions are not answered ({stopped})")

    async def _ask(self, setting: Setting, question: TaskQuestion, labels: Sequence[str]) -> WeakAnswer:
        parameters: dict[str, Any] = {"temperature": 0, "max_tokens": ANSWER_TOKENS}
        if self.how == "choice":
            parameters["response_format"] = choice_format(labels)
        messages = [{"role": "system", "content": setting.prompt}, {"role": "user", "content": question.text}]
        try:
            reply = await self.client.ask(messages, **parameters)
        except Unanswered as error:
            return WeakAnswer(
                setting.name, question.id, question.label, error=str(error), prompt=setting.digest(question)
            )
        return _read(setting, question, reply.text, labels, self.how)


def _read(setting: Setting, question: TaskQuestion, text: str, labels: Sequence[str], how: str) -> WeakAnswer:
    answer = read_choice(text, labels) if how == "choice" else None
    if answer is None:  # an endpoint that knows no response_format, or ignores it
        how, answer = "text", read_label(text, labels)
    valid = float(answer is not None)
    return WeakAnswer(
        setting.name, question.id, question.label, answer, valid, how, text=text[:500], prompt=setting.digest(question)
    )


def _messages(setting: Setting, question: TaskQuestion) -> list[Message]:
    return [Message("system", setting.prompt), Message("user", question.text)]
