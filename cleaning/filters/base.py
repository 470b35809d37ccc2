"""The three kinds of steps that a conversation passes, by what they remove.

    Filter      rejects the whole conversation; its complaint becomes the `detail` in rejected.jsonl
    TurnFilter  rejects the round (question and answer) of the turn that it complains about; the dialogue is kept
    Repair      rejects nothing; it changes turns, and the changed turns are counted

A step's function uses only the conversation and the FilterSettings. So its result does not depend on the order of the
conversations or on the worker.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cleaning.settings import FilterSettings
from fastft.data.conversation import Conversation, Message


@dataclass(frozen=True)
class Filter:
    name: str
    complaint: Callable[[Conversation, FilterSettings], str | None]  # what is wrong, or None
    description: str
    default: bool = True
    option: str = ""  # the option without which it does nothing
    drops: str = "conversation"


@dataclass(frozen=True)
class TurnFilter:
    name: str
    complaint: Callable[[Message, FilterSettings], str | None]
    description: str
    default: bool = True
    option: str = ""
    first_only: bool = False  # whether only the first round is judged
    # Tells whether a question asks for such an answer. If so, the round is kept.
    asked_for: Callable[[str], bool] | None = None
    drops: str = "round"


@dataclass(frozen=True)
class Repair:
    name: str
    apply: Callable[[list[Message], FilterSettings], int]  # changes the messages; returns the number of turns changed
    description: str
    default: bool = True
    option: str = ""
    drops: str = "nothing"


Step = Filter | TurnFilter | Repair
