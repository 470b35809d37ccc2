"""Read the conversations of a run as tokens, by way of a cache.

    data = load_data("data.jsonl", template, config)     # one file, without what cannot be trained on
    data = mixed([data, more], [1.0, 2.3], [None, 1])    # one set of several files

A file is tokenised once into an Arrow file (fastft.data.tokenize), whose name is a digest of everything that the tokens
depend on. It is memory-mapped: the ranks of a machine share it, and a second run starts at once.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from fastft.common.distributed import everywhere, local_rank
from fastft.config import TrainConfig
from fastft.data.conversation import Message, read_conversations
from fastft.data.template.chat_template import ChatTemplate
from fastft.data.tokenize import SCHEMA, write_tokens
from fastft.errors import UserError

logger = logging.getLogger(__name__)

CACHE_VERSION = 5  # increase this when the same key would stand for different tokens


@dataclass
class TokenizedData:
    """The C conversations of a file as tokens; the ids are views into a memory-mapped file."""

    ids: list[np.ndarray]  # C arrays, int32
    trained: list[np.ndarray]  # C arrays, bool
    positions: np.ndarray  # [C] int64: which record of its file each one is
    kept_boundaries: int  # answers whose first characters the tokenizer would have merged with the prompt
    lost_rounds: int  # rounds that no part could hold, where conversations were split
    digests: dict[str, str]  # digests of the other inputs of the tokens: "tokenizer", "template"
    sources: list["Source"]
    untrained_answers: int = 0  # answers that the file marks as cut or not to be learned
    cut_answers: int = 0  # of these, those that it marks as cut

    @cached_property  # 0.3 s for 100,000 conversations
    def lengths(self) -> np.ndarray:
        """[C] int64: tokens of each conversation."""
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    @cached_property
    def trained_counts(self) -> np.ndarray:
        """[C] int64: tokens of each conversation that the loss counts. A first token is never one: nothing predicts it."""
        return np.array([int(t[1:].sum()) for t in self.trained], dtype=np.int64)

    def select(self, keep: np.ndarray) -> "TokenizedData":
        """Return the conversations with the numbers `keep` (int64). The data must come from one file."""
        return replace(
            self,
            ids=[self.ids[i] for i in keep],
            trained=[self.trained[i] for i in keep],
            positions=self.positions[keep],
            sources=[replace(self.sources[0], count=len(keep))],
        )


@dataclass(frozen=True)
class Source:
    """A file of a mixture: `count` conversations, one after the other, and how many times an epoch they are trained on."""

    path: str
    count: int
    weight: float = 1.0
    """Times that each is trained on in an epoch; 2.3 means twice, and three in ten of them a third time."""
    epochs: int | None = None
    """The number of epochs, counted from the first, in which they are trained on; None: all."""
    contents: str = ""
    """The file's digest."""


def tokenized(path: str, template: ChatTemplate, split_to: int | None = None) -> TokenizedData:
    """Tokenise `path` into the cache, or open what is there.

    With `split_to`, conversations longer than so many tokens are split at whole rounds, as the cleaner does. Raises
    UserError when the file cannot be read. When a conversation is malformed, or its mask cannot be derived, the error names
    the conversation.
    """
    contents, digests = _contents(path), _digests(template)
    cached = cache_directory() / f"{_digest(json.dumps([contents, digests, split_to]))}.arrow"
    if cached.exists():
        try:
            return _open(cached, digests, Source(path, 0, contents=contents))
        except pa.ArrowInvalid:
            logger.warning(
                "%s: this token file is damaged or of an earlier version; %s is tokenised again", cached, path
            )
    write_tokens(path, template, split_to, cached)
    return _open(cached, digests, Source(path, 0, contents=contents))


def mixed(parts: Sequence[TokenizedData], weights: Sequence[float], epochs: Sequence[int | None]) -> TokenizedData:
    """Return the data of several files as one set, with a `Source.weight` and a `Source.epochs` for each file."""
    sources = [replace(part.sources[0], weight=w, epochs=e) for part, w, e in zip(parts, weights, epochs)]
    return TokenizedData(
        [ids for part in parts for ids in part.ids],
        [trained for part in parts for trained in part.trained],
        np.concatenate([part.positions for part in parts]),
        sum(part.kept_boundaries for part in parts),
        sum(part.lost_rounds for part in parts),
        parts[0].digests,
        sources,
        sum(part.untrained_answers for part in parts),
        sum(part.cut_answers for part in parts),
    )


def cache_directory() -> Path:
    """Return the directory of token files: `$FASTFT_CACHE`, else `~/.cache/fastft`."""
    return Path(os.environ.get("FASTFT_CACHE") or Path.home() / ".cache" / "fastft")


