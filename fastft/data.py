"""Conversations -> token cache -> batches: pure functions of (data, seed, epoch, step).

`tokenized(...)` tokenises a file once into an Arrow file (`fastft.tokenizing`), keyed by what it depends on, and memory-maps it:
the ranks of a machine share it, and a second run starts at once. `mixed(...)` makes one set of several files. `Schedule` turns
the packing plan of each epoch into optimiser steps, `Course` puts the stages of a run one behind the other; `build_batch`
turns rows into tensors, `ahead` does so for the steps to come. Nothing here has a state to save: step number in, batch out.
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fastft.conversation import Message, read_conversations
from fastft.packing import lower_bound, pack
from fastft.template import ChatTemplate
from fastft.tokenizing import write_tokens

CACHE_VERSION = 5  # raise when the same key would have to hold other tokens


@dataclass
class TokenizedData:
    """The C conversations of a file as tokens; the ids are views into a memory-mapped file."""

    ids: list[np.ndarray]  # C arrays, int32
    trained: list[np.ndarray]  # C arrays, bool
    positions: np.ndarray  # [C] int64: which record of its file each one is
    merged_borders: int
    lost_rounds: int  # that no part of the window's size could hold, where conversations were split
    digests: dict[str, str]  # of what the tokens depend on beside the files: tokenizer, template
    sources: list["Source"]

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
            self.lost_rounds,
            self.digests,
            [replace(self.sources[0], count=len(keep))],
        )


@dataclass(frozen=True)
class Source:
    """A file's conversations in a mixture: `count` in a row, and how often they come."""

    path: str
    count: int
    weight: float = 1.0  # times an epoch; of 2.3, three in ten come a third time, others in every epoch
    epochs: int | None = None  # the first epochs only
    contents: str = ""  # the file's digest


def tokenized(path: str, template: ChatTemplate, split_to: int | None = None, progress=None) -> TokenizedData:
    """Tokenise `path` into the cache, or open what is there. `progress(done)` is called with conversations so far.

    With `split_to`, conversations longer than so many tokens are split at whole rounds, as the cleaner does. Raises
    ValueError naming the conversation when the file is no data or a mask cannot be derived.
    """
    contents, digests = _contents(path), _digests(template)
    cached = cache_directory() / f"{_digest(json.dumps([contents, digests, split_to]))}.arrow"
    if cached.exists():
        try:
            return _open(cached, digests, Source(path, 0, contents=contents))
        except pa.ArrowInvalid:  # damaged since it was written; the tokens can be made again
            pass
    write_tokens(path, template, split_to, cached, progress)
    return _open(cached, digests, Source(path, 0, contents=contents))


def mixed(parts: Sequence[TokenizedData], weights: Sequence[float], epochs: Sequence[int | None]) -> TokenizedData:
    """One set of several files, each with its weight and its number of epochs (None: all)."""
    sources = [replace(part.sources[0], weight=w, epochs=e) for part, w, e in zip(parts, weights, epochs)]
    return TokenizedData(
        [ids for part in parts for ids in part.ids],
        [trained for part in parts for trained in part.trained],
        np.concatenate([part.positions for part in parts]),
        sum(part.merged_borders for part in parts),
        sum(part.lost_rounds for part in parts),
        parts[0].digests,
        sources,
    )


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
            f"{lengths.max()}). Split them (python -m cleaning {path} -o DIR --max_tokens {window} --model MODEL), or say "
            "--overlong split (the same on the way) or --overlong drop"
        )
    empty = (trained == 0) & ~long
    kept = data.select(np.flatnonzero(~long & ~empty))
    if not kept.ids:
        raise ValueError(
            f"{path}: no conversation is left to train on ({len(lengths)} read, {long.sum()} longer than the window of "
            f"{window}, {empty.sum()} without a trained token)"
        )
    return kept, {"conversations": len(kept.ids), "overlong": int(long.sum()), "nothing_to_train": int(empty.sum())}


def conversation_names(data: TokenizedData, conversations: Sequence[int]) -> list[str]:
    """What some of the conversations are called in their files: "ID", or "ID (part 2 of 3)".

    Tokens carry no ids, so the files are read again: seconds for gigabytes, and only after something went wrong.
    """
    firsts = np.cumsum([0] + [source.count for source in data.sources])
    wanted: dict[str, set[int]] = {}
    places = []
    for conversation in conversations:
        path = data.sources[int(np.searchsorted(firsts, conversation, side="right")) - 1].path
        places.append((path, int(data.positions[conversation])))
        wanted.setdefault(path, set()).add(places[-1][1])
    names: dict[tuple[str, int], str] = {}
    for path, positions in wanted.items():
        for number, conversation in enumerate(islice(read_conversations(path), max(positions) + 1)):
            if number in positions:
                part = f" (part {conversation.part + 1} of {conversation.parts})" if conversation.parts > 1 else ""
                names[path, number] = conversation.id + part
    return [names[place] for place in places]


