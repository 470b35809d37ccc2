"""Tokenise a file of conversations into an Arrow file, in parallel, and prove every loss mask before it is written.

`write_tokens` is the slow part of fastft.data.dataset.tokenized. What it writes has passed fastft.data.template.mask_check:
the ids are those that transformers gives, and exactly the answers are trained. (In a conversation with many answers, the
prompts of eight are compared.) So every mask that is used has been compared with the tokenizer's own rendering.
"""

import io
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa

from fastft.common.files import make_directory, written_whole
from fastft.common.workers import begin_worker, ordered_map, process_pool
from fastft.data.conversation import Conversation, read_conversations
from fastft.data.split import split_conversation
from fastft.data.template.chat_template import ChatTemplate, Encoded
from fastft.data.template.mask_check import check
from fastft.data.template.skeleton import TemplateError
from fastft.errors import UserError

logger = logging.getLogger(__name__)

BATCH = 256  # conversations of an Arrow record batch, which a worker encodes at a time
PARALLEL_FROM = 4 * BATCH  # conversations; fewer are encoded before worker processes would have started
PROGRESS_EVERY = 8192  # conversations between two messages
ANSWERS = 8  # answers of a conversation whose prompts are compared; `fastft inspect --check` compares all

SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),
        ("kept_boundaries", pa.int32()),
        ("position", pa.int64()),
        # Only the sums of these three over the file are read. A batch stores its own sums in its first row.
        ("lost_rounds", pa.int32()),
        ("untrained_answers", pa.int32()),
        ("cut_answers", pa.int32()),
    ]
)


def write_tokens(path: str, template: ChatTemplate, split_to: int | None, cached: Path) -> None:
    """Write the tokens of the file `path` to `cached`, whole or not at all; several runs may do so at the same time.

    Conversations longer than `split_to` tokens are split. Raises UserError naming the first conversation whose mask cannot
    be derived, or does not pass the proof.
    """
    make_directory(cached.parent)
    conversations, done = read_conversations(path), 0
    first = list(islice(conversations, PARALLEL_FROM))
    # Encoding one conversation here tells this process's template, too, what it writes before answers
    # (`ChatTemplate.written_before_answers`).
    template.encode_many([c.messages for c in first[:1]])
    encode = partial(_encode_batch, path=path, split_to=split_to)
    with (
        written_whole(cached, durable=True, several_writers=True) as partial_file,
        pa.OSFile(str(partial_file), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
        _workers(template, len(first) == PARALLEL_FROM) as pool,
    ):
        for count, batch in ordered_map(encode, _batches(chain(first, conversations)), pool):
            if batch:
                writer.write_batch(pa.ipc.open_stream(batch).read_next_batch())
            done += count
            if done // PROGRESS_EVERY > (done - count) // PROGRESS_EVERY:
                logger.info("tokenised %d conversations", done)


def _batches(conversations: Iterator[Conversation]) -> Iterator[tuple[int, list[Conversation]]]:
    """Yield (position in the file of the first one, up to BATCH conversations)."""
    done = 0
    while batch := list(islice(conversations, BATCH)):
        yield done, batch
        done += len(batch)


_template: ChatTemplate | None = None  # the template with which this process encodes


@contextmanager
def _workers(template: ChatTemplate, many: bool) -> Iterator[ProcessPoolExecutor | None]:
    """Give a pool with one process per core, or None if this process alone is as fast."""
    cores = len(os.sched_getaffinity(0))
    if not many or cores == 1:
        _use(template)
        yield None
        return
    made_from = (template.tokenizer, template.source, template.name)
    preloaded = (__name__, "transformers.models.auto.tokenization_auto")
    with process_pool(cores, preloaded, _begin_worker, made_from) as pool:
        yield pool


def _begin_worker(tokenizer, source: str, name: str) -> None:
    begin_worker()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per core already
    _use(ChatTemplate(tokenizer, source, name))


def _use(template: ChatTemplate) -> None:
    global _template
    _template = template


def _encode_batch(numbered: tuple[int, list[Conversation]], path: str, split_to: int | None) -> tuple[int, bytes]:
    """Return (number of conversations, their tokens as an Arrow stream of one record batch, empty if no part is left)."""
    start, conversations = numbered
    split = [_split(c, split_to) if split_to else ([c], 0) for c in conversations]
    parts = [part for parts, _ in split for part in parts]
    if not parts:
        return len(conversations), b""
    encoded = _proven(parts, path)
    not_trained = [m for c in conversations for m in c.messages if m.role == "assistant" and not m.train]
    sums = [sum(lost for _, lost in split), len(not_trained), sum(not m.ends for m in not_trained)]
    columns = [
        [e.ids for e in encoded],
        [e.trained for e in encoded],
        [e.kept_boundaries for e in encoded],
        [start + i for i, (parts, _) in enumerate(split) for _ in parts],
        *([number, *[0] * (len(parts) - 1)] for number in sums),
    ]
    batch = pa.record_batch([pa.array(c, field.type) for c, field in zip(columns, SCHEMA)], schema=SCHEMA)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(batch)
    return len(conversations), sink.getvalue()


def _split(conversation: Conversation, max_tokens: int) -> tuple[list[Conversation], int]:
    """Return (the parts of at most `max_tokens` tokens, the number of rounds that no part can hold)."""
    parts, over, _ = split_conversation(conversation, max_tokens, _template.count)
    return parts, len(over)


def _proven(conversations: list[Conversation], path: str) -> list[Encoded]:
    """Encode the conversations and check their masks. Raises UserError naming the first one that fails."""
    try:
        encoded = _template.encode_many([c.messages for c in conversations])
    except TemplateError:
        for conversation in conversations:  # one by one, to name the one that failed
            try:
                _template.encode(conversation.messages)
            except TemplateError as error:
                raise UserError(f"{path}: conversation {conversation.id!r}: {error}") from None
        raise
    for conversation, tokens in zip(conversations, encoded):
        for kind, detail in check(conversation, tokens, _template, ANSWERS):
            raise UserError(
                f"{path}: conversation {conversation.id!r}: the mask is off: {kind}: {detail} "
                "(`fastft inspect DATA --model MODEL --check` lists all such conversations)"
            )
    return encoded
