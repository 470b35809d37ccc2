"""Build the response to a request in OpenAI's form: one JSON object, or a stream of server-sent events.

A stream begins with its first token, or with a comment line after 10 seconds of waiting; such comments keep proxies from
timing out. An error before that has its own HTTP status. In a stream that has begun, an error is an event, after which the
stream ends without the `[DONE]` that would look like success.

If the client disconnects, or reads nothing for `slow_client_s`, the answer is cancelled, streamed or not.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastft.inference.detokenize import TokenBytes
from fastft.inference.rows import Answering, Delta, TokenLogprob
from fastft.serve.protocol import IGNORED_HEADER, USAGE_COMMENT, ApiError, GenerationRequest
from fastft.serve.worker.generation import AnswerJob, Generation

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Patience:
    """Seconds between the comment lines of a waiting stream, and seconds for which a client may read nothing."""

    comment_s: float = 10.0
    slow_client_s: float = 60.0


class ChatForm:
    """The objects of /v1/chat/completions."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, token_bytes: TokenBytes, fingerprint: str):
        """`fingerprint` names the version and data type; it becomes the response's `system_fingerprint`."""
        self.token_bytes, self.fingerprint = token_bytes, fingerprint

    def opening(self, index: int) -> list[dict]:
        return [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        ]

    def piece(self, index: int, delta: Delta) -> dict:
        logprobs = self.logprobs(delta.answering, list(delta.logprobs)) if delta.logprobs else None
        return {"index": index, "delta": {"content": delta.text}, "logprobs": logprobs, "finish_reason": None}

    def ending(self, index: int, finish_reason: str) -> dict:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish_reason}

    def whole(self, index: int, answering: Answering, text: str, entries: list[TokenLogprob]) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        logprobs = None if answering.top_logprobs is None else self.logprobs(answering, entries)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answering.finish_reason}

    def logprobs(self, answering: Answering, entries: list[TokenLogprob]) -> dict:
        content = [
            self._entry(entry.token, entry.logprob) | {"top_logprobs": [self._entry(*each) for each in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict:
        spelled = self.token_bytes.spelled(token)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelled)}


class CompletionForm:
    """The objects of /v1/completions."""

    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, token_bytes: TokenBytes, fingerprint: str):
        """`fingerprint` names the version and data type; it becomes the response's `system_fingerprint`."""
        self.token_bytes, self.fingerprint = token_bytes, fingerprint
        self._offsets: dict[Answering, int] = {}

    def opening(self, index: int) -> list[dict]:
        return []

    def piece(self, index: int, delta: Delta) -> dict:
        logprobs = self.logprobs(delta.answering, list(delta.logprobs)) if delta.logprobs else None
        return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": None}

    def ending(self, index: int, finish_reason: str) -> dict:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": finish_reason}

    def whole(self, index: int, answering: Answering, text: str, entries: list[TokenLogprob]) -> dict:
        logprobs = None if answering.top_logprobs is None else self.logprobs(answering, entries)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answering.finish_reason}

    def logprobs(self, answering: Answering, entries: list[TokenLogprob]) -> dict:
        """Tokens with their places in the text, in characters."""
        tokens = [self._text(entry.token) for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(answering, 0))
            self._offsets[answering] = offsets[-1] + len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{self._text(token): value for token, value in entry.top} for entry in entries],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return self.token_bytes.spelled(token).decode("utf-8", "replace")


