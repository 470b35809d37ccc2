"""The pool of workers behind the gateway: tracks which are healthy, picks the next one, and sends it the request.

    pool.add(PoolWorker("http://10.0.0.5:8000/v1", "qwen", name="qwen"))
    worker = pool.pick("qwen", tried)                    # least in flight, ties by chance; None if nobody is left
    response = await pool.post(worker, path, body)       # raises WorkerFailed

A worker is one model at one URL. It is skipped while its health check fails, when its lease has run out, and for a pause
after three failures in a row. The pause doubles up to a minute; after it, a single request tries the worker. Connection
errors, 5xx and time-outs are failures; a 4xx is the client's.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import aiohttp
import orjson

logger = logging.getLogger(__name__)

FAILURES = 3
"""Failures in a row after which a worker is skipped for a while."""
PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
LARGEST_ERROR = 64 << 10
"""The most bytes of a worker's error that are passed on."""


class WorkerFailed(Exception):
    """A worker did not answer. `status` and `content` are what it sent instead, if it did."""

    def __init__(
        self, outcome: str, status: int | None = None, content: bytes = b"", headers: Mapping = MappingProxyType({})
    ):
        """`outcome` goes into the record: connect, time_out, closed, died, or status_503."""
        super().__init__(outcome)
        self.outcome, self.status, self.content, self.headers = outcome, status, content, headers


@dataclass(eq=False)
class PoolWorker:
    url: str
    """OpenAI's base URL: http://HOST:PORT/v1."""
    model: str
    """What the model is called there."""
    name: str
    """What it is called here."""
    key: str | None = field(default=None, repr=False)
    lease_until: float | None = None
    """End of the lease on time.monotonic's clock; None if the worker stays until it is removed."""
    in_flight: int = 0
    healthy: bool = True
    failures: int = 0
    pause_s: float = PAUSE_S
    paused_until: float = 0.0
    on_trial: bool = False
    """Whether the one request that tries the worker after a pause is in flight."""

    def can_answer(self, now: float) -> bool:
        leased = self.lease_until is None or now < self.lease_until
        return leased and self.healthy and now >= self.paused_until and not self.on_trial

    def headers(self) -> dict[str, str]:
        """The headers of a request to it."""
        key = {"authorization": f"Bearer {self.key}"} if self.key else {}
        return key | {"content-type": "application/json", "accept-encoding": "identity"}


