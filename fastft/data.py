"""Conversations -> token cache -> batches: pure functions of (data, seed, epoch, step).

`tokenized(...)` tokenises a file once into an Arrow file, keyed by what it depends on, and memory-maps it: the ranks of
a machine share it, and a second run starts at once. `Schedule` turns the packing plan of each epoch into optimiser steps;
`build_batch` turns rows into tensors. Nothing here has a state to save: step number in, batch out.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fastft.conversation import Conversation, Message, read_conversations
from fastft.packing import lower_bound, pack
from fastft.template import ChatTemplate

CACHE_VERSION = 2  # raise when the same key would have to hold other tokens
BATCH = 256  # conversations tokenised together, and rows of an Arrow record batch

_SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),
        ("merged_borders", pa.int32()),
    ]
)


@dataclass
class TokenizedData:
    """The C conversations of a file as tokens; the ids are views into a memory-mapped file."""

    ids: list[np.ndarray]  # C arrays, int32
    trained: list[np.ndarray]  # C arrays, bool
    positions: np.ndarray  # [C] int64: which record of the file each one is
    merged_borders: int
    fingerprint: str

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    @property
    def trained_counts(self) -> np.ndarray:
        """Tokens that the loss counts: trained ones with a token before them."""
        return np.array([int(t[1:].sum()) for t in self.trained], dtype=np.int64)

    def select(self, keep: np.ndarray) -> "TokenizedData":
        """The conversations at positions `keep` (int64)."""
        return TokenizedData(
            [self.ids[i] for i in keep],
            [self.trained[i] for i in keep],
            self.positions[keep],
            self.merged_borders,
            self.fingerprint,
        )


def tokenized(path: str, template: ChatTemplate, progress=None) -> TokenizedData:
    """Tokenise `path` into the cache, or open what is there. `progress(done)` is called with conversations so far.

    Raises ValueError naming the conversation when the file is no data or a mask cannot be derived.
    """
    fingerprint = _fingerprint(path, template)
    cached = cache_directory() / f"{fingerprint}.arrow"
    if cached.exists():
        try:
            return _open(cached, fingerprint)
        except pa.ArrowInvalid:  # damaged since it was written; the tokens can be made again
            pass
    _tokenize(path, template, cached, progress)
    return _open(cached, fingerprint)


def cache_directory() -> Path:
    """`$FASTFT_CACHE`, else `~/.cache/fastft`."""
    return Path(os.environ.get("FASTFT_CACHE") or Path.home() / ".cache" / "fastft")


def fit_to_window(data: TokenizedData, window: int, overlong: str, path: str) -> tuple[TokenizedData, dict[str, int]]:
    """Leave out what cannot be trained on, and say how much: (data, counts for the report).

    Raises ValueError when conversations are longer than the window and `overlong` is "refuse", or when nothing is left.
    """
    lengths, trained = data.lengths, data.trained_counts
    long = lengths > window
    if long.any() and overlong == "refuse":
        raise ValueError(
            f"{path}: {long.sum()} of {len(lengths)} conversations are longer than the window of {window} tokens (longest: "
            f"{lengths.max()}). Split them (python -m cleaning {path} -o DIR --max_tokens {window} --model MODEL), or leave "
            "them out: --overlong drop"
        )
    empty = (trained == 0) & ~long
    kept = data.select(np.flatnonzero(~long & ~empty))
    if not kept.ids:
        raise ValueError(
            f"{path}: no conversation is left to train on ({len(lengths)} read, {long.sum()} longer than the window of "
            f"{window}, {empty.sum()} without a trained token)"
        )
    return kept, {"conversations": len(kept.ids), "overlong": int(long.sum()), "nothing_to_train": int(empty.sum())}


def conversation_names(path: str, positions: Sequence[int]) -> list[str]:
    """What the conversations at `positions` (numbers from 0) of a file are called there: "ID", or "ID (part 2 of 3)".

    Tokens carry no ids, so the file is read again: seconds for gigabytes, and only after something went wrong.
    """
    wanted, names = set(map(int, positions)), {}
    for number, conversation in enumerate(read_conversations(path)):
        if number in wanted:
            part = f" (part {conversation.part + 1} of {conversation.parts})" if conversation.parts > 1 else ""
            names[number] = conversation.id + part
            if len(names) == len(wanted):
                break
    return [names[int(position)] for position in positions]


@dataclass(frozen=True)
class Step:
    """One optimiser step: the rows of its global batch, the same for every number of ranks."""

    number: int  # from 1
    epoch: int  # from 0
    rows: list[np.ndarray]


class Schedule:
    """The packing plans of all epochs, cut into optimiser steps of `global_batch_size` rows.

    The last step of an epoch may hold fewer rows; every conversation is seen once per epoch.
    """

    def __init__(
        self, data: TokenizedData, window: int, seed: int, epochs: int, global_batch_size: int, max_steps: int | None
    ):
        self.lengths, self.window, self.seed, self.batch = data.lengths, window, seed, global_batch_size
        self.starts = [0]  # number of steps before each epoch
        for epoch in range(epochs):
            self.starts.append(self.starts[-1] + -(-len(self.plan(epoch)) // global_batch_size))
            if max_steps and self.starts[-1] >= max_steps:
                break
        self.total = min(self.starts[-1], max_steps or self.starts[-1])

    @lru_cache(maxsize=2)  # noqa: B019  one schedule per run
    def plan(self, epoch: int) -> list[np.ndarray]:
        return pack(self.lengths, self.window, self.seed, epoch)

    def step(self, number: int) -> Step:
        """Step `number` in 1..total."""
        epoch = max(e for e, start in enumerate(self.starts) if start < number)
        first = (number - self.starts[epoch] - 1) * self.batch
        return Step(number, epoch, self.plan(epoch)[first : first + self.batch])

    def describe(self) -> dict[str, float]:
        """Rows of the first epoch, the lower bound for these lengths, and how full the rows are."""
        rows = len(self.plan(0))
        fill = float(self.lengths.sum() / (rows * self.window))
        return {"rows": rows, "lower_bound": lower_bound(self.lengths, self.window), "fill": fill, "steps": self.total}


@dataclass
class Batch:
    """A micro-batch: R packed rows laid end to end, N = R x window tokens, n of them predicting a trained token."""

    input_ids: Tensor  # [1, N] int64
    position_ids: Tensor  # [1, N] int64, from 0 in every conversation
    cu_seqlens: Tensor  # [documents + 1] int32: where conversations begin; then N, up to a fixed size
    max_seqlen: int  # the window: a constant, so that nothing is compiled again for another longest conversation
    loss_index: Tensor  # [n] int64: positions whose next token is trained
    targets: Tensor  # [n] int64: those next tokens

    def to(self, device: torch.device) -> dict[str, Tensor | int]:
        """The arguments of TrainedModel.forward on `device`."""
        move = lambda t: t.to(device, non_blocking=True)  # noqa: E731
        return {
            "input_ids": move(self.input_ids),
            "position_ids": move(self.position_ids),
            "cu_seqlens": move(self.cu_seqlens),
            "max_seqlen": self.max_seqlen,
            "loss_index": move(self.loss_index),
            "targets": move(self.targets),
        }


def build_batch(data: TokenizedData, rows: Sequence[np.ndarray], row_count: int, window: int) -> Batch:
    """Lay `rows` (and empty ones up to `row_count`) end to end. Padding is a document of its own and never trained."""
    total = row_count * window
    input_ids, position_ids = np.zeros(total, np.int64), np.zeros(total, np.int64)
    edges, loss_index, targets = [0], [], []
    for r in range(row_count):
        at = r * window
        for conversation in rows[r] if r < len(rows) else ():
            ids, trained = data.ids[conversation], data.trained[conversation]
            length = len(ids)
            input_ids[at : at + length], position_ids[at : at + length] = ids, np.arange(length)
            predicts = np.flatnonzero(trained[1:])
            loss_index.append(at + predicts)
            targets.append(ids[1:][predicts])
            at += length
            edges.append(at)
        if at < (r + 1) * window:
            padding = (r + 1) * window - at
            position_ids[at : at + padding] = np.arange(padding)
            edges.append((r + 1) * window)
    size = -(-len(edges) // 64) * 64  # few sizes, so that few kernels are compiled
    edges += [total] * (size - len(edges))
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        cu_seqlens=torch.tensor(edges, dtype=torch.int32),
        max_seqlen=window,
        loss_index=torch.from_numpy(np.concatenate(loss_index) if loss_index else np.zeros(0, np.int64)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64) if targets else np.zeros(0, np.int64)),
    )


def rank_batches(data: TokenizedData, step: Step, rank: int, world: int, micro: int, window: int) -> Iterator[Batch]:
    """This rank's micro-batches of a step: rows rank, rank + world, ...; as many on every rank."""
    mine = step.rows[rank::world]
    count = -(-len(step.rows) // (world * micro))
    for i in range(count):
        yield build_batch(data, mine[i * micro : (i + 1) * micro], micro, window)


def _fingerprint(path: str, template: ChatTemplate) -> str:
    """Hash of everything that the tokens depend on: data, tokenizer, template, version."""
    digest = hashlib.blake2b(digest_size=16)
    tokenizer = template.tokenizer
    rendered = template.render(
        [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    )  # holds bos and eos
    parts = [CACHE_VERSION, template.source, rendered, template.end_of_turn, tokenizer.special_tokens_map]
    digest.update(json.dumps(parts, default=str, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _tokenize(path: str, template: ChatTemplate, cached: Path, progress) -> None:
    """Write the Arrow file beside, then rename: two runs that tokenise the same data do no harm to each other."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_name(f"{cached.name}.{os.getpid()}.tmp")
    done = 0
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            conversations = read_conversations(path)
            while batch := list(islice(conversations, BATCH)):
                writer.write_batch(_record_batch(batch, template, path))
                done += len(batch)
                if progress:
                    progress(done)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, cached)
    finally:
        partial.unlink(missing_ok=True)


def _record_batch(batch: list[Conversation], template: ChatTemplate, path: str) -> pa.RecordBatch:
    try:
        encoded = template.encode_many([c.messages for c in batch])
    except ValueError:
        for conversation in batch:  # one by one, to name the one that failed
            try:
                template.encode(conversation.messages)
            except ValueError as error:
                raise ValueError(f"{path}: conversation {conversation.id!r}: {error}") from None
        raise
    columns = [
        [e.ids for e in encoded],
        [e.trained for e in encoded],
        [e.merged_borders for e in encoded],
    ]
    return pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, _SCHEMA)], schema=_SCHEMA)


def _open(cached: Path, fingerprint: str) -> TokenizedData:
    table = pa.ipc.open_file(pa.memory_map(str(cached))).read_all()
    ids, trained = [], []
    for batch in table.to_batches():
        edges = batch["ids"].offsets.to_numpy()
        flat_ids, flat_trained = batch["ids"].values.to_numpy(), batch["trained"].values.to_numpy(zero_copy_only=False)
        ids += [flat_ids[a:b] for a, b in zip(edges, edges[1:])]
        trained += [flat_trained[a:b] for a, b in zip(edges, edges[1:])]
    merged = sum(table["merged_borders"].to_pylist())
    return TokenizedData(ids, trained, np.arange(len(ids)), merged, fingerprint)