class AnswerResponse(Response):
    """Answers a request from its job, and cancels the job when the client disconnects."""

    def __init__(
        self,
        request: GenerationRequest,
        job: AnswerJob,
        generation: Generation,
        form: ChatForm | CompletionForm,
        patience: Patience,
        on_end: Callable[[AnswerJob, str, float | None, float], None],
    ):
        """`on_end(job, outcome, seconds to the first token, seconds)` is called once, however it ends."""
        self.request, self.job, self.generation, self.form = request, job, generation, form
        self.patience, self.on_end = patience, on_end
        self.background = None
        self.index = {answering: i for i, answering in enumerate(job.answers)}
        self.head = {
            "id": f"{form.prefix}-{uuid.uuid4().hex}",
            "object": form.chunk_object if request.stream else form.object,
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": form.fingerprint,
        }
        self.began = time.perf_counter()
        self.first_token: float | None = None
        self.started = False  # whether the client has got a status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.send = send
        work = asyncio.create_task(self._stream() if self.request.stream else self._whole())
        watch = asyncio.create_task(_until_gone(receive))
        outcome = "cancelled"
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                outcome = "failed"  # unless a result replaces it
                outcome = work.result()
        except asyncio.TimeoutError:
            outcome = "slow client"
            logger.warning("a client read nothing for %g s; its answer is given up", self.patience.slow_client_s)
        finally:
            work.cancel()
            watch.cancel()
            self.generation.cancel(self.job)
            self.on_end(self.job, outcome, self.first_token, time.perf_counter() - self.began)

    # Ways to answer; both return the outcome -------------------------------------------------------------------------

    async def _whole(self) -> str:
        texts: dict[Answering, list[str]] = {answering: [] for answering in self.job.answers}
        entries: dict[Answering, list[TokenLogprob]] = {answering: [] for answering in self.job.answers}
        try:
            async for delta in self._deltas():
                texts[delta.answering].append(delta.text)
                entries[delta.answering] += delta.logprobs
        except ApiError as error:
            await self._send_error(error)
            return "error"
        choices = [
            self.form.whole(i, answering, "".join(texts[answering]), entries[answering])
            for answering, i in self.index.items()
        ]
        await self._send_json(200, self.head | {"choices": choices, "usage": self._usage()})
        return "answered"

    async def _stream(self) -> str:
        try:
            await self._send_events()
        except ApiError as error:
            if self.started:
                await self._send(b"data: " + orjson.dumps(error.content()) + b"\n\n", more=False)
            else:
                await self._send_error(error)
            return "error"
        return "answered"

    async def _send_events(self) -> None:
        opened: set[Answering] = set()
        async for delta in self._deltas(comments=True):
            i, choices = self.index[delta.answering], []
            if delta.answering not in opened:
                opened.add(delta.answering)
                choices += self.form.opening(i)
            if delta.text or delta.logprobs:
                choices.append(self.form.piece(i, delta))
            if delta.finish_reason:
                choices.append(self.form.ending(i, delta.finish_reason))
            if choices:
                await self._send(b"".join(self._event([choice]) for choice in choices))
        # Clients ignore comments. The gateway reads token counts from them when usage was not requested.
        unasked = b"%s%s\n\n" % (USAGE_COMMENT, orjson.dumps(self._usage()))
        last = self._event([], self._usage()) if self.request.include_usage else unasked
        await self._send(last + DONE, more=False)

    async def _deltas(self, comments: bool = False) -> AsyncIterator[Delta]:
        """Yield the pieces of all answers. If `comments` is set, the client gets comment lines until the first piece."""
        finished = 0
        while finished < len(self.index):
            delta = await self.job.next(self.patience.comment_s if comments else None)
            if delta is None:
                place = self.generation.position(self.job)
                await self._send(
                    b": waiting, %d before this one\n\n" % place if not self.job.begun else b": working\n\n"
                )
                continue
            if self.first_token is None:
                self.first_token = time.perf_counter() - self.began
            finished += delta.finish_reason is not None
            yield delta

    def _event(self, choices: list[dict], usage: dict | None = None) -> bytes:
        chunk = self.head | {"choices": choices}
        if self.request.include_usage:
            chunk["usage"] = usage
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def _usage(self) -> dict:
        prompt, completion = self.job.prompt_tokens, self.job.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    # Bytes -----------------------------------------------------------------------------------------------------------

    async def _send(self, content: bytes, more: bool = True) -> None:
        """Send a piece of a stream."""
        if not self.started:
            await self._start(200, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"})
        await self._send_body(content, more)

    async def _send_error(self, error: ApiError) -> None:
        await self._send_json(error.status, error.content(), error.headers)

    async def _send_json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = orjson.dumps(content)
        length = {"content-type": "application/json", "content-length": str(len(body))}
        await self._start(status, length | (headers or {}))
        await self._send_body(body, more=False)

    async def _send_body(self, content: bytes, more: bool) -> None:
        """Raises TimeoutError if the client does not read."""
        message = {"type": "http.response.body", "body": content, "more_body": more}
        await asyncio.wait_for(self.send(message), self.patience.slow_client_s)

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.started = True
        if self.request.ignored:
            headers[IGNORED_HEADER] = ", ".join(self.request.ignored)
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
