"""Let a strong model write grimoires: from each sampler's questions a profound one, and from that one a simple one.

    grimoires = write_grimoires(task, samples, client, prompts, guard, WritingLimits(), money)

A text that is empty, a refusal, cut or too long, and with `no_copies` one that quotes its samples, is asked for again, twice at
most; what is still wrong then is noted, and that grimoire is not used. Replies are kept in the client's cache.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastft.common.files import write_whole
from fastft.compose.grimoire.task import LabelTask, TaskQuestion
from fastft.compose.grimoire.writing.copies import CopyGuard, words_of
from fastft.compose.grimoire.writing.prompts import PromptTexts, fill, shown_samples
from fastft.data.conversation import Message
from fastft.data.refusals import ai_boilerplate, policy_refusal, refusal
from fastft.errors import UserError
from fastft.inference.budget import Money
from fastft.inference.client import Client, Unanswered, run_all
from fastft.inference.completion import Reply
from fastft.judge.judgment import write_rows
from fastft.judge.rows import read_objects

logger = logging.getLogger(__name__)

KINDS = ("profound", "simple")
TAKEN = ("zero-shot", "few-shot", "similar", "ranked")  # names of settings that are no grimoires
TRIES = 3
TOLERANCE = 1.25  # times the words that were asked for: models count badly
TOKENS_PER_WORD = 3  # of a reply's limit; English has about 1.3
SIMPLE_WORDS = 150


@dataclass(frozen=True)
class WritingLimits:
    words: int = 400
    """The longest profound grimoire, in words."""
    no_copies: bool = False
    """Ask again for a grimoire that quotes a training text, and do not use it if it still does."""


@dataclass(frozen=True)
class Grimoire:
    """Instructions by a strong model. `wrong` says why it cannot be used, "" if it can."""

    name: str  # SAMPLER-KIND
    sampler: str
    kind: str
    text: str
    samples: tuple[str, ...]  # ids of the questions that the strong model saw
    copies: tuple[str, ...] = ()
    writer: str = ""
    wrong: str = ""

    @property
    def fault(self) -> str:
        """Why it is left out, "" if it is not."""
        return self.wrong or ("" if self.text.strip() else "it is empty")


def write_grimoires(
    task: LabelTask,
    samples: Mapping[str, Sequence[TaskQuestion]],
    client: Client,
    prompts: PromptTexts,
    guard: CopyGuard,
    limits: WritingLimits,
    money: Money,
) -> list[Grimoire]:
    """Return a profound and a simple grimoire for each sampler, in its order; those that failed have `wrong` set.

    Raises UserError if the money or the endpoint ends before all are written: what was paid for is kept, and the next call
    goes on.
    """
    pairs: dict[int, list[Grimoire]] = {}
    works = [partial(_write_pair, task, name, drawn, client, prompts, guard, limits) for name, drawn in samples.items()]
    stopped = run_all(works, "writing grimoires", money, pairs.__setitem__)
    if stopped:
        raise UserError(f"{len(works) - len(pairs)} of {len(works)} pairs of grimoires are not written ({stopped})")
    return [grimoire for index in sorted(pairs) for grimoire in pairs[index]]


async def _write_pair(
    task: LabelTask,
    sampler: str,
    samples: Sequence[TaskQuestion],
    client: Client,
    prompts: PromptTexts,
    guard: CopyGuard,
    limits: WritingLimits,
) -> list[Grimoire]:
    labels = ", ".join(task.labels)
    ids = tuple(each.id for each in samples)
    empty = Grimoire(f"{sampler}-profound", sampler, "profound", "", ids, writer=client.label)
    words = str(limits.words)
    ask = fill(prompts.profound, task=task.description, labels=labels, samples=shown_samples(samples), words=words)
    profound = await _write(client, ask, limits.words, empty, guard, limits)
    simple = replace(empty, name=f"{sampler}-simple", kind="simple")
    if profound.wrong:
        return [profound, replace(simple, wrong=f"there is no profound one to shorten ({profound.wrong})")]
    values = {"grimoire": profound.text, "task": task.description, "labels": labels, "words": str(SIMPLE_WORDS)}
    return [profound, await _write(client, fill(prompts.simple, **values), SIMPLE_WORDS, simple, guard, limits)]


async def _write(
    client: Client, ask: str, words: int, empty: Grimoire, guard: CopyGuard, limits: WritingLimits
) -> Grimoire:
    """Ask for a grimoire until it can be used, TRIES times at most. The last one is returned with what is wrong with it."""
    made = empty
    for attempt in range(TRIES):
        parameters: dict[str, Any] = {"max_tokens": words * TOKENS_PER_WORD}
        try:
            reply = await client.ask([{"role": "user", "content": ask}], attempt=attempt, **parameters)
        except Unanswered as error:
            return replace(empty, wrong=f"no reply ({error})")
        copies = tuple(guard.copies(reply.text))
        made = replace(empty, text=reply.text.strip(), copies=copies)
        made = replace(made, wrong=_what_is_wrong(made, reply, words, limits.no_copies))
        if not made.wrong:
            break
    return made


def _what_is_wrong(grimoire: Grimoire, reply: Reply, words: int, no_copies: bool) -> str:
    length, said = len(words_of(grimoire.text)), Message("assistant", grimoire.text)
    if not length:
        return "the strong model wrote nothing"
    refuses = any(complain(said) for complain in (refusal, policy_refusal, ai_boilerplate))
    if refuses or reply.refused or reply.finish_reason == "content_filter":
        return f"the strong model refuses: {' '.join(grimoire.text.split())[:80]!r}"
    if reply.finish_reason == "length":
        return f"the strong model did not end within {words * TOKENS_PER_WORD} tokens"
    if length > TOLERANCE * words:
        return f"it has {length} words, and {words} were asked for"
    if no_copies and grimoire.copies:
        return f"it quotes a training text: {grimoire.copies[0][:80]!r}"
    return ""


# Files ---------------------------------------------------------------------------------------------------------------------


def save_grimoires(path: Path, grimoires: Sequence[Grimoire]) -> None:
    write_rows(path, grimoires)


def load_grimoires(path: Path) -> list[Grimoire]:
    """Return the grimoires that an earlier start has written, perhaps edited since. Raises UserError."""
    found = []
    for record in read_objects(path):
        row = {key: tuple(value) if isinstance(value, list) else value for key, value in record.value.items()}
        if {"name", "sampler", "kind", "text"} - row.keys() or row.keys() - asdict(_BLANK).keys():
            raise UserError(f"{record.where}: is not a grimoire; it needs name, sampler, kind and text")
        if wrong := [
            key for key in ("name", "sampler", "kind", "text", "wrong") if not isinstance(row.get(key, ""), str)
        ]:
            raise UserError(f"{record.where}: is not a grimoire: its {wrong[0]} is not a text")
        if row["name"] in TAKEN:
            raise UserError(
                f"{record.where}: another setting is called {row['name']!r}; give the grimoire another name"
            )
        found.append(Grimoire(**{"samples": (), **row}))
    if len({each.name for each in found}) < len(found):
        raise UserError(f"{path}: two grimoires have the same name")
    return found


_BLANK = Grimoire("", "", "", "", ())


def save_samples(path: Path, samples: Mapping[str, Sequence[TaskQuestion]]) -> None:
    rows = ({"sampler": sampler, "samples": [each.id for each in drawn]} for sampler, drawn in samples.items())
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
