"""The gateway: all models behind one address, in a process that computes nothing.

    POST /v1/chat/completions  /v1/completions      forwarded to a worker (fastft.serve.gateway.exchange)
    GET  /v1/models  /v1/models/{id}  /health  /metrics
    POST, DELETE  /admin/workers                    with the admin key
    GET  /  /web/…                                  the page for people (fastft.serve.site); it uses the paths above and
    GET  /about    /arena/…                         what is served here; battles and votes (fastft.serve.arena.battles)

An ASGI application, without a framework: a request costs a third of a millisecond of CPU, and routing eight paths is
eight lines. The page of another site cannot use it: a request with an `Origin` is answered only if that is the gateway's
own, or one that the configuration names.
"""

import asyncio
import hashlib
import hmac
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson
from starlette.types import Receive, Scope, Send

from fastft import __version__
from fastft.common import logs
from fastft.common.urls import parse_http
from fastft.compose.abtest.policy import Experiment
from fastft.compose.policy import Choice, Policy
from fastft.compose.router.policy import RoutePolicy
from fastft.compose.virtual import Asked, Resolved, VirtualModels
from fastft.data.conversation import Conversation
from fastft.serve import moderation, protocol
from fastft.serve.address import is_loopback
from fastft.serve.arena.battles import Arena, Battle, HiddenAnswer
from fastft.serve.gateway.events import EventLog, ServedTurn
from fastft.serve.gateway.exchange import Exchange
from fastft.serve.gateway.figures import GatewayFigures
from fastft.serve.gateway.keys import Allowance, ApiKey
from fastft.serve.gateway.pool import PoolWorker, WorkerPool
from fastft.serve.gateway.request import (
    CONVERSATION_HEADERS,
    as_messages,
    bearer,
    conversation_id,
    header,
    require_shallow,
    user_of,
)
from fastft.serve.moderation import Moderation, ModerationSettings
from fastft.serve.protocol import ApiError
from fastft.serve.site import Site

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GatewaySettings:
    host: str = "127.0.0.1"
    keys: Sequence[ApiKey] = ()
    admin_key: str | None = field(default=None, repr=False)
    origins: Sequence[str] = ()
    key_envs: Sequence[str] = ()
    """Names of environment variables whose values may be sent, as keys, to workers that are added later."""
    largest_body: int = 16 << 20
    most_requests: int = 1000
    """Requests at a time; beyond that, clients get 429 with Retry-After."""
    upload_s: float = 30.0
    comment_s: float = 10.0
    slow_client_s: float = 60.0
    moderation: ModerationSettings | None = None
    unit_key: bytes | None = field(default=None, repr=False)
    """The key of the hash that stands for a user in the record; None records no users."""


