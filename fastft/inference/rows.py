"""Generate several answers at once, each a row of one batch that it joins and leaves between two steps.

    loop = StepLoop(model, stop_ids, context_length=8192, max_rows=16)
    loop.add([Answering(prompt_ids, Sampling(temperature=0), max_tokens=64, text=AnswerText(token_bytes))])
    while loop.busy:
        for delta in loop.step(): …          # Delta(answering, text, logprobs, finish_reason, error)

A step reads at most `CHUNK` tokens of a prompt, and then gives every row its next token. A prompt is read alone into its own
cache, which then joins the batch. The batch's cache is padded on the left, so that all rows end in the same column, and has
spare columns on the right, which are written in place. Finished rows are dropped, together with the columns that no other
row needs. In fp32, every answer is token for token what `generate` gives for it alone.

Models whose state is more than keys and values of all positions (sliding windows, recurrent layers), or whose positions
depend on the longest row (dynamic rope scaling), cannot be padded: they answer one request at a time.

Not implemented: a prefix cache, paged memory (rows are padded to the longest), constrained output, speculative decoding.
"""

import inspect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from fastft.inference.detokenize import AnswerText
from fastft.inference.sampling import Sampling, penalize, sample

CHUNK = 512
"""The most prompt tokens that are read between two steps of the running rows."""
SPARE = 128
"""Columns added to the cache at a time. All of the cache is copied once every so many steps."""
# The parameter of `forward` that takes the cache: in transformers from 5.24 on, in earlier versions, and in Mamba models.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# Types of rope scaling whose frequencies depend on the longest sequence of a batch.
UNEVEN_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token before temperature and filters, with those of the likeliest tokens."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Answering:
    """One answer that is being generated."""

    prompt: Sequence[int]
    sampling: Sampling
    max_tokens: int
    text: AnswerText
    choice: int = 0
    """Index among the answers to one request; each answer has its own random numbers."""
    ignore_end: bool = False
    """Continue after the end of turn."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens to report at every place; None reports nothing."""
    tokens: list[int] = field(default_factory=list)
    """The generated tokens, including the end of turn."""
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.draws = self.sampling.draws(self.choice)
        self._unreported: deque[tuple[int, TokenLogprob]] = deque()
        self._seen_V: torch.Tensor | None = None

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.tokens]

    def seen_among(self, logits_V: torch.Tensor) -> torch.Tensor:
        """[V] bool: the tokens of prompt and answer. Kept from step to step, because a long context takes 11 ms to read."""
        if self._seen_V is None:
            self._seen_V = torch.zeros_like(logits_V, dtype=torch.bool)
            self._seen_V[self.ids] = True
        elif self.tokens:
            self._seen_V[self.tokens[-1]] = True
        return self._seen_V

    def take(self, token: int, ends: bool, logprob: TokenLogprob | None) -> "Delta":
        """Add a token to the answer, and return the text that is certain now."""
        self.tokens.append(token)
        begins = self.text.decoded
        if ends and not self.ignore_end:
            self.finish_reason, piece = "stop", self.text.end()
        else:
            if logprob:
                self._unreported.append((begins, logprob))
            piece = self.text.add(token)
            if self.text.stopped:
                self.finish_reason = "stop"
            elif len(self.tokens) >= self.max_tokens:
                piece += self.text.end()
                self.finish_reason = "stop" if self.text.stopped else "length"
        return Delta(self, piece, self._reported(), self.finish_reason)

    def _reported(self) -> list[TokenLogprob]:
        """The log-probabilities of tokens whose text was returned, so that no part of a stop string leaks through them."""
        everything = self.done and not self.text.stopped
        reported = []
        while self._unreported and (everything or self._unreported[0][0] < self.text.given):
            reported.append(self._unreported.popleft()[1])
        return reported


@dataclass(frozen=True)
class Delta:
    """The result of one step for one answer."""

    answering: Answering
    text: str = ""
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: str | None = None
    error: Exception | None = None
    """Set if the answer has failed; nothing follows."""


@dataclass(eq=False)
class _PromptPass:
    """A prompt that is being read, with the answers to it."""

    answers: list[Answering]
    ids: list[int]
    cache: Cache
    done: int = 0


