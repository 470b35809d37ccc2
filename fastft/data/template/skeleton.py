"""TODO docstring of fastft.data.template.skeleton."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fastft.common.records import repair_text
from fastft.data.conversation import Message
from fastft.errors import UserError

# Private noncharacters open and close every mark and every renamed control token.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARK = re.compile(f"{OPEN}(\\d+){CLOSE}")
BOUNDARY = f"{OPEN}boundary{CLOSE}"


class TemplateError(UserError):
    """The spans of a template (or of one conversation under it) cannot be derived with certainty."""


@dataclass(slots=True)
class _Answer:
    """Where a trained answer stands in a skeleton: behind `slots` marks, `offset` characters into the next literal."""

    message: int
    slots: int
    offset: int  # counts characters of the literal with its control tokens renamed


@dataclass(slots=True)
class _Boundary:
    """Where the tokens of a trained answer begin in the text, and, if they stop before its end of turn, where."""

    at: int
    stop: int | None


@dataclass(slots=True)
class _Stretch:
    """What stands between two control tokens: literals, and indices into the skeleton's slots, in order."""

    before: list[str | int]  # its boundary, or all of it
    behind: list[str | int] | None  # None: it has no boundary


@dataclass(slots=True)
class _Skeleton:
    """A rendering with marks for texts: literals[0] slot literals[1] slot ... literals[-1]."""

    literals: list[str]  # control tokens under their own names
    renamed: list[str]  # the same with control tokens renamed
    slots: list[int]  # index of the message whose text fills each slot
    answers: list[_Answer]  # the trained ones, in order
    stretches: list[_Stretch] | None = None  # None where two boundaries have no control token between them
    # For `token_bound`: how many bytes of literals are no control tokens; how many control tokens there are, and pieces.
    size: int = 0
    tokens: int = 0


def _mark(i: int) -> str:
    return f"{OPEN}{i}{CLOSE}"


def _core(text: str) -> str:
    return text.strip()


def _margins(text: str) -> tuple[str, str] | tuple[str]:
    """White space before and after the text (all of it, when it is nothing else)."""
    core = _core(text)
    if core is text and text:
        return "", ""  # most texts have none
    if not core:
        return (text,)
    start = len(text) - len(text.lstrip())
    return text[:start], text[start + len(core) :]


def _marked(messages: Iterable[Message]) -> list[Message]:
    """The messages with a mark for each text, its outer white space kept: what a template trims of it then shows."""
    return [
        replace(m, content=_mark(i).join(_margins(m.content)) if _core(m.content) else m.content)
        for i, m in enumerate(messages)
    ]


def _repaired(messages: Sequence[Message]) -> list[Message]:
    return [m if (text := repair_text(m.content)) is m.content else replace(m, content=text) for m in messages]


def _join(literals: list[str], texts: list[str]) -> str:
    return "".join(piece for pair in zip(literals, [*texts, ""]) for piece in pair)


def _with_texts(pieces: list[str | int], texts: list[str]) -> str:
    return "".join([texts[piece] if piece.__class__ is int else piece for piece in pieces])


def _message_at(position: int, skeleton: _Skeleton, texts: list[str]) -> int:
    """The message whose text stands at, or next before, a position of the filled skeleton."""
    at, culprit = 0, skeleton.slots[0] if skeleton.slots else 0
    for literal, text, slot in zip(skeleton.literals, texts, skeleton.slots):
        if at + len(literal) > position:
            break
        at, culprit = at + len(literal) + len(text), slot
    return culprit


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _not_a_prefix(prompt: str, whole: str) -> str:
    prompt, whole = MARK.sub("…", prompt), MARK.sub("…", whole)
    at = _first_difference(prompt, whole)
    return (
        "the prompt before an answer is not how the rendered conversation begins "
        f"(prompt has {prompt[at : at + 40]!r} where the conversation has {whole[at : at + 40]!r})"
    )
