"""What a filter is, and what the user can choose.

A step looks at one conversation. Three kinds, by what goes:

    Filter      the conversation: its complaint goes to rejected.jsonl as the reason
    TurnFilter  the round (question and answer) of the turn complained about; the dialogue stays
    Repair      nothing: turns are changed, and counted

All are pure functions of the conversation and the Settings: the same in any order of input and any worker.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

from fastft.conversation import Conversation, Message


@dataclass(frozen=True)
class Settings:
    """What the user chose, for all filters. Hashable and picklable: workers get a copy."""

    with_filters: tuple[str, ...] = ()  # names that are off by default, switched on
    without_filters: tuple[str, ...] = ()  # names that are on by default, switched off
    own_filters: tuple[str, ...] = ()  # "my.py:too_polite"
    blocked_phrases: tuple[str, ...] = ()
    consecutive: str = "merge"  # answers in a row: "merge" them, or keep the "last"
    languages: tuple[str, ...] = ()  # ISO 639-1 codes, empty: all
    models: tuple[str, ...] = ()  # patterns as in file names, empty: all
    min_turns: int | None = None
    max_turns: int | None = None
    max_chars: int | None = None
    moderation: str | None = None  # URL of an OpenAI-compatible endpoint
    moderation_model: str | None = None
    moderation_cache: str | None = None  # a file; without it nothing is remembered

    def chosen(self) -> dict:
        """What differs from the defaults, for report.json; lists instead of tuples, as JSON has them."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        defaults = {each.name: each.default for each in fields(self)}
        changed = {name: value for name, value in values.items() if value != defaults[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


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
