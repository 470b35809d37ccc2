"""What a filter is, and what the user can choose.

A step looks at one conversation. Three kinds, by what goes:

    Filter      the conversation: its complaint goes to rejected.jsonl as the reason
    TurnFilter  the round (question and answer) of the turn complained about; the dialogue stays
    Repair      nothing: turns are changed, and counted

All are pure functions of the conversation and the Settings: the same in any order of input and any worker.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cleaning.settings import Settings
from fastft.data.conversation import Conversation, Message


@dataclass(frozen=True)
class Filter:
    name: str
    complaint: Callable[[Conversation, Settings], str | None]  # what is wrong, None: nothing
    description: str
    default: bool = True
    option: str = ""  # the option without which it has nothing to do
    drops: str = "conversation"


@dataclass(frozen=True)
class TurnFilter:
    name: str
    complaint: Callable[[Message, Settings], str | None]
    description: str
    default: bool = True
    option: str = ""
    first_only: bool = False  # only the first round is judged
    asked_for: Callable[[str], bool] | None = None  # of the question: such an answer was asked for, the round stays
    drops: str = "round"


@dataclass(frozen=True)
class Repair:
    name: str
    apply: Callable[[list[Message], Settings], int]  # turns changed
    description: str
    default: bool = True
    option: str = ""
    drops: str = "nothing"


Step = Filter | TurnFilter | Repair