class StepLoop:
    """The answers that are being generated, with the model's state for each. Only one thread may use it."""

    def __init__(
        self, model: Any, stop_ids: Sequence[int], context_length: int, max_rows: int = 16, memory: int | None = None
    ):
        """`context_length`: positions that the model knows. `memory`: bytes that the cache of several rows may take."""
        self.model, self.stop_ids, self.context_length, self.memory = model, frozenset(stop_ids), context_length, memory
        self.device = next(model.parameters()).device
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = next(name for name in CACHE_NAMES if name in parameters)
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.why_alone = _why_alone(model, parameters)
        """Why this model answers one request at a time; "" if it does not have to."""
        self.max_rows = 1 if self.why_alone else max_rows
        self.waiting: deque[list[Answering]] = deque()
        self._reading: _PromptPass | None = None
        self.rows: list[Answering] = []
        self._cache: Any = None  # of `rows`

    # Adding and dropping answers ---------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self._reading or self.rows)

    def add(self, answers: list[Answering]) -> None:
        """Queue the answers to one prompt, which begin together. First come, first served."""
        assert 0 < len(answers) <= self.max_rows, "more answers to a prompt than the batch has rows"
        assert all(len(a.prompt) + a.max_tokens <= self.context_length for a in answers), "an answer beyond the context"
        self.waiting.append(answers)

    def remove(self, answers: Sequence[Answering]) -> None:
        """Drop answers, whether they wait, their prompt is being read, or they are rows of the batch."""
        gone = set(map(id, answers))
        kept = ([a for a in group if id(a) not in gone] for group in self.waiting)
        self.waiting = deque(group for group in kept if group)
        if self._reading:
            self._reading.answers = [a for a in self._reading.answers if id(a) not in gone]
            self._reading = self._reading if self._reading.answers else None
        self._keep([i for i, row in enumerate(self.rows) if id(row) not in gone])

    def clear(self) -> list[Answering]:
        """Drop everything, and return the running answers."""
        reading = self._reading.answers if self._reading else []
        dropped = [*self.rows, *reading, *(a for group in self.waiting for a in group)]
        self.waiting.clear()
        self._reading, self.rows, self._cache = None, [], None
        return dropped

    def _keep(self, places: list[int]) -> None:
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in places]
        if not self.rows:
            self._cache = None
        else:
            self._cache.keep(places)

    # A step ----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Read a piece of the next prompt, if there is room for its answers, and give every row its next token.

        If a prompt fails, only its answers fail. Raises what the model raises for the rows together; call `clear` then.
        """
        deltas = self._read()
        if self.rows:
            deltas += self._next_tokens()
        self._keep([i for i, row in enumerate(self.rows) if not row.done])
        return deltas

    def _read(self) -> list[Delta]:
        """Read prompts, `CHUNK` tokens at most or one piece; those that are read to the end join the batch."""
        deltas, room = [], CHUNK
        while room > 0 and (reading := self._next_reading()):
            piece = reading.ids[reading.done : None if self.why_alone else reading.done + room]
            try:
                logits_1V = self._forward(piece, reading)
            except Exception as error:
                deltas += [Delta(answering, error=error) for answering in reading.answers]
                self._reading = None
                continue
            room -= len(piece)
            reading.done += len(piece)
            if reading.done == len(reading.ids):
                deltas += self._join(reading, logits_1V)
        return deltas

    def _next_reading(self) -> _PromptPass | None:
        if self._reading is None and self.waiting and self._has_room(self.waiting[0]):
            answers = self.waiting.popleft()
            cache = DynamicCache(config=self.model.config)
            self._reading = _PromptPass(answers, answers[0].ids, cache)
        return self._reading

    def _has_room(self, answers: list[Answering]) -> bool:
        rows = len(self.rows) + len(answers)
        return not self.rows or (rows <= self.max_rows and self._fits(rows, len(answers[0].ids)))

    def _fits(self, rows: int, length: int) -> bool:
        """Whether the cache of so many rows of this length fits into the memory."""
        if self.memory is None or not isinstance(self._cache, _PaddedCache):
            return True
        return rows * (max(length, self._cache.end) + SPARE) * self._cache.bytes_of_a_token <= self.memory

    def _forward(self, piece: list[int], reading: _PromptPass) -> torch.Tensor:
        """Logits after a piece of a prompt, [1, V]."""
        ids_1T = torch.tensor([piece], device=self.device)
        positions = {}
        if not self.why_alone:
            positions["position_ids"] = torch.arange(reading.done, reading.done + len(piece), device=self.device)[None]
        return self._call(ids_1T, reading.cache, **positions)

    def _call(self, ids_BT: torch.Tensor, cache: Any, **inputs: torch.Tensor | None) -> torch.Tensor:
        inputs |= {self._cache_name: cache, "use_cache": True}
        return self.model(input_ids=ids_BT, **inputs, **self._last_logits).logits[:, -1]

    def _join(self, reading: _PromptPass, logits_1V: torch.Tensor) -> list[Delta]:
        """Add the answers to a prompt to the batch as rows, and give each its first token."""
        self._reading, answers = None, reading.answers
        if self.why_alone:
            self._cache = _LoneCache(reading.cache)
        else:
            self._cache = self._cache or _PaddedCache()
            self._cache.join(reading.cache, len(answers))
        self.rows += answers
        return self._tokens(answers, logits_1V.expand(len(answers), -1).clone())

    def _next_tokens(self) -> list[Delta]:
        """Compute the next token of all unfinished rows that existed before this step."""
        self._make_room()
        self._keep([i for i, row in enumerate(self.rows) if not row.done])
        if not self.rows:
            return []
        ids_B1 = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.device)
        return self._tokens(self.rows, self._call(ids_B1, self._cache.cache, **self._cache.inputs(self.device)))

    def _make_room(self) -> None:
        """If the cache would outgrow the memory, put the newest rows back into the queue.

        This costs time but loses no token.
        """
        while len(self.rows) > 1 and self._cache.is_full and not self._fits(len(self.rows), 0):
            last = self.rows[-1]
            self._keep(list(range(len(self.rows) - 1)))
            if not last.done:
                self.waiting.appendleft([last])

    def _tokens(self, rows: list[Answering], logits_BV: torch.Tensor) -> list[Delta]:
        """Choose the next token of each row, in fp32 as `generate` does."""
        logits_BV = logits_BV.float()
        usable = logits_BV.amax(-1).isfinite().tolist()  # the maximum is NaN if any logit is
        logprobs = [_logprobs(logits_V, row.top_logprobs) for row, logits_V in zip(rows, logits_BV)]
        for row, logits_V in zip(rows, logits_BV):
            if row.sampling.repetition_penalty != 1:
                penalize(logits_V, row.seen_among(logits_V), row.sampling.repetition_penalty)
        draws = [row.draws.random() for row in rows]
        logits_BV = logits_BV if all(usable) else logits_BV.nan_to_num()
        ids = sample(logits_BV, [row.sampling for row in rows], draws).tolist()
        return [self._taken(*each) for each in zip(rows, ids, logprobs, usable)]

    def _taken(self, row: Answering, token: int, logprobs: torch.Tensor | None, usable: bool) -> Delta:
        if not usable:
            row.finish_reason = "error"
            return Delta(row, error=ArithmeticError("the model's output is not a number"))
        logprob = None
        if logprobs is not None:
            top = logprobs.topk(row.top_logprobs or 0)
            pairs = tuple(zip(top.indices.tolist(), top.values.tolist()))
            logprob = TokenLogprob(token, float(logprobs[token]), pairs)
        return row.take(token, token in self.stop_ids, logprob)


def _logprobs(logits_V: torch.Tensor, asked: int | None) -> torch.Tensor | None:
    return None if asked is None else logits_V.log_softmax(-1)


def _why_alone(model: Any, parameters: Any) -> str:
    """Why the rows of `model` cannot be padded; "" if they can."""
    if "position_ids" not in parameters or "attention_mask" not in parameters:
        return "its positions cannot be given"
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {DynamicLayer.__name__}
    if kinds:
        return f"its cache has other layers than full attention ({', '.join(sorted(kinds))})"
    if rope := _rope_types(model.config.get_text_config(decoder=True)) & UNEVEN_ROPE:
        return f"its rope scaling ({', '.join(sorted(rope))}) depends on the longest row"
    return ""


def _rope_types(config: Any) -> set[str]:
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return {each.get("rope_type") for each in [settings, *nested]} - {None}


# Caches --------------------------------------------------------------------------------------------------------------------


class _LoneCache:
    """The cache of a model that answers one request at a time, which is transformers' own."""

    is_full = False

    def __init__(self, cache: Cache):
        self.cache = cache

    def inputs(self, device: torch.device) -> dict:
        return {}


