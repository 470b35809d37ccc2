"""A virtual model of the gateway that tells a weak model what it needs to know: `policy: grimoire`.

    policy = GrimoirePolicy("trec", Path("grimoires/trec"), model="smollm2")
    choice = policy.choose(conversation, turn, candidates)        # always the weak model; `why` names the setting
    messages = policy.instructed(request["messages"])             # what the worker is sent

The prompt is the one that `fastft grimoire build` has chosen: for every question the same one, or where the choice was similar
or ranked, a grimoire for each question. Nothing is asked of any other model.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastft.compose.grimoire.answering.answers import Setting
from fastft.compose.grimoire.choosing.choice import Chosen, QuestionChooser
from fastft.compose.grimoire.run import RANKED, SIMILAR
from fastft.compose.grimoire.writing.embed import TFIDF
from fastft.compose.policy import Choice
from fastft.data.conversation import Conversation, Message
from fastft.errors import UserError
from fastft.inference.completion import text_of
from fastft.inference.endpoint import is_address

KEPT = 4096  # questions whose grimoire is remembered


class GrimoirePolicy:
    """Answers with one model, and puts the chosen instructions before the conversation."""

    kind = "grimoire"

    def __init__(self, name: str, directory: Path, model: str):
        """`model` is the served name of the weak model. Raises UserError if no choice has been made in `directory`."""
        choice = Chosen.load(directory)
        self.name, self.directory, self.models = name, directory, [model]
        self.setting_name = choice.content["chosen"]
        self.settings = {each.name: each for each in choice.settings}
        self.grimoires = choice.grimoires
        self._chooser: QuestionChooser | None = None
        if self.setting_name in (SIMILAR, RANKED):
            if is_address(choice.content["encoder"]):
                raise UserError(
                    f"virtual: {name}: {directory} was built with an embeddings endpoint, which cannot be asked for each "
                    f"question here; build it with --encoder {TFIDF} or a directory"
                )
            self._chooser = choice.chooser(self.setting_name)
        elif self.setting_name not in self.settings:
            raise UserError(f"virtual: {name}: {directory / 'choice.json'} has no setting {self.setting_name!r}")
        self._place = lru_cache(KEPT)(lambda text: int(self._chooser.places([text])[0]))

    def choose(self, conversation: Conversation, turn: int, candidates: Sequence[str]) -> Choice:
        """Always the weak model; the reason names the setting that the question gets."""
        [model] = self.models
        probabilities = {**dict.fromkeys(candidates, 0.0), model: 1.0}
        return Choice(model, probabilities, f"grimoire {self.setting_for(conversation.messages).name}")

    def setting_for(self, messages: Sequence[Message]) -> Setting:
        """Return what the weak model is told for the last question of a conversation."""
        if self._chooser is None:
            return self.settings[self.setting_name]
        question = next((each.content for each in reversed(messages) if each.role == "user"), "")
        return self.grimoires[self._place(question)]

    def instructed(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return a request's messages with the instructions before them, for the worker.

        A system message of the client's follows the instructions in the same message, because some templates take only one.
        """
        read = [Message(str(each.get("role")), text_of(each.get("content"))) for each in messages]
        told, own = self.setting_for(read).prompt, []
        if read and read[0].role in ("system", "developer"):
            own, messages = [read[0].content], messages[1:]
        return [{"role": "system", "content": "\n\n".join([told, *own])}, *messages]
