"""What the user chooses: `RunSettings` about the run as a whole, and `FilterSettings` for the filters.

Both are frozen, so that the copies in worker processes stay equal to them. `cleaning.__main__` makes options of them, and
`cleaning.pipeline.clean` takes them from Python. An interrupted run continues only if none of them has changed.
"""

import typing
from dataclasses import dataclass, fields
from typing import Any, Literal

from fastft.common.command_line import option
from fastft.errors import UsageError, UserError

# Default of `--near`: the Jaccard similarity from which two conversations are near duplicates. fastft.data.dedup.duplicates
# explains it and the effect of other values.
NEAR = 0.8


@dataclass(frozen=True)
class RunSettings:
    """Splitting, duplicates, benchmarks and held-out conversations."""

    max_tokens: int | None = None
    """Split conversations into parts of at most this many tokens. Without it they stay whole."""
    model: str | None = None
    """The model whose tokenizer and chat template count the tokens: a directory or a name on the Hub."""
    template: str | None = None
    """A chat template by name, for a tokenizer that has none."""
    overlap_rounds: int = 0
    """Begin each part with this many of the rounds before it, as context that is not trained."""
    overlong: Literal["cut", "reject"] = "cut"
    """What happens to a round that is longer than max_tokens: its answer is cut into pieces, or the round is rejected."""
    near: float = NEAR
    """Similarity from which two conversations are duplicates, from 0.3 to 1; 0 finds only equal ones."""
    keep: Literal["longest", "newest"] = "longest"
    """Which of several duplicates is kept."""
    against: list[str] = option(several=True)
    """Files of benchmark questions that must not be in the data."""
    contaminated: Literal["reject", "flag"] = "reject"
    """What happens to conversations that share text with them; a flagged one is kept and reported."""
    holdout: float = 0.0
    """Set aside this share of the conversations, for example 0.01, in conversations.holdout.jsonl."""
    seed: int = 0
    """Chooses which conversations are set aside."""

    def check(self) -> None:
        """Raise UserError for values that cannot be used, in the words of the command line."""
        for name, annotation in typing.get_type_hints(type(self)).items():
            value, allowed = getattr(self, name), typing.get_args(annotation)
            if typing.get_origin(annotation) is Literal and value not in allowed:
                raise UserError(f"--{name} is {value!r}; it must be {' or '.join(allowed)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"--max_tokens is {self.max_tokens}; it must be at least 1")
        if self.max_tokens is not None and self.model is None:
            raise UsageError("--max_tokens needs --model: tokens are counted with its tokenizer and chat template")
        if not (self.near == 0 or 0.3 <= self.near < 1):
            raise UserError(
                f"--near is {self.near}; it must be a similarity from 0.3 to below 1, or 0 for equal ones only"
            )
        if not 0 <= self.holdout < 1:
            raise UserError(f"--holdout is {self.holdout}; it must be a share from 0 to below 1")
        if self.overlap_rounds < 0:
            raise UserError(f"--overlap_rounds is {self.overlap_rounds}; it must be at least 0")


@dataclass(frozen=True)
class FilterSettings:
    """The settings that every filter gets. They can be hashed, so that each process computes once what follows from them."""

    with_filters: tuple[str, ...] = ()  # names of filters that are off by default, switched on
    without_filters: tuple[str, ...] = ()  # names of filters that are on by default, switched off
    own_filters: tuple[str, ...] = ()  # "my.py:too_polite"
    blocked_phrases: tuple[str, ...] = ()
    consecutive: str = "merge"  # answers in a row: "merge" them, or keep the "last"
    languages: tuple[str, ...] = ()  # ISO 639-1 codes; empty: all
    models: tuple[str, ...] = ()  # patterns as for file names; empty: all
    min_turns: int | None = None
    max_turns: int | None = None
    max_chars: int | None = None
    moderation: str | None = None  # URL of an OpenAI-compatible endpoint
    moderation_model: str | None = None
    moderation_cache: str | None = None  # a file; without it no verdict is remembered

    def chosen(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults, for report.json, with lists in the place of tuples."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        defaults = {each.name: each.default for each in fields(self)}
        changed = {name: value for name, value in values.items() if value != defaults[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