class Gateway:
    """The ASGI application."""

    def __init__(
        self,
        pool: WorkerPool,
        settings: GatewaySettings,
        virtual: Mapping[str, Policy | Experiment],
        record: EventLog | None = None,
    ):
        """`virtual`: policies and experiments by the names of their virtual models; routers are loaded."""
        self.pool, self.settings, self.virtual, self.record = pool, settings, VirtualModels(virtual), record
        self.routes = {
            name: routes
            for name in virtual
            if (routes := [each for each in self.virtual.reached(name) if isinstance(each, RoutePolicy)])
        }
        self.instructing = {
            name for name in virtual if any(each.kind == "grimoire" for each in self.virtual.reached(name))
        }
        # For decisions that take so long that a stream would notice. One thread, so that they do not slow each other down.
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="decisions")
        self.deciding = 0
        self.keys = {key.sha256.lower(): key for key in settings.keys}
        self.allowances = {key.name: Allowance(key.per_minute) for key in settings.keys if key.per_minute}
        self.running: set[Exchange] = set()
        self.draining = False
        self.created = int(time.time())
        self.figures = GatewayFigures(
            in_flight=lambda: len(self.running),
            workers=self.able,
            record_lost=lambda: record.lost if record else 0,
        )
        self.site = Site()
        self.moderation = Moderation(settings.moderation) if settings.moderation else None
        self.arena = Arena(pool, record, self._contestants)

    def able(self) -> int:
        """The number of workers that can answer now."""
        now = time.monotonic()
        return sum(worker.can_answer(now) for worker in self.pool.workers.values())

    # The server ------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers: dict[str, str] = {}
        sent: list[bool] = []  # for each message of the response, whether it is the last one

        async def noted(message: Any) -> None:
            sent.append(message["type"] == "http.response.body" and not message.get("more_body"))
            await send(message)

        try:
            headers = self._cross_origin(scope)
            await self._route(scope, receive, noted, headers)
        except ApiError as error:
            self.figures.refused.labels(error.code or error.kind).inc()
            await _answer_json(send, error.status, error.content(), headers | error.headers)
        except Exception as bug:
            logs.log_bug(logger, bug, "%s %s failed", scope["method"], scope["path"])
            if not sent:
                await _answer_json(send, 500, protocol.internal_error().content(), headers)
            elif not sent[-1]:
                scope.get("fastft.abort", lambda: None)()  # half a response must not look whole

    async def _route(self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str]) -> None:
        method, path = scope["method"], scope["path"]
        if method == "OPTIONS":
            return await _answer(send, 204, b"", headers)
        if path == "/health" and method == "GET":
            return await self._health(send, headers)
        if path == "/admin/workers" and method in ("POST", "DELETE"):
            return await self._admin(scope, receive, send, headers)
        if method == "GET" and (file := self.site.find(path)):
            status, content, more = file.response(scope["headers"])
            return await _answer(send, status, content, headers | more)
        key = self._authorize(scope)
        if path.startswith("/arena/"):
            return await self._arena(scope, receive, send, headers, key)
        if method == "GET" and path == "/about":
            return await _answer_json(send, 200, self._about(), headers)
        if method == "POST" and path in ("/v1/chat/completions", "/v1/completions"):
            return await self._forward(scope, receive, send, headers, key)
        if method == "GET" and path == "/v1/models":
            data = [self._card(name) for name in self._served()]
            return await _answer_json(send, 200, {"object": "list", "data": data}, headers)
        if method == "GET" and path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            self._require(name)
            return await _answer_json(send, 200, self._card(name), headers)
        if method == "GET" and path == "/metrics":
            from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

            return await _answer(
                send, 200, generate_latest(self.figures.registry), headers | {"content-type": CONTENT_TYPE_LATEST}
            )
        raise protocol.route_not_found(method, path)

    # Who may ask -----------------------------------------------------------------------------------------------------

    def _cross_origin(self, scope: Scope) -> dict[str, str]:
        """Response headers for a request from a web page. Raises ApiError for a page of another site that is not allowed."""
        origin = header(scope, b"origin")
        if not origin:
            return {}
        host = urlsplit(f"//{header(scope, b'host')}")
        own = origin == f"{scope['scheme']}://{host.netloc}"
        # A name that somebody has pointed at this machine would otherwise be its own origin (DNS rebinding).
        if own and is_loopback(self.settings.host) and not is_loopback(host.hostname or ""):
            own = False
        if not own and origin not in self.settings.origins:
            message = f"pages from {origin[:200]} may not ask this server; 'origins' in its configuration names those that may"
            raise ApiError(403, message, code="origin_not_allowed", kind="permission_error")
        return {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
            "access-control-allow-headers": "authorization, content-type, x-user-id, x-fastft-conversation, "
            "x-fastft-background",
            "access-control-expose-headers": "x-fastft-model, x-fastft-asked, x-fastft-chosen, x-fastft-why, "
            "x-fastft-event, x-fastft-ignored, retry-after",
            "access-control-max-age": "600",
            "vary": "origin",
        }

    def _authorize(self, scope: Scope) -> ApiKey | None:
        """The key of a request; None if none is asked for. Raises ApiError."""
        if not self.keys:
            return None
        key = self.keys.get(hashlib.sha256(bearer(scope)).hexdigest())
        if key is None:
            raise protocol.invalid_api_key()
        return key

    def _authorize_admin(self, scope: Scope) -> None:
        if self.settings.admin_key is None:
            message = "there is no admin key: start the server with --admin_key_env NAME"
            raise ApiError(403, message, code="no_admin_key", kind="permission_error")
        if not hmac.compare_digest(bearer(scope), self.settings.admin_key.encode()):
            raise protocol.invalid_api_key()

    # What is served --------------------------------------------------------------------------------------------------

    def _served(self) -> list[str]:
        return [*self.virtual, *self.pool.names()]

    def _require(self, name: str) -> None:
        if name not in (served := self._served()):
            raise protocol.model_not_found(name, served)

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "fastft"}

    def _contestants(self) -> list[str]:
        """Names that a battle may draw: all that can answer now, except aliases of others, and experiments, which know users."""
        now = time.monotonic()
        able = [worker.name for worker in self.pool.workers.values() if worker.can_answer(now)]
        choosing = (name for name, policy in self.virtual.items() if policy.kind not in ("fixed", "ab"))
        return list(dict.fromkeys([*able, *choosing]))

    def _about(self) -> dict[str, Any]:
        """Facts about this server for the page."""
        texts = self.record is not None and self.record.texts
        return {
            "version": __version__,
            "models": self._served(),
            "record": "texts" if texts else "hashes" if self.record else None,
            "moderation": self.moderation is not None,
            "arena_closed_because": self.arena.closed_because(),
        }

    async def _health(self, send: Send, headers: dict[str, str]) -> None:
        able = self.able()
        status = "draining" if self.draining else "ok" if able else "no worker"
        content = {"status": status, "workers": able, "in_flight": len(self.running)}
        await _answer_json(send, 200 if status == "ok" else 503, content, headers)

    # Forwarding ------------------------------------------------------------------------------------------------------

    async def _forward(
        self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str], key: ApiKey | None
    ) -> None:
        self._admit(key)
        body = await self._body(scope, receive)
        request = protocol.parse_object(body)
        name = request.get("model")
        if not isinstance(name, str) or not name:
            message = "model must be the name of a model; GET /v1/models lists them"
            raise ApiError(400, message, "model", "invalid_value")
        self._require(name)
        require_shallow(request)
        turn = await self._turn(scope, request, body, name, key.name if key else None)
        await self._exchange(turn, request, scope, receive, send, headers)

    def _admit(self, key: ApiKey | None) -> None:
        """Raises ApiError if no request is accepted now, or none with this key."""
        if self.draining:
            raise protocol.shutting_down()
        if key and (allowance := self.allowances.get(key.name)):
            allowance.take()
        if (requests := len(self.running) + self.deciding) >= self.settings.most_requests:
            raise protocol.queue_full(requests, 2)

    async def _exchange(
        self,
        turn: ServedTurn,
        request: dict[str, Any],
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: dict[str, str],
    ) -> None:
        name, body = turn.asked, turn.body
        headers |= {"x-fastft-asked": _in_header(name), "x-fastft-event": turn.id}
        if turn.policy:
            headers |= {"x-fastft-chosen": _in_header(turn.chosen), "x-fastft-why": _in_header(turn.why)}
        abort = scope.get("fastft.abort", lambda: None)
        if self.moderation:
            await self._moderate(self.moderation, turn, request)

        sent = self._instructed(turn, request)

        def body_for(worker: PoolWorker) -> bytes:
            """The client's own bytes, unless the model has another name there, or is told something first.

            Instructions are for the chosen model alone: one that answers in its place is told nothing.
            """
            told = sent if worker.name == turn.chosen else request
            own = told is request and worker.model == name
            return body if own else orjson.dumps(told | {"model": worker.model})

        exchange = Exchange(turn, body_for, self.pool, send, headers, self.record is not None, abort, self._ended)
        self.running.add(exchange)
        await exchange.run(receive)

    def _instructed(self, turn: ServedTurn, request: dict[str, Any]) -> dict[str, Any]:
        """The request with the instructions of the grimoires on the way to its model. Raises ApiError for a plain completion."""
        for policy in (self.virtual.get(name) for name in (turn.asked, *turn.through)):
            if policy is not None and policy.kind == "grimoire":
                if not isinstance(request.get("messages"), list):
                    message = f"{turn.asked!r} puts instructions before a conversation: ask at /v1/chat/completions"
                    raise ApiError(400, message, code="chat_only")
                dialogue = [each for each in request["messages"] if isinstance(each, dict)]
                request = request | {"messages": policy.instructed(dialogue)}
        return request

    def _ended(self, exchange: Exchange) -> None:
        self.running.discard(exchange)
        self._finish(exchange.turn)

    def _finish(self, turn: ServedTurn) -> None:
        self.figures.ended(turn)
        self.arena.ended(turn)
        if self.record:
            self.record.add(turn)

    async def _moderate(self, moderator: Moderation, turn: ServedTurn, request: dict[str, Any]) -> None:
        """Ask the moderation endpoint. Raises ApiError if the question must not be answered, after recording the turn."""
        turn.moderation = found = await moderator.check(self.pool.fresh, request)
        error = None
        if moderation.has_token_ids(request):
            error = moderation.unreadable()
        elif found.get("flagged"):
            error = moderation.content_flagged(found["categories"])
        elif found.get("unreachable") and moderator.settings.closed:
            error = moderation.moderation_unavailable()
        if error:
            turn.outcome, turn.status = "refused", error.status
            turn.total_s = time.perf_counter() - turn.clock
            self._finish(turn)
            raise error

    # Battles ---------------------------------------------------------------------------------------------------------

    async def _arena(
        self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str], key: ApiKey | None
    ) -> None:
        method, (what, *rest) = scope["method"], scope["path"].removeprefix("/arena/").split("/")
        arena, name = self.arena, key.name if key else None
        if (method, what, rest) == ("GET", "leaderboard", []):
            return await _answer_json(send, 200, await arena.leaderboard(), headers)
        if (method, what, rest) == ("POST", "battles", []):
            request = protocol.parse_object(await self._body(scope, receive))
            return await _answer_json(send, 200, arena.start(request, self._served()), headers)
        if what == "battles" and len(rest) == 2:
            battle = arena.find(rest[0])
            if method == "POST" and rest[1] in battle.sides:
                self._admit(key)
                return await self._battle_answer(battle, rest[1], scope, receive, send, headers, name)
            if method == "POST" and rest[1] == "vote":
                request = protocol.parse_object(await self._body(scope, receive))
                return await _answer_json(send, 200, await arena.vote(battle, request.get("winner"), name), headers)
            if method == "DELETE" and rest[1] == "vote":
                return await _answer_json(send, 200, await arena.withdraw(battle, name), headers)
        raise protocol.route_not_found(method, scope["path"])

    async def _battle_answer(
        self,
        battle: Battle,
        name: str,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: dict[str, str],
        key: str | None,
    ) -> None:
        """Answer for one side of a battle: an ordinary chat request into which the gateway puts the model's name."""
        request = protocol.parse_object(await self._body(scope, receive))
        require_shallow(request)
        model = battle.sides[name].model
        self._require(model)
        request |= {"model": model, "stream": True, "n": 1}
        # A policy draws by the conversation, which each side of each battle has of its own.
        conversation = (CONVERSATION_HEADERS[0].encode(), f"battle-{battle.id}-{name}".encode())
        scope = {**scope, "path": "/v1/chat/completions", "headers": [conversation, *scope["headers"]]}
        turn = await self._turn(scope, request, orjson.dumps(request), model, key, battle=True)
        turn.battle = self.arena.begin_answer(battle, name, request)
        # Errors are answered here, through `hidden`, because the caller would answer them with the model's name.
        hidden = HiddenAnswer(send) if battle.anonymous else send
        try:
            await self._exchange(turn, request, scope, receive, hidden, headers)
        except ApiError as error:
            await _answer_json(hidden, error.status, error.content(), headers | error.headers)
        finally:
            self.arena.release(battle, name)

    async def _turn(
        self, scope: Scope, request: dict[str, Any], body: bytes, name: str, key: str | None, battle: bool = False
    ) -> ServedTurn:
        """The turn that a request asks for, with the model that is to answer it."""
        at, clock = time.time(), time.perf_counter()
        messages = request.get("messages")
        messages = messages if isinstance(messages, list) else []
        number = sum(1 for each in messages if isinstance(each, dict) and each.get("role") == "user")
        conversation, source = conversation_id(scope, messages, key)
        # What no person wrote, or is written in a battle, exposes nobody to an experiment.
        user = None if battle or source == "background" else user_of(scope, request)
        found = Resolved(Choice(name, {name: 1.0}, "asked by name"))
        if policy := self.virtual.get(name):
            read = (
                as_messages(messages, request.get("prompt")) if name in self.routes or name in self.instructing else []
            )
            asked = Asked(Conversation(conversation or "", read), number, user, at, self.pool.names())
            found = await self._found(name, asked)
        choice = found.choice
        return ServedTurn(
            path=scope["path"],
            asked=name,
            body=body,
            streamed=request.get("stream") is True,
            key=key,
            conversation=conversation,
            conversation_from="battle" if battle else source,
            turn=number,
            policy=policy.kind if policy else None,
            chosen=choice.model,
            probabilities=choice.probabilities,
            why=choice.why,
            next=choice.next,
            through=found.through,
            scores=choice.scores,
            decision_s=time.perf_counter() - clock if policy else None,
            assignment=found.assignment,
            unit=self._unit(user) if found.assignment else None,
            at=at,
            clock=clock,
        )

    async def _found(self, name: str, asked: Asked) -> Resolved:
        """The model that a virtual model stands for."""
        if all(route.is_quick(asked.conversation) for route in self.routes.get(name, ())):
            return self.virtual.resolve(name, asked)
        self.deciding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, self.virtual.resolve, name, asked)
        finally:
            self.deciding -= 1

    def _unit(self, user: str | None) -> str | None:
        """What stands for a user in the record."""
        if user is None or self.settings.unit_key is None:
            return None
        content = user.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(content, key=self.settings.unit_key, digest_size=16).hexdigest()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The body of a request. Raises ApiError if it is too large or too slow."""
        limit = self.settings.largest_body
        if (length := header(scope, b"content-length")) and int(length) > limit:
            raise protocol.body_too_large(limit)
        late: list[bool] = []
        # Not asyncio.wait_for, which makes a task: most bodies have arrived already.
        timer = asyncio.get_running_loop().call_later(self.settings.upload_s, _interrupt, asyncio.current_task(), late)
        body, more = b"", True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client left before its request was whole", code="client_left")
                body, more = body + message["body"], message["more_body"]
                if len(body) > limit:
                    raise protocol.body_too_large(limit)
        except asyncio.CancelledError:
            if not late:
                raise
            message = f"the request's body did not arrive within {self.settings.upload_s:g} s"
            raise ApiError(408, message, code="slow_upload") from None
        finally:
            timer.cancel()
        return body

    # Time limits -----------------------------------------------------------------------------------------------------

    async def watch_forever(self) -> None:
        """Drop clients that do not read, and keep waiting streams alive. One task does this for all exchanges."""
        settings, comments = self.settings, set()
        while True:
            await asyncio.sleep(min(1.0, settings.comment_s / 4, settings.slow_client_s / 4))
            now = time.monotonic()
            for exchange in list(self.running):
                silent = now - exchange.last_sent
                if exchange.sending and silent > settings.slow_client_s:
                    logger.warning("a client read nothing for %g s; its answer is given up", settings.slow_client_s)
                    exchange.cancel("slow_client")
                elif exchange.turn.streamed and not exchange.answering and silent > settings.comment_s:
                    waiting = asyncio.create_task(exchange.comment())
                    comments.add(waiting)
                    waiting.add_done_callback(comments.discard)

    async def drain(self, grace_s: float) -> None:
        """Accept no more requests; return when all running ones have ended.

        Those that exceed the grace time end with an error.
        """
        self.draining = True
        deadline = time.monotonic() + grace_s
        while (self.running or self.deciding) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for exchange in list(self.running):
            exchange.cancel("shut_down")
        for _ in range(20):
            if self.running:
                await asyncio.sleep(0.05)

    # Workers that come and go ----------------------------------------------------------------------------------------

    async def _admin(self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str]) -> None:
        self._authorize_admin(scope)
        request = protocol.parse_object(await self._body(scope, receive))
        url, model = _entry_of(request)
        if scope["method"] == "DELETE":
            gone = self.pool.remove(url, model or None)
            if not gone:
                raise ApiError(404, f"no worker {request['url']!r} is here", "url", "worker_not_found")
            return await _answer_json(send, 200, {"removed": [f"{w.url}#{w.model}" for w in gone]}, headers)
        worker = PoolWorker(url, model, self._name_for(request, model), self._key_for(request))
        if lease := request.get("lease_s"):
            if not isinstance(lease, (int, float)) or isinstance(lease, bool) or not 1 <= lease <= 86400:
                raise ApiError(400, "lease_s must be a number from 1 to 86400", "lease_s", "invalid_value")
            worker.lease_until = time.monotonic() + lease
        if (url, model) not in self.pool.workers:
            await self._require_answer(worker)
        self.pool.add(worker)
        await _answer_json(send, 200, {"worker": f"{url}#{model}", "name": worker.name, "lease_s": lease}, headers)

    def _name_for(self, request: dict[str, Any], model: str) -> str:
        name = request.get("name") or model
        if not isinstance(name, str) or not name:
            raise ApiError(400, "url must be URL#MODEL, or name the model's name", "url", "invalid_value")
        if name in self.virtual:
            raise ApiError(400, f"{name!r} is a virtual model here; choose another name", "name", "invalid_value")
        return name

    def _key_for(self, request: dict[str, Any]) -> str | None:
        """The key for a new worker, from a variable that the configuration lists. No other variable can be read out."""
        variable = request.get("key_env")
        if variable is None:
            return None
        if variable not in self.settings.key_envs:
            raise ApiError(400, "key_env must be one that the configuration names", "key_env", "invalid_value")
        return os.environ[variable]

    async def _require_answer(self, worker: PoolWorker) -> None:
        models = await self.pool.models_at(worker)
        if models is None:
            message = f"{worker.url} does not answer GET /models as OpenAI's API does"
            raise ApiError(400, message, "url", "worker_unreachable")
        if worker.model not in models:
            message = f"{worker.url} does not serve {worker.model!r}; it serves: {', '.join(models)}"
            raise ApiError(400, message, "url", "worker_has_no_such_model")


# Small things --------------------------------------------------------------------------------------------------------------


def _interrupt(task: asyncio.Task, late: list[bool]) -> None:
    late.append(True)
    task.cancel()


def _in_header(text: str) -> str:
    return text if text.isascii() and text.isprintable() else text.encode("ascii", "backslashreplace").decode()


def _entry_of(request: dict[str, Any]) -> tuple[str, str]:
    """(base URL, model) of {"url": "URL#MODEL"}. Raises ApiError."""
    entry = request.get("url")
    if not isinstance(entry, str) or not parse_http(entry):
        raise ApiError(400, "url must be http(s)://HOST:PORT/v1#MODEL", "url", "invalid_value")
    url, _, model = entry.partition("#")
    return url.rstrip("/"), model


async def _answer_json(send: Send, status: int, content: Any, headers: dict[str, str]) -> None:
    await _answer(send, status, orjson.dumps(content), headers | {"content-type": "application/json"})


async def _answer(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    headers = headers | ({} if status in (204, 304) else {"content-length": str(len(body))})
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})
