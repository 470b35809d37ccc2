"""One request on its way through the gateway: from a client to a worker, and the answer back, as bytes.

Before the first byte of an answer, a worker that fails is replaced by another one that serves the same model. Comment lines
that keep a waiting stream alive do not count as an answer. After the first byte, a failure ends the stream with an error
event and `[DONE]`. Only whole lines are passed on, so a worker that dies never leaves half an event or half a character.
`on_end` always gets the turn, however it ended.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping

import aiohttp
import orjson
from starlette.types import Receive, Send

from fastft.common import logs
from fastft.serve.gateway.events import ServedTurn
from fastft.serve.gateway.pool import PoolWorker, WorkerFailed, WorkerPool, outcome_of
from fastft.serve.protocol import IGNORED_HEADER, ApiError, internal_error, shutting_down

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
LONGEST_LINE = 8 << 20
"""The most bytes of one line of a stream; a worker that sends a longer one has failed."""
MODEL_HEADER = "x-fastft-model"
PASSED_ON = ("retry-after", IGNORED_HEADER)
_ENDS = re.compile(rb'"finish_reason":\s*"')
_IN_BAND_ERROR = re.compile(rb'^data:\s*\{\s*"error":', re.MULTILINE)


def no_worker(name: str) -> ApiError:
    message = f"no worker that serves {name!r} can answer just now; try again soon"
    return ApiError(503, message, code="no_worker", kind="server_error", retry_after=2)


def worker_lost() -> ApiError:
    message = "the worker that wrote this answer is gone; what came so far is all of it. Ask again"
    return ApiError(502, message, code="worker_lost", kind="server_error")


class Exchange:
    """Forwards one request. `run` returns when the client has got everything that it will get."""

    def __init__(
        self,
        turn: ServedTurn,
        body_for: Callable[[PoolWorker], bytes],
        pool: WorkerPool,
        send: Send,
        headers: dict[str, str],
        keep: bool,
        abort: Callable[[], None],
        on_end: Callable[["Exchange"], None],
    ):
        """`body_for` makes the body for a worker, `headers` go to the client with any answer, `keep` says whether the
        sent bytes are recorded, and `abort` drops the client's connection."""
        self.turn, self.body_for, self.pool, self.send, self.headers = turn, body_for, pool, send, headers
        self.keep, self.abort, self.on_end = keep, abort, on_end
        self.started = False  # the client has a status
        self.answering = False  # the client has a part of an answer
        self.ended = False
        self.cut: str | None = None  # why the work was cancelled
        self.last_sent = time.monotonic()
        self.sending = False

    async def run(self, receive: Receive) -> None:
        self.task = asyncio.current_task()
        watch = asyncio.get_running_loop().create_task(self._until_gone(receive))
        try:
            await self._answer()
        except asyncio.CancelledError:
            if self.cut is None:
                raise
            self.turn.outcome = self.cut
            if self.cut == "shut_down":
                await self._end_with(shutting_down(), self.cut)
            elif self.cut == "slow_client":
                self.abort()
                await asyncio.sleep(0)  # the server hears of it
        except Exception as bug:
            logs.log_bug(logger, bug, "turn %s failed", self.turn.id)
            if self.ended:
                self.turn.outcome = "failed"
            else:
                await self._end_with(internal_error(), "failed")
        finally:
            watch.cancel()
            self.turn.total_s = time.perf_counter() - self.turn.clock
            self.on_end(self)

    def cancel(self, why: str) -> None:
        """Stop the work; the reason is client_left, slow_client or shut_down."""
        if not self.ended and self.cut is None:
            self.cut = why
            self.task.cancel()

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cancel("client_left")

    # Workers ---------------------------------------------------------------------------------------------------------

    async def _answer(self) -> None:
        tried: list[PoolWorker] = []
        failure: WorkerFailed | None = None
        while worker := self._pick(tried):
            tried.append(worker)
            note = {"worker": worker.url, "model": worker.name, "outcome": "cancelled"}
            self.turn.tries.append(note)
            try:
                await self._ask(worker)
                note["outcome"] = self.turn.outcome
                return
            except WorkerFailed as failed:
                failure = failed
                note["outcome"] = failed.outcome
                if failed.status != 429:  # which says that it is full, not that it is broken
                    self.pool.failed(worker)
                if self.answering:
                    return await self._end_with(worker_lost(), "died")
            finally:
                self.pool.give_back(worker)
        if failure and failure.content and not self.started:
            self.turn.outcome = "refused" if failure.status == 429 else "failed"
            await self._send_whole(failure.status, failure.content, failure.headers)
        else:
            await self._end_with(no_worker(self.turn.chosen), "failed")

    def _pick(self, tried: list[PoolWorker]) -> PoolWorker | None:
        """A worker of the chosen model, or else of the next model in the policy's order."""
        workers = (self.pool.pick(name, tried) for name in (self.turn.chosen, *self.turn.next))
        return next((worker for worker in workers if worker), None)

    async def _ask(self, worker: PoolWorker) -> None:
        """Forward the request to a worker, and its answer to the client. Raises WorkerFailed if the worker fails."""
        response = await self.pool.post(worker, self.turn.path.removeprefix("/v1"), self.body_for(worker))
        whole = False
        try:
            if response.status == 200 and response.content_type == "text/event-stream":
                await self._pass_stream(worker, response)
            else:
                content = await response.read()
                self.pool.succeeded(worker)
                self.turn.outcome = "refused"
                if response.status < 400:
                    self.turn.outcome = "answered"
                    self._begin(worker)
                await self._send_whole(response.status, content, response.headers)
            whole = True
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            outcome = outcome_of(error)
            raise WorkerFailed("died" if outcome == "closed" else outcome) from error
        finally:
            # The connection of an answer that is not read to its end cannot be used again; closing it tells the worker.
            (response.release if whole else response.close)()

    def _begin(self, worker: PoolWorker) -> None:
        self.answering = True
        self.turn.answered = worker.name
        self.turn.first_s = time.perf_counter() - self.turn.clock
        self.headers[MODEL_HEADER] = worker.name

    async def _pass_stream(self, worker: PoolWorker, response: aiohttp.ClientResponse) -> None:
        held, before, done, failed, finished = b"", b"", False, False, False
        async for piece in response.content.iter_any():
            end = piece.rfind(b"\n") + 1
            if not end:
                held += piece
                if len(held) > LONGEST_LINE:
                    raise WorkerFailed("protocol")
                continue
            lines, held = (held + piece[:end] if held else piece[:end]), piece[end:]
            if not self.answering:
                if all(line.startswith(b":") or not line.strip() for line in lines.splitlines()):
                    await self._send_piece(lines)
                    continue
                self._begin(worker)
            done = done or lines.rstrip().endswith(b"[DONE]")
            # An engine may end without [DONE]; then a finish_reason tells a whole answer from half of one.
            finished = finished or _ENDS.search(lines) is not None
            failed = failed or _IN_BAND_ERROR.search(lines) is not None
            before = lines
            await self._send_piece(lines)
        if not self.answering or not (done or finished or failed):
            raise WorkerFailed("died")
        self.pool.succeeded(worker)
        self.turn.outcome = "error" if failed else "answered"
        ending = b"" if before.endswith(b"\n\n") or before.endswith(b"\n\r\n") else b"\n"
        await self._send_last(b"" if done else ending + DONE)

    # The client ------------------------------------------------------------------------------------------------------

    async def comment(self) -> None:
        """Send a comment line, which keeps a stream alive until the first byte of its answer."""
        if not (self.answering or self.ended or self.sending):
            await self._send_piece(b": waiting\n\n")

    async def _send_piece(self, content: bytes) -> None:
        if not self.started:
            if not self.turn.next:  # else another model may answer; who did is in the events, too
                self.headers[MODEL_HEADER] = self.turn.chosen
            await self._start(200, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"})
        await self._send(content, more=True)

    async def _send_last(self, content: bytes) -> None:
        self.ended = True
        await self._send(content, more=False)

    async def _send_whole(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        if self.started:  # with comments, and now there is an error, or an answer that is not streamed
            return await self._send_last(b"data: " + content.replace(b"\n", b" ") + b"\n\n" + DONE)
        more = {name: headers[name] for name in PASSED_ON if name in headers}
        more["content-type"] = headers.get("content-type", "application/json")
        await self._start(status, more | {"content-length": str(len(content))})
        await self._send_last(content)

    async def _end_with(self, error: ApiError, outcome: str) -> None:
        """Send the client an error: as the response if none has begun, else as the last event of the stream."""
        self.turn.outcome = outcome
        content = orjson.dumps(error.content())
        await self._send_whole(error.status, content, {"content-type": "application/json", **error.headers})

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.started, self.turn.status = True, status
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (self.headers | headers).items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def _send(self, content: bytes, more: bool) -> None:
        if self.keep:
            self.turn.sent.append(content)
        # Whoever looks after slow clients compares `last_sent` with now while `sending` is true.
        self.sending, self.last_sent = True, time.monotonic()
        await self.send({"type": "http.response.body", "body": content, "more_body": more})
        self.sending = False
