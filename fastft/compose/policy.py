"""Policies, which choose the model that answers a turn. A virtual model is a name that stands for a policy and its models.

    choice = policy.choose(conversation, turn, candidates)      # Choice(model, probabilities, why)

A random policy takes its number from `draw`, so the choice is a function of (seed, policy, conversation, turn), and a client
that repeats a request gets the same model. If the chosen model cannot answer, another one does; the record of the turn names
both.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastft.data.conversation import Conversation


@dataclass(frozen=True)
class Choice:
    model: str
    probabilities: dict[str, float]
    """The probability of each candidate to be chosen; they sum to 1."""
    why: str
    """The reason for the choice in a few words, for the record."""
    next: tuple[str, ...] = ()
    """Models that are asked, in this order, if no worker of the chosen model can answer."""
    scores: Mapping[str, float] | None = None
    """What the policy compared, by model, such as a router's probabilities of a good answer; None if it compares nothing."""


class Policy(Protocol):
    """Chooses a model for a turn."""

    kind: str

    @property
    def models(self) -> Sequence[str]:
        """All models that it may choose."""
        ...

    def choose(self, conversation: Conversation, turn: int, candidates: Sequence[str]) -> Choice:
        """Choose for a turn.

        `candidates` are all models that are served, whether or not one can answer now. `turn` counts the user's messages
        from 1; the last one is to be answered.
        """
        ...


class FixedPolicy:
    """Always chooses the same model."""

    kind = "fixed"

    def __init__(self, model: str):
        self.model, self.models = model, [model]

    def choose(self, conversation: Conversation, turn: int, candidates: Sequence[str]) -> Choice:
        return Choice(self.model, {**dict.fromkeys(candidates, 0.0), self.model: 1.0}, "fixed")


def draw(seed: str, policy: str, conversation: str, turn: int) -> float:
    """A number from [0, 1), uniform over conversations and turns, and always the same for the same four arguments."""
    # Each part is preceded by its length, so that ("a", "bc") differs from ("ab", "c").
    parts = (part.encode() for part in (seed, policy, conversation, str(turn)))
    digest = hashlib.blake2b(b"".join(b"%d:%b" % (len(part), part) for part in parts), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)
