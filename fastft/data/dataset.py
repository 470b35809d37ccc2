"""Conversations -> token cache -> batches: pure functions of (data, seed, epoch, step).

`tokenized(...)` tokenises a file once into an Arrow file (`fastft.data.tokenize`), keyed by what it depends on, and memory-maps it:
the ranks of a machine share it, and a second run starts at once. `mixed(...)` makes one set of several files. `StepPlan` turns
the packing plan of each epoch into optimiser steps, `Curriculum` puts the stages of a run one behind the other; `build_batch`
turns rows into tensors, `ahead` does so for the steps to come. Nothing here has a state to save: step number in, batch out.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from fastft.common.distributed import everywhere, local_rank
from fastft.config import TrainConfig
from fastft.data.conversation import Message, read_conversations
from fastft.data.template.chat_template import ChatTemplate
from fastft.data.tokenize import write_tokens
from fastft.errors import UserError

logger = logging.getLogger(__name__)

CACHE_VERSION = 5  # raise when the same key would have to hold other tokens


@dataclass
class TokenizedData:
    """The C conversations of a file as tokens; the ids are views into a memory-mapped file."""

    ids: list[np.ndarray]  # C arrays, int32
    trained: list[np.ndarray]  # C arrays, bool
    positions: np.ndarray  # [C] int64: which record of its file each one is
    merged_boundaries: int
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
            self.merged_boundaries,
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
        sum(part.merged_boundaries for part in parts),
        sum(part.lost_rounds for part in parts),
        parts[0].digests,
        sources,
    )


def cache_directory() -> Path:
    """`$FASTFT_CACHE`, else `~/.cache/fastft`."""
    return Path(os.environ.get("FASTFT_CACHE") or Path.home() / ".cache" / "fastft")


def fit_to_seq_len(data: TokenizedData, seq_len: int, overlong: str, path: str) -> tuple[TokenizedData, dict[str, int]]:
    """Leave out what cannot be trained on, and say how much: (data, counts for the report).

    Raises UserError when conversations are longer than the window and `overlong` is "refuse", or when nothing is left.
    """
    lengths, trained = data.lengths, data.trained_counts
    long = lengths > seq_len
    if long.any() and overlong == "refuse":
        raise UserError(
            f"{path}: {long.sum()} of {len(lengths)} conversations are longer than the window of {seq_len} tokens (longest: "
            f"{lengths.max()}). Split them (python -m cleaning {path} -o DIR --max_tokens {seq_len} --model MODEL), or say "
            "--overlong split (the same on the way) or --overlong drop"
        )
    empty = (trained == 0) & ~long
    kept = data.select(np.flatnonzero(~long & ~empty))
    if not kept.ids:
        raise UserError(
            f"{path}: no conversation is left to train on ({len(lengths)} read, {long.sum()} longer than the window of "
            f"{seq_len}, {empty.sum()} without a trained token)"
        )
    return kept, {"conversations": len(kept.ids), "overlong": int(long.sum()), "nothing_to_train": int(empty.sum())}


def load_data(path: str, template: ChatTemplate, config: TrainConfig) -> TokenizedData:
    """The tokens of one file, without the conversations that cannot be trained on. Raises UserError as `tokenized` does.

    In a run of several processes the first one of each machine tokenises, and all of it share the cache; collective there.
    """
    split_to = config.seq_len if config.overlong == "split" else None
    progress = lambda done: logger.info(f"tokenised {done} conversations") if done % 8192 == 0 else None  # noqa: E731
    if dist.is_initialized():
        everywhere((lambda: tokenized(path, template, split_to, progress)) if local_rank() == 0 else None)
    data = tokenized(path, template, split_to, progress)
    kept, counts = fit_to_seq_len(data, config.seq_len, config.overlong, path)
    lost = f", {data.lost_rounds} rounds that no split could fit" if data.lost_rounds else ""
    logger.info(
        f"data: {path}: {counts['conversations']} conversations, {kept.lengths.sum():,} tokens, "
        f"{kept.trained_counts.sum():,} trained; left out: {counts['overlong']} over the window, "
        f"{counts['nothing_to_train']} without an answer to learn{lost}; {data.merged_boundaries} boundaries where the answer's "
        "own tokens won"
    )
    for written in sorted(template.written_before_answers):
        logger.info(f"note: the template writes {written!r} before some answers; it is trained with them")
    return kept


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
    """The digest of a file. Raises UserError where it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _open(cached: Path, digests: dict[str, str], source: Source) -> TokenizedData:
    table = pa.ipc.open_file(pa.memory_map(str(cached))).read_all()
    ids, trained = [], []
    for batch in table.to_batches():
        edges = batch["ids"].offsets.to_numpy()
        flat_ids, flat_trained = batch["ids"].values.to_numpy(), batch["trained"].values.to_numpy(zero_copy_only=False)
        ids += [flat_ids[a:b] for a, b in zip(edges, edges[1:])]
        trained += [flat_trained[a:b] for a, b in zip(edges, edges[1:])]
    merged, lost = (sum(table[name].to_pylist()) for name in ("merged_boundaries", "lost_rounds"))
    positions = table["position"].to_numpy()
    return TokenizedData(ids, trained, positions, merged, lost, digests, [replace(source, count=len(ids))])