@dataclass(frozen=True)
class Step:
    """One optimiser step: the rows of its global batch, the same for every number of ranks."""

    number: int  # from 1, in its stage
    epoch: int  # from 0, in its stage
    rows: list[np.ndarray]
    data: TokenizedData
    stage: int = 0


class Schedule:
    """The packing plans of all epochs, cut into optimiser steps of `global_batch_size` rows.

    The last step of an epoch may hold fewer rows; every conversation is seen once per epoch, or as its source says.
    """

    def __init__(
        self, data: TokenizedData, window: int, seed: int, epochs: int, global_batch_size: int, max_steps: int | None
    ):
        self.data, self.lengths, self.window, self.seed, self.batch = (
            data,
            data.lengths,
            window,
            seed,
            global_batch_size,
        )
        self.most_in_a_row = 0  # conversations
        self.starts = [0]  # number of steps before each epoch
        for epoch in range(epochs):
            plan = self.plan(epoch)
            self.most_in_a_row = max([self.most_in_a_row, *map(len, plan)])
            self.starts.append(self.starts[-1] + -(-len(plan) // global_batch_size))
            if max_steps and self.starts[-1] >= max_steps:
                break
        self.total = min(self.starts[-1], max_steps or self.starts[-1])
        assert self.total, "every file has a conversation, and every weight takes one of them in the first epoch"

    @lru_cache(maxsize=2)  # noqa: B019  one schedule per stage
    def plan(self, epoch: int) -> list[np.ndarray]:
        chosen = self.chosen(epoch)
        return [chosen[row] for row in pack(self.lengths[chosen], self.window, self.seed, epoch)]

    def chosen(self, epoch: int) -> np.ndarray:
        """The conversations of an epoch (int64), some several times or not at all where sources have weights."""
        first, found = 0, []
        for number, source in enumerate(self.data.sources):
            if source.epochs is None or epoch < source.epochs:
                found.append(first + _times(source, np.random.default_rng([self.seed, number]), epoch))
            first += source.count
        return np.concatenate([*found, np.zeros(0, np.int64)])

    def step(self, number: int) -> Step:
        """Step `number` in 1..total."""
        epoch = max(e for e, start in enumerate(self.starts) if start < number)
        first = (number - self.starts[epoch] - 1) * self.batch
        return Step(number, epoch, self.plan(epoch)[first : first + self.batch], self.data)

    def describe(self) -> dict[str, float]:
        """Rows of the first epoch, the lower bound for its lengths, and how full the rows are."""
        rows, lengths = len(self.plan(0)), self.lengths[self.chosen(0)]
        fill = float(lengths.sum() / (rows * self.window))
        return {"rows": rows, "lower_bound": lower_bound(lengths, self.window), "fill": fill, "steps": self.total}


def _times(source: Source, random: np.random.Generator, epoch: int) -> np.ndarray:
    """Positions in a source, each as often as its weight says. What a fraction leaves out has its turn in a later epoch.

    Fractions of a conversation add up over the epochs, rounded up: however small the weight, something is trained on.
    """
    whole, part = divmod(Fraction(str(source.weight)), 1)  # the decimal that was written: 10 x 0.1 is 1 and no more
    first, end = (math.ceil(epochs * part * source.count) for epochs in (epoch, epoch + 1))
    turns = random.permutation(source.count)[np.arange(first, end) % source.count]
    return np.concatenate([np.tile(np.arange(source.count), whole), np.sort(turns)])


class Course:
    """The stages of a run one behind the other, their steps numbered through."""

    def __init__(self, stages: Sequence[Schedule]):
        self.stages = stages
        self.ends = np.cumsum([stage.total for stage in stages]).tolist()

    @property
    def total(self) -> int:
        return self.ends[-1]

    @property
    def most_in_a_row(self) -> int:
        return max(stage.most_in_a_row for stage in self.stages)

    def step(self, number: int) -> Step:
        """Step `number` in 1..total of the run."""
        stage = next(i for i, end in enumerate(self.ends) if number <= end)
        return replace(self.stages[stage].step(number - (self.ends[stage - 1] if stage else 0)), stage=stage)


def fullest_step(course: Course, rows: int) -> Step:
    """A step of the `rows` rows that hold the most tokens in a stage's first epoch, of the stage where that is most."""
    best, most = None, -1
    for number, stage in enumerate(course.stages):
        trained = stage.data.trained_counts
        plan = sorted(stage.plan(0), key=lambda row: (-stage.lengths[row].sum(), -trained[row].sum()))[:rows]
        tokens = sum(int(stage.lengths[row].sum()) for row in plan)
        if tokens > most:
            best, most = Step(1, 0, plan, stage.data, number), tokens
    return best


@dataclass
class Batch:
    """A micro-batch: R packed rows laid end to end, N = R x window tokens, n of them predicting a trained token."""

    input_ids: Tensor  # [1, N] int64
    position_ids: Tensor  # [1, N] int64, from 0 in every conversation
    cu_seqlens: Tensor  # [documents + 1] int32: where conversations begin; then N, up to a fixed size
    max_seqlen: int  # the window: a constant, so that nothing is compiled again for another longest conversation
    loss_index: Tensor  # [n] int64: positions whose next token is trained
    targets: Tensor  # [n] int64: those next tokens

    def pinned(self) -> "Batch":
        """The same in memory that a GPU copies from without the host's help."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "max_seqlen"}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items()})

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


def build_batch(
    data: TokenizedData, rows: Sequence[np.ndarray], row_count: int, window: int, most_in_a_row: int
) -> Batch:
    """Lay `rows` (and empty ones up to `row_count`) end to end. Padding is a document of its own and never trained.

    No row holds more than `most_in_a_row` conversations: that gives `cu_seqlens` one size for the whole run, so that nothing
    is compiled again.
    """
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
    size = row_count * (most_in_a_row + 1) + 1
    edges += [total] * (size - len(edges))
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        cu_seqlens=torch.tensor(edges, dtype=torch.int32),
        max_seqlen=window,
        loss_index=torch.from_numpy(np.concatenate(loss_index) if loss_index else np.zeros(0, np.int64)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64) if targets else np.zeros(0, np.int64)),
    )


def rank_batches(step: Step, rank: int, world: int, micro: int, window: int, most_in_a_row: int) -> Iterator[Batch]:
    """This rank's micro-batches of a step: rows rank, rank + world, ...; as many on every rank."""
    mine = step.rows[rank::world]
    count = -(-len(step.rows) // (world * micro))
    for i in range(count):
        yield build_batch(step.data, mine[i * micro : (i + 1) * micro], micro, window, most_in_a_row)


def ahead(steps: Iterator[Step], batches: Callable[[Step], list[Batch]]) -> Iterator[tuple[Step, list[Batch]]]:
    """Each step with its batches, built by a thread while the steps before it run.

    Two steps ahead: building takes a few milliseconds a row, and no step is that short twice.
    """
    with ThreadPoolExecutor(1) as worker:
        waiting = deque((step, worker.submit(batches, step)) for step in islice(steps, 2))
        while waiting:
            step, built = waiting.popleft()
            found = built.result()
            waiting.extend((later, worker.submit(batches, later)) for later in islice(steps, 1))
            yield step, found


def _digests(template: ChatTemplate) -> dict[str, str]:
    """Of everything but the data that the tokens depend on, by name."""
    tokenizer = template.tokenizer
    rendered = template.render(
        [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    )  # holds bos and eos
    special = json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True)
    return {
        "tokenizer": _digest(special + tokenizer.backend_tokenizer.to_str()),
        "template": _digest(json.dumps([CACHE_VERSION, template.source, rendered, template.end_of_turn])),
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _contents(path: str) -> str:
    """The digest of a file. Raises ValueError where it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _open(cached: Path, digests: dict[str, str], source: Source) -> TokenizedData:
    table = pa.ipc.open_file(pa.memory_map(str(cached))).read_all()
    ids, trained = [], []
    for batch in table.to_batches():
        edges = batch["ids"].offsets.to_numpy()
        flat_ids, flat_trained = batch["ids"].values.to_numpy(), batch["trained"].values.to_numpy(zero_copy_only=False)
        ids += [flat_ids[a:b] for a, b in zip(edges, edges[1:])]
        trained += [flat_trained[a:b] for a, b in zip(edges, edges[1:])]
    merged, lost = (sum(table[name].to_pylist()) for name in ("merged_borders", "lost_rounds"))
    positions = table["position"].to_numpy()
    return TokenizedData(ids, trained, positions, merged, lost, digests, [replace(source, count=len(ids))])