def fit_to_seq_len(data: TokenizedData, seq_len: int, overlong: str, path: str) -> tuple[TokenizedData, dict[str, int]]:
    """Leave out conversations that are too long or have nothing to train. Returns (the others, {kind: how many there are}).

    Raises UserError when some are longer than `seq_len` tokens and `overlong` is "refuse", or when none is left. `path` is
    the file's name for messages.
    """
    lengths, trained = data.lengths, data.trained_counts
    long = lengths > seq_len
    if long.any() and overlong == "refuse":
        raise UserError(
            f"{path}: {long.sum()} of {len(lengths)} conversations are longer than the sequence length of {seq_len} tokens "
            f"(longest: {lengths.max()}); split them with --overlong split, or beforehand (python -m cleaning {path} -o DIR "
            f"--max_tokens {seq_len} --model MODEL), or leave them out with --overlong drop"
        )
    empty = (trained == 0) & ~long
    kept = data.select(np.flatnonzero(~long & ~empty))
    if not kept.ids:
        raise UserError(
            f"{path}: no conversation is left to train on ({len(lengths)} read, {long.sum()} longer than the sequence length "
            f"of {seq_len} tokens, {empty.sum()} without a trained token)"
        )
    return kept, {"conversations": len(kept.ids), "overlong": int(long.sum()), "nothing_to_train": int(empty.sum())}


def load_data(path: str, template: ChatTemplate, config: TrainConfig) -> TokenizedData:
    """Return the tokens of one file, without the conversations that cannot be trained on; logs how many those are.

    If a process group has been joined, this is a collective: the first process of each machine tokenises, and the others
    wait for it and share its cache. (Estimating a run's price joins none.) Raises UserError as `tokenized` and
    `fit_to_seq_len` do.
    """
    split_to = config.seq_len if config.overlong == "split" else None
    if dist.is_initialized():
        everywhere((lambda: tokenized(path, template, split_to)) if local_rank() == 0 else None)
    data = tokenized(path, template, split_to)
    kept, counts = fit_to_seq_len(data, config.seq_len, config.overlong, path)
    logger.info("data: %s: %s", path, _summary(data, kept, counts))
    for written in sorted(template.written_before_answers):
        logger.info("note: the template writes %r before some answers; it is trained with them", written)
    return kept


def _summary(data: TokenizedData, kept: TokenizedData, counts: dict[str, int]) -> str:
    """Return one line about what is used of a file and what is left out. Rare cases are named only if they occurred."""
    lost = f", {data.lost_rounds} rounds that no split could fit" if data.lost_rounds else ""
    marked = (
        f", {data.untrained_answers} answers that the file marks as not to be learned" if data.untrained_answers else ""
    )
    cut = f" ({data.cut_answers} of them as cut)" if data.cut_answers else ""
    return (
        f"{counts['conversations']} conversations, {kept.lengths.sum():,} tokens, {kept.trained_counts.sum():,} trained; "
        f"left out: {counts['overlong']} longer than the sequence length, {counts['nothing_to_train']} without an answer to "
        f"learn{lost}{marked}{cut}; {data.kept_boundaries} boundaries where the answer's own tokens won"
    )


def conversation_names(data: TokenizedData, conversations: Sequence[int]) -> list[str]:
    """Return the names that some conversations have in their files: "ID", or "ID (part 2 of 3)".

    Token files hold no ids, so the data files are read again. That takes seconds for gigabytes, and is only done after
    something went wrong.
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
    """Return digests of everything that the tokens depend on besides the data: "tokenizer" and "template"."""
    tokenizer = template.tokenizer
    # A rendering is part of the digest, because it shows the tokens for beginning and end of text, which the template takes
    # from the tokenizer.
    rendered = template.render([Message("user", "a"), Message("assistant", "b"), Message("user", "c")])
    special = json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True)
    return {
        "tokenizer": _digest(special + tokenizer.backend_tokenizer.to_str()),
        "template": _digest(json.dumps([CACHE_VERSION, template.source, rendered, template.end_of_turn])),
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _contents(path: str) -> str:
    """Return the digest of a file's bytes. Raises UserError if it cannot be read."""
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
    """Memory-map a token file. Raises pyarrow.ArrowInvalid for one that is damaged, or that an earlier version wrote."""
    table = pa.ipc.open_file(pa.memory_map(str(cached))).read_all()
    # Earlier versions wrote other columns. Raising CACHE_VERSION instead would change the identity of earlier runs.
    if table.column_names != SCHEMA.names:
        raise pa.ArrowInvalid("an earlier version wrote this file")
    ids, trained = [], []
    for batch in table.to_batches():
        edges = batch["ids"].offsets.to_numpy()
        flat_ids, flat_trained = batch["ids"].values.to_numpy(), batch["trained"].values.to_numpy(zero_copy_only=False)
        ids += [flat_ids[a:b] for a, b in zip(edges, edges[1:])]
        trained += [flat_trained[a:b] for a, b in zip(edges, edges[1:])]
    merged, lost, untrained, cut = (
        sum(table[name].to_pylist()) for name in ("kept_boundaries", "lost_rounds", "untrained_answers", "cut_answers")
    )
    positions, sources = table["position"].to_numpy(), [replace(source, count=len(ids))]
    return TokenizedData(ids, trained, positions, merged, lost, digests, sources, untrained, cut)
