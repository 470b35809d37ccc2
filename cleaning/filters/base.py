"""The three kinds of steps that a conversation passes, by what they remove.

    Filter      rejects the whole conversation; its complaint goes to rejected.jsonl as the detail
    TurnFilter  rejects the round (question and answer) of the turn that it complains about; the dialogue is kept
    Repair      rejects nothing; it changes turns, which are counted

All are pure functions of the conversation and the Settings, so the result depends on neither order nor worker.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cleaning.settings import Settings
from fastft.data.conversation import Conversation, Message


@dataclass(frozen=True)
class Filter:
    name: str
    complaint: Callable[[Conversation, Settings], str | None]  # what is wrong, or None
    description: str
    default: bool = True
    option: str = ""  # the option without which it does nothing
    drops: str = "conversation"


@dataclass(frozen=True)
class TurnFilter:
    name: str
    complaint: Callable[[Message, Settings], str | None]
    description: str
    default: bool = True
    option: str = ""
    first_only: bool = False  # whether only the first round is judged
    asked_for: Callable[[str], bool] | None = (
        None  # whether the question asked for such an answer: then the round is kept
    )
    drops: str = "round"


@dataclass(frozen=True)
class Repair:
    name: str
    apply: Callable[[list[Message], Settings], int]  # changes the messages; returns the number of turns changed
    description: str
    default: bool = True
    option: str = ""
    drops: str = "nothing"


Step = Filter | TurnFilter | Repair