class WorkerPool:
    def __init__(self, connect_s: float = 5.0, silence_s: float = 600.0, check_s: float = 5.0):
        """Seconds: limit for connecting, limit between two bytes of an answer, and time between two health checks."""
        self.workers: dict[tuple[str, str], PoolWorker] = {}
        self.timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=silence_s)
        self.check_timeout = aiohttp.ClientTimeout(total=connect_s)
        self.check_s = check_s
        self.session: aiohttp.ClientSession
        self.fresh: aiohttp.ClientSession

    async def open(self) -> None:
        """Make the HTTP sessions, within the event loop: one for all requests, and one that keeps no connections open."""
        traced = aiohttp.TraceConfig(lambda trace_request_ctx: trace_request_ctx)
        traced.on_connection_reuseconn.append(_note_reuse)
        common: dict[str, Any] = {
            "timeout": self.timeout,
            "auto_decompress": True,
            "cookie_jar": aiohttp.DummyCookieJar(),
        }
        kept = aiohttp.TCPConnector(limit=0, keepalive_timeout=15)
        self.session = aiohttp.ClientSession(connector=kept, trace_configs=[traced], **common)
        self.fresh = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True), **common)

    async def close(self) -> None:
        await self.session.close()
        await self.fresh.close()

    # Who is there ----------------------------------------------------------------------------------------------------

    def add(self, worker: PoolWorker) -> PoolWorker:
        """Add a worker, or renew the lease of one that is known already; return the pool's own entry."""
        known = self.workers.setdefault((worker.url, worker.model), worker)
        known.name, known.key, known.lease_until = worker.name, worker.key, worker.lease_until
        return known

    def remove(self, url: str, model: str | None = None) -> list[PoolWorker]:
        """Forget a worker, or all at a URL. Their running answers continue."""
        gone = [key for key in self.workers if key[0] == url and model in (None, key[1])]
        return [self.workers.pop(key) for key in gone]

    def names(self) -> list[str]:
        """Names of the models that are served, whether or not a worker can answer just now."""
        return list(dict.fromkeys(worker.name for worker in self.workers.values()))

    # Who answers -----------------------------------------------------------------------------------------------------

    def pick(self, name: str, tried: Collection[PoolWorker] = ()) -> PoolWorker | None:
        """The worker for the next request to the model `name`, except those in `tried`; None if there is none."""
        now = time.monotonic()
        able = [w for w in self.workers.values() if w.name == name and w not in tried and w.can_answer(now)]
        if not able:
            return None
        least = min(worker.in_flight for worker in able)
        worker = random.choice([worker for worker in able if worker.in_flight == least])
        worker.in_flight += 1
        worker.on_trial = worker.failures >= FAILURES
        return worker

    def give_back(self, worker: PoolWorker) -> None:
        """Note that a request for which `pick` chose this worker has ended."""
        worker.in_flight -= 1
        # Requests from before the pause may still run, and say nothing about the one that is the trial.
        worker.on_trial = worker.on_trial and worker.in_flight > 0

    def succeeded(self, worker: PoolWorker) -> None:
        worker.failures, worker.pause_s, worker.on_trial = 0, PAUSE_S, False

    def failed(self, worker: PoolWorker) -> None:
        worker.on_trial = False
        if time.monotonic() < worker.paused_until:
            return  # one end of a worker fails all that it was answering, and is one failure
        worker.failures += 1
        if worker.failures >= FAILURES:
            worker.paused_until = time.monotonic() + worker.pause_s
            logger.warning("%s: %d failures in a row; left alone for %g s", worker.url, worker.failures, worker.pause_s)
            worker.pause_s = min(2 * worker.pause_s, LONGEST_PAUSE_S)

    # Asking ----------------------------------------------------------------------------------------------------------

    async def post(self, worker: PoolWorker, path: str, body: bytes) -> aiohttp.ClientResponse:
        """Send a request to a worker; return the response, with its body unread. Raises WorkerFailed for a 5xx, a 429, or no
        response.

        `path` is what follows the base URL. If the worker had closed a kept connection meanwhile, this is no failure,
        because it has not read the request, which is sent once more over a new connection.
        """
        reused: list[bool] = []
        try:
            response = await self._post(self.session, worker, path, body, reused)
        except WorkerFailed as failure:
            if not (reused and failure.outcome == "closed"):
                raise
            response = await self._post(self.fresh, worker, path, body)
        if response.status < 500 and response.status != 429:
            return response
        try:
            content = (await response.read())[:LARGEST_ERROR]
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            content = b""
        response.close()
        raise WorkerFailed(f"status_{response.status}", response.status, content, response.headers)

    async def _post(
        self, session: aiohttp.ClientSession, worker: PoolWorker, path: str, body: bytes, reused: list | None = None
    ) -> aiohttp.ClientResponse:
        try:
            return await session.post(
                worker.url + path, data=body, headers=worker.headers(), allow_redirects=False, trace_request_ctx=reused
            )
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise WorkerFailed(outcome_of(error)) from error

    # Health ----------------------------------------------------------------------------------------------------------

    async def check_forever(self) -> None:
        while True:
            await self.check_all()
            await asyncio.sleep(self.check_s)

    async def check_all(self) -> None:
        """Check every worker's health, and forget those whose lease has run out."""
        now = time.monotonic()
        for key, worker in list(self.workers.items()):
            if worker.lease_until is not None and now > worker.lease_until:
                logger.warning("%s#%s: its lease has run out", *key)
                del self.workers[key]
        await asyncio.gather(*(self.check(worker) for worker in self.workers.values()))

    async def check(self, worker: PoolWorker) -> None:
        """GET /health beside /v1; of endpoints that have none, such as a vendor's, GET /v1/models."""
        root = worker.url.removesuffix("/v1")
        healthy = False
        with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError):
            status = await self._status(f"{root}/health", worker)
            if 400 <= status < 500:
                status = await self._status(f"{worker.url}/models", worker)
            healthy = status < 500
        if healthy != worker.healthy:
            level, how = (logging.INFO, "is back") if healthy else (logging.WARNING, "fails its health check")
            logger.log(level, "%s#%s %s", worker.url, worker.model, how)
            if healthy:
                worker.paused_until = 0.0
                self.succeeded(worker)
        worker.healthy = healthy

    async def _status(self, url: str, worker: PoolWorker) -> int:
        async with self.fresh.get(
            url, headers=worker.headers(), timeout=self.check_timeout, allow_redirects=False
        ) as r:
            return r.status

    async def models_at(self, worker: PoolWorker) -> list[str] | None:
        """Names of the models at a URL; None if nothing there speaks OpenAI's API."""
        url, headers = f"{worker.url}/models", worker.headers()
        try:
            async with self.fresh.get(
                url, headers=headers, timeout=self.check_timeout, allow_redirects=False
            ) as response:
                content = await response.read()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            return None
        try:
            return [str(each["id"]) for each in orjson.loads(content)["data"]]
        except (ValueError, TypeError, KeyError):
            return None


def outcome_of(error: BaseException) -> str:
    """The word for an error of a connection to a worker."""
    if isinstance(error, asyncio.TimeoutError):
        return "time_out"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "connect"
    return "closed"


async def _note_reuse(session: aiohttp.ClientSession, reused: Any, params: Any) -> None:
    if reused is not None:
        reused.append(True)
