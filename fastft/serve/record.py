"""Export the record of served turns: `fastft record export DIR -o FILE [--as conversations]`.

events           every event, as it was recorded
conversations    what was said, in the form that `fastft clean` and `fastft train` read
battles          votes of people on two answers, as judgments that `fastft report` reads
outcomes         the same votes by question, for training a router
votes            every vote, those that do not count included
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from fastft.common.command_line import option, parse, run_module
from fastft.common.files import require_not_input, require_place, written_whole
from fastft.data.conversation import ROLE_NAMES, Conversation, Message
from fastft.errors import UsageError, UserError
from fastft.serve.arena.votes import counted, judgment_of, outcomes
from fastft.serve.gateway.events import FILE, read_events, read_votes
from fastft.serve.protocol import text_of

WHOLE = ("answered",)
"""Outcomes of turns with a complete answer, unless the length limit cut it."""


@dataclass
class RecordConfig:
    directory: str = option(positional=True)
    """The directory that --record of fastft serve named."""
    output: str = option(short="-o")
    """The file to write, JSON Lines."""
    form: Literal["events", "conversations", "battles", "outcomes", "votes"] = option("events", name="as")
    """What to make of the events."""


def main(argv: list[str]) -> int:
    """`fastft record export`."""
    wants_help = bool(argv) and argv[0] in ("-h", "--help")
    if not wants_help and argv[:1] != ["export"]:
        raise UsageError("fastft record knows one thing to do: fastft record export DIR -o FILE")
    description = "Write the record of served turns as JSON Lines."
    words, renamed = argv if wants_help else argv[1:], {"form": "as"}  # a key of the last release
    [config] = parse(words, "fastft record export", description, RecordConfig, renamed=renamed)
    require_not_input(Path(config.output), [Path(config.directory) / FILE])
    events = read_events(Path(config.directory))
    if config.form == "events":
        rows: Iterable[bytes] = map(orjson.dumps, events)
    elif config.form == "conversations":
        found = conversations(lambda: read_events(Path(config.directory)))
        rows = (conversation.to_json() for conversation in found)
    else:
        rows = _voted(Path(config.directory), config.form, events)
    output, count = Path(config.output), 0
    require_place(output)
    with written_whole(output) as partial, partial.open("wb") as file:
        for row in rows:
            file.write(row + b"\n")
            count += 1
    print(f"{output}: {count:,} {config.form}")
    return 0


def _voted(directory: Path, form: str, events: Iterable[dict[str, Any]]) -> Iterable[bytes]:
    """The rows for an export of votes. Raises UserError if no vote counts."""
    votes = list(read_votes(directory))
    those, left_out = counted(votes)
    if form == "votes" and votes:
        return map(orjson.dumps, votes)
    reasons = "".join(f"; {count:,} left out: {why}" for why, count in left_out.most_common())
    if not those:
        raise UserError(f"--as {form}: this record holds no vote that counts{reasons}")
    print(f"{len(those):,} votes count{reasons}")
    if form == "battles":
        return (orjson.dumps(asdict(judgment_of(vote))) for vote in those)
    return map(orjson.dumps, outcomes(those, events))


def conversations(read: Callable[[], Iterable[dict[str, Any]]]) -> Iterator[Conversation]:
    """The conversations that were served, each once, with its last answer.

    A turn belongs to a later one that repeats its messages and its answer. A question that was asked again or edited starts
    a conversation of its own. Only answers that the record contains are marked to be trained, not assistant messages that a
    client made up. Turns without an answer, background calls and tool calls are left out. `read` is called twice, so that no
    texts are kept in memory: first for hashes, then for the conversations. Raises UserError for a record without texts.
    """
    said: dict[str, tuple[str, bool]] = {}  # by the hash of a dialogue that ends with an answer: (model, whole)
    continued: set[str] = set()
    ends_with: dict[str, str] = {}  # the same hashes: the id of the first event
    for event in read():
        if "messages_sha256" in event:
            raise UserError("the record keeps hashes only (--record_texts false): there are no texts to export")
        if not _is_dialogue(event):
            continue
        *prefixes, whole = _prefix_hashes([*event["messages"], _answer(event)])
        continued.update(prefixes)
        ends_with.setdefault(whole, event["id"])
        said[whole] = (event["model"], event["outcome"] in WHOLE and event["answers"][0]["finish_reason"] != "length")
    last = {name for whole, name in ends_with.items() if whole not in continued}
    for event in read():
        if event["id"] in last:
            yield _conversation(event, said)


def _is_dialogue(event: dict[str, Any]) -> bool:
    answers = event.get("answers") or []
    readable = all(isinstance(each, dict) and _text(each) is not None for each in event.get("messages") or [])
    calls = any(each.get("tool_calls") for each in [*answers, *(event.get("messages") or [])] if isinstance(each, dict))
    return bool(
        event.get("messages") and readable and not calls and event["model"] and answers and answers[0]["content"]
    ) and (event["conversation_from"] != "background")


def _answer(event: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": event["answers"][0]["content"]}


def _text(message: dict[str, Any]) -> str | None:
    """The text of a message; None if its content is not text or its role is unknown."""
    return text_of(message.get("content")) if message.get("role") in ROLE_NAMES else None


def _prefix_hashes(messages: list[dict[str, Any]]) -> list[str]:
    """For each message, a hash of all messages up to it."""
    digest, hashes = hashlib.sha256(), []
    for message in messages:
        digest.update(orjson.dumps([ROLE_NAMES[message["role"]], _text(message)]))
        hashes.append(digest.hexdigest())
    return hashes


def _conversation(event: dict[str, Any], said: dict[str, tuple[str, bool]]) -> Conversation:
    messages, models = [], []
    dialogue = [*event["messages"], _answer(event)]
    for message, prefix in zip(dialogue, _prefix_hashes(dialogue)):
        role = ROLE_NAMES[message["role"]]
        model, whole = said.get(prefix, (None, True)) if role == "assistant" else (None, True)
        if model and model not in models:
            models.append(model)
        messages.append(Message(role, _text(message) or "", train=model is not None, ends=whole))
    return Conversation(event["id"], messages, source="fastft serve", model="+".join(models))


if __name__ == "__main__":
    run_module(main)
