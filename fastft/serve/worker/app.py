"""The HTTP API of a worker, as an ASGI application: what each route answers, and what each error becomes.

fastft.serve.worker loads the model and runs the process around it.
"""

import asyncio
import hmac
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastft import __version__
from fastft.serve import protocol
from fastft.serve.worker.generation import AnswerJob, Generation
from fastft.serve.worker.responses import AnswerResponse, ChatForm, CompletionForm, Patience

LARGEST_BODY = 16 << 20
"""Bytes. A context of a million tokens is about 4 MB of text."""
SLOW_UPLOAD_S = 30.0


def build_app(served: Any, generation: Generation, patience: Patience, key: bytes | None) -> Starlette:
    """The application of a worker that serves the ServedModel `served`. `key`: what requests must bring, if anything."""
    handlers = _Handlers(served, generation, patience, key)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", handlers.chat_completions, methods=["POST"]),
            Route("/v1/completions", handlers.completions, methods=["POST"]),
            Route("/v1/models", handlers.models),
            Route("/v1/models/{name:path}", handlers.model),
            Route("/health", handlers.health),
            Route("/metrics", handlers.metrics),
        ],
        exception_handlers={
            protocol.ApiError: handlers.refuse,
            HTTPException: _no_such_route,
            ClientDisconnect: _client_left,
            Exception: _failed,
        },
    )


class _Handlers:
    """One method a route."""

    def __init__(self, served: Any, generation: Generation, patience: Patience, key: bytes | None):
        self.served, self.generation, self.patience, self.key = served, generation, patience, key
        self.figures = _WorkerFigures(generation)
        # A long prompt takes seconds to tokenise; in a thread of its own it does not hold up other requests.
        self.tokenising = ThreadPoolExecutor(1, "tokenising")
        self.fingerprint = f"fastft-{__version__}-{served.dtype}"

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._authorize(request)
        self._require_model(request.path_params["name"])
        return JSONResponse(self._card())

    async def health(self, request: Request) -> Response:
        generation, served = self.generation, self.served
        status = "dead" if not generation.alive else "draining" if generation.draining else "ok"
        content = {
            "status": status,
            "model": served.name,
            "running": generation.running,
            "waiting": generation.waiting,
            "max_batch": generation.max_rows,
            "max_queue": generation.max_queue,
            "window": served.context_length,
            "dtype": served.dtype,
        }
        return JSONResponse(content, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.figures.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    def refuse(self, request: Request, error: Exception) -> Response:
        """The answer to a request that the API refuses."""
        assert isinstance(error, protocol.ApiError)
        self.figures.requests.labels("refused").inc()
        return JSONResponse(error.content(), error.status, error.headers)

    async def _answer(self, request: Request, chat: bool) -> Response:
        self._authorize(request)
        asked = protocol.read_request(await _read_body(request), chat)
        self._require_model(asked.model)
        tokenise = self.served.chat_prompt if chat else self.served.completion_prompts
        prompts = await asyncio.get_running_loop().run_in_executor(self.tokenising, tokenise, asked)
        job = AnswerJob(self.served.answers(asked, prompts, chat, self.generation.max_rows))
        self.generation.submit(job)
        form = (ChatForm if chat else CompletionForm)(self.served.token_bytes, self.fingerprint)
        return AnswerResponse(asked, job, self.generation, form, self.patience, self._ended)

    def _ended(self, job: AnswerJob, outcome: str, first_token: float | None, seconds: float) -> None:
        self.figures.ended(job, outcome, first_token, seconds)
        if outcome == "answered":
            self.generation.note_duration(seconds)

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key):
            raise protocol.invalid_api_key()

    def _require_model(self, name: str) -> None:
        if name != self.served.name:
            raise protocol.model_not_found(name, [self.served.name])

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.served.name,
            "object": "model",
            "created": self.served.created,
            "owned_by": "fastft",
            "max_model_len": self.served.context_length,
        }


def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = protocol.route_not_found(request.method, request.url.path)
    found.status = error.status_code
    return JSONResponse(found.content(), found.status, error.headers)


def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(protocol.internal_error().content(), 500)


async def _read_body(request: Request) -> bytes:
    try:
        return await asyncio.wait_for(_body(request), SLOW_UPLOAD_S)
    except asyncio.TimeoutError:
        message = f"the request's body did not arrive within {SLOW_UPLOAD_S:g} s"
        raise protocol.ApiError(408, message, code="slow_upload") from None


async def _body(request: Request) -> bytes:
    if int(request.headers.get("content-length", 0)) > LARGEST_BODY:
        raise protocol.body_too_large(LARGEST_BODY)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > LARGEST_BODY:
            raise protocol.body_too_large(LARGEST_BODY)
    return bytes(body)


class _WorkerFigures:
    """What /metrics shows."""

    def __init__(self, generation: Any):
        self.registry = registry = CollectorRegistry()
        prefix = "fastft_worker_"
        self.requests = Counter(prefix + "requests", "Requests by how they ended.", ["outcome"], registry=registry)
        self.tokens = Counter(prefix + "tokens", "Tokens of accepted requests.", ["kind"], registry=registry)
        buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
        self.first = Histogram(
            prefix + "first_token_seconds",
            "From accepting a request to its first token.",
            buckets=buckets,
            registry=registry,
        )
        self.seconds = Histogram(
            prefix + "answer_seconds",
            "From accepting a request to the end of its answer.",
            buckets=buckets,
            registry=registry,
        )
        for name, text in (("running", "Requests being answered."), ("waiting", "Requests without a first token.")):
            gauge = Gauge(prefix + name, text, registry=registry)
            gauge.set_function(lambda name=name: getattr(generation, name))
        Gauge(prefix + "steps", "Steps of the batch so far.", registry=registry).set_function(lambda: generation.steps)

    def ended(self, job: Any, outcome: str, first_token: float | None, seconds: float) -> None:
        self.requests.labels(outcome).inc()
        self.tokens.labels("prompt").inc(job.prompt_tokens)
        self.tokens.labels("completion").inc(job.completion_tokens)
        if first_token is not None:
            self.first.observe(first_token)
        self.seconds.observe(seconds)