class _PaddedCache:
    """Keys and values of all rows, padded on the left so that each row's last token is in column `end` - 1."""

    def __init__(self):
        self.cache: Cache | None = None
        self.lengths: list[int] = []

    @property
    def end(self) -> int:
        return max(self.lengths, default=0)

    @property
    def is_full(self) -> bool:
        """Whether the next token needs more columns than there are."""
        return self.cache.layers[0].is_full

    @property
    def bytes_of_a_token(self) -> int:
        return sum(layer.bytes_of_a_token for layer in self.cache.layers)

    def join(self, read: Cache, copies: int) -> None:
        """Add the state of a prompt that was read alone, once for each of its answers."""
        length = read.get_seq_length()
        if self.cache is None:
            self.cache = Cache(layers=[_PaddedLayer() for _ in read.layers])
        for layer, added in zip(self.cache.layers, read.layers):
            layer.join(added.keys, added.values, copies)
        self.lengths += [length] * copies

    def keep(self, places: list[int]) -> None:
        """Keep only these rows, and drop the columns that they do not need."""
        end = self.end
        self.lengths = [self.lengths[i] for i in places]
        for layer in self.cache.layers:
            layer.keep(places, end - self.end)

    def inputs(self, device: torch.device) -> dict:
        """Mask and positions of one more token a row. Counts that token as part of the row."""
        lengths_B1 = torch.tensor(self.lengths, device=device)[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        # Where all rows are equally long nothing is padded; attention without a mask is faster.
        even = len(set(self.lengths)) == 1
        mask_BT = None if even else torch.arange(self.end, device=device)[None] >= self.end - 1 - lengths_B1
        return {"attention_mask": mask_BT, "position_ids": lengths_B1}


class _PaddedLayer(DynamicLayer):
    """A layer's keys and values, [B, heads, columns, head size], of which the first `length` columns are in use."""

    def __init__(self):
        super().__init__()
        self.stored: list[torch.Tensor] = []
        self.length = 0

    @property
    def is_full(self) -> bool:
        return self.length == self.stored[0].shape[2]

    @property
    def bytes_of_a_token(self) -> int:
        return sum(x.shape[1] * x.shape[3] * x.element_size() for x in self.stored)

    def join(self, keys: torch.Tensor, values: torch.Tensor, copies: int) -> None:
        before, length = self.length, keys.shape[2]
        width = max(before, length)
        stored = []
        for i, added in enumerate((keys, values)):
            old = self.stored[i] if self.stored else added[:0]
            new = added.new_zeros(len(old) + copies, added.shape[1], width + SPARE, added.shape[3])
            new[: len(old), :, width - before : width] = old[:, :, :before]
            new[len(old) :, :, width - length : width] = added
            stored.append(new)
        self.stored, self.length = stored, width
        self._show()

    def keep(self, places: list[int], cut: int) -> None:
        self.stored = [each[places][:, :, cut:].contiguous() for each in self.stored]
        self.length -= cut
        self._show()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        end = self.length + key_states.shape[2]
        if end > self.stored[0].shape[2]:
            self.stored = [torch.nn.functional.pad(each, (0, 0, 0, SPARE)) for each in self.stored]
        for each, added in zip(self.stored, (key_states, value_states)):
            each[:, :, self.length : end] = added
        self.length = end
        self._show()
        return self.keys, self.values

    def _show(self) -> None:
        """Expose the columns in use to transformers."""
        self.keys, self.values = (each[:, :, : self.length] for each in self.stored)
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def get_seq_length(self) -> int:
        return self.length
