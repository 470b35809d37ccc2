"""A long dialogue to parts that fit the window: whole rounds, counted with the real template, none lost.

A round is a question with its answer. Parts take as many rounds as fit, in order; each begins with the system message.
The count comes from a callable `count_tokens(messages)`, which tokenises the candidate part with the template that
training will use: tokens of a whole are not the sum of its pieces. It is asked for few candidates, none of them much
longer than the window, so a dialogue of 10,000 turns costs a few times its own length.
"""

import bisect
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from fastft.conversation import Conversation, Message, rounds_of

CountTokens = Callable[[list[Message]], int]

# Where to look first for a border. Too low or too high costs a few more counts, never a wrong border.
BYTES_PER_TOKEN = 3


@dataclass(slots=True)
class OverWindow:
    """A round that no part can hold."""

    number: int  # from 1
    rounds: int  # in the whole conversation
    tokens: int  # with the system message
    messages: list[Message]


@functools.lru_cache(maxsize=1)
def token_counter(model: str, template: str | None) -> CountTokens:
    """Count with the tokenizer of `model` and its chat template, or the named `template`.

    The only place where the cleaner needs the tokenizer, so the only one that imports it. Raises ValueError as
    `load_template` does.
    """
    from fastft.template import load_template

    loaded = load_template(model, template)
    return lambda messages: len(loaded.encode(messages).ids)


def split_conversation(
    conversation: Conversation, max_tokens: int, count_tokens: CountTokens
) -> tuple[list[Conversation], list[OverWindow]]:
    """The parts of `conversation`, each of at most `max_tokens` tokens, and the rounds that are longer on their own.

    `count_tokens` must not fall when rounds are added. Parts share the id and say which they are (`part`, `parts`). A
    part never reaches across a missing round: an answer would follow a question it does not belong to.
    """
    system, rounds = rounds_of(conversation.messages)
    ends = list(itertools.accumulate(sum(len(m.content.encode()) for m in each) for each in rounds))
    borders, over = [], []
    start = 0
    while start < len(rounds):
        budget = (ends[start - 1] if start else 0) + BYTES_PER_TOKEN * max_tokens
        size = _largest_fit(
            lambda n, start=start: count_tokens(_joined(system, rounds[start : start + n])) <= max_tokens,
            guess=bisect.bisect_right(ends, budget) - start,
            limit=len(rounds) - start,
        )
        if size:
            borders.append((start, start + size))
        else:
            tokens = count_tokens(_joined(system, rounds[start : start + 1]))
            over.append(OverWindow(start + 1, len(rounds), tokens, rounds[start]))
        start += max(size, 1)
    parts = [
        replace(conversation, messages=_joined(system, rounds[a:b]), part=part, parts=len(borders))
        for part, (a, b) in enumerate(borders)
    ]
    assert sum(b - a for a, b in borders) + len(over) == len(rounds)
    return parts, over


def _largest_fit(fits: Callable[[int], bool], guess: int, limit: int) -> int:
    """The largest n of 0 … `limit` for which `fits(n)` (0 always does, and no n above one that does not)."""
    fitting, step, candidate = 0, 1, min(max(guess, 1), limit)
    while fits(candidate):
        if candidate == limit:
            return limit
        fitting, candidate, step = candidate, min(candidate + step, limit), step * 2
    while candidate - fitting > 1:
        middle = (fitting + candidate) // 2
        if fits(middle):
            fitting = middle
        else:
            candidate = middle
    return fitting


def _joined(system: list[Message], rounds: list[list[Message]]) -> list[Message]:
    return system + [message for each in rounds for message in each]
