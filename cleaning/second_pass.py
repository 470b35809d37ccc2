"""The second pass's work on conversations, done in worker processes: split each to lines of conversations.jsonl.

Conversations come and go as bytes, as in the first pass (cleaning.first_pass); how they are split is fastft.data.split's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from cleaning.first_pass import Choices, messages_json
from fastft.data.conversation import Conversation, parse_conversation, rounds_of
from fastft.data.split import CheckPart, Cut, OverWindow, Shortened, split_conversation, token_counter
from fastft.errors import UserError


@dataclass(slots=True)
class Split:
    """What the splitter made of one conversation."""

    lines: list[bytes]  # of conversations.jsonl
    over_window: list[tuple[int, str, bytes]]  # (number of the round, detail, its messages as JSON)
    shortened: list[tuple[int, str, bytes]]  # the same for what was left out of questions
    rounds_in: int
    rounds_kept: int
    unfinished: int = 0  # lines whose last answer goes on in the next
    refused: str = ""  # the template's reason for not rendering the conversation


def whole_batch(conversations: list[bytes]) -> list[Split]:
    """Without a window: each conversation is one part."""
    messages = (orjson.loads(line)["messages"] for line in conversations)
    counts = (sum(message["role"] == "user" for message in each) for each in messages)
    return [Split([line + b"\n"], [], [], count, count) for line, count in zip(conversations, counts)]


def load_tokenizer(choices: Choices) -> None:
    """Raises UserError where it cannot be used."""
    token_counter(choices.model, choices.template)


def split_batch(choices: Choices, conversations: list[bytes]) -> list[Split]:
    """Each conversation in parts that fit the window and that the trainer's template takes."""
    max_tokens = choices.max_tokens
    count, most, check = token_counter(choices.model, choices.template)
    split = partial(
        split_conversation,
        max_tokens=max_tokens,
        count_tokens=count,
        most_tokens=most,
        overlap_rounds=choices.overlap_rounds,
        overlong=choices.overlong,
    )
    # One step for all after the other: see outcomes_of.
    whole = [parse_conversation(orjson.loads(line)) for line in conversations]
    made = [_tried(split, conversation) for conversation in whole]
    checked = [each if isinstance(each, str) else _tried(_check_parts, check, each) for each in made]
    return [
        Split([], [], [], 0, 0, refused=each) if isinstance(each, str) else _described(conversation, max_tokens, *each)
        for conversation, each in zip(whole, checked)
    ]


def _tried(function: Callable, *arguments: Any) -> Any:
    """What it returns, or why the template refuses: say one that knows no system message."""
    try:
        return function(*arguments)
    except UserError as error:
        return str(error)


def _check_parts(check: CheckPart, made: Cut) -> Cut:
    for part in made[0]:
        check(part.messages)
    return made


def _described(
    conversation: Conversation,
    max_tokens: int,
    parts: list[Conversation],
    over: list[OverWindow],
    shortened: list[Shortened],
) -> Split:
    over_window = [
        (
            each.number,
            f"round {each.number} of {each.rounds} has {each.tokens} tokens, the window {max_tokens}"
            + (", which leaves no room for what it goes on from" if each.tokens <= max_tokens else ""),
            messages_json(each.messages),
        )
        for each in over
    ]
    left_out = [
        (
            each.number,
            f"{len(each.message.content):,} of the question's {each.characters:,} characters are left out",
            messages_json([each.message]),
        )
        for each in shortened
    ]
    lines = [part.to_json() + b"\n" for part in parts]
    rounds, unfinished = len(rounds_of(conversation.messages)[1]), sum(not part.messages[-1].ends for part in parts)
    return Split(lines, over_window, left_out, rounds, rounds - len(over), unfinished)
