"""Many requests to OpenAI-compatible endpoints: concurrent, within limits, retried, never paid twice, never over budget.

    client = Client("https://api.openai.com/v1#gpt-4.1", cache=Cache(Path("judged/cache.jsonl")), limits=Limits(rpm=500))
    reply = await client.ask([{"role": "user", "content": "…"}], temperature=0)

A key goes to one endpoint only (see `key_for`) and is written nowhere. Connections, time-outs, 408, 409, 429 (whose
Retry-After holds back every request), 5xx, replies that are no JSON or have no choice are tried again with growing waits, each
try within the limits and the budget. What an endpoint says it does not know (`response_format`, `temperature`, `max_tokens`) is
left out from then on. A refused key, an unknown model, an account without money and an endpoint that is not there end the run;
any other failure is one request's.
"""

import asyncio
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from fastft.common.records import parse_json, repair_text
from fastft.errors import UserError
from fastft.inference.budget import Money, OverBudget

KEY = "OPENAI_API_KEY"
OPENAI = "https://api.openai.com/v1"
BYTES_PER_TOKEN = 4  # before the endpoint has counted: English text has four to five, other scripts fewer
PAID_TRIES = 3  # of time-outs, cut and malformed replies: the endpoint may bill each of them
IN_A_ROW = 8  # requests that fail for good, one after the other: the endpoint is down
LONGEST_BACKOFF_S = 8.0
LONGEST_PAUSE_S = 300.0  # what a Retry-After can ask for: some endpoints name the end of the day
NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached")  # codes of a 429 that no waiting ends
# A 400 that is about the prompt's length names parameters that are well known; 403 is also how some refuse a single prompt.
_ABOUT_LENGTH = re.compile(r"context|too (?:large|long|many)|reduce the length|input tokens", re.IGNORECASE)
_UNKNOWN = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|instead", re.IGNORECASE
)
_MODERATED = re.compile(r"flagged|moderat|content.?(?:filter|policy)|safety", re.IGNORECASE)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reply:
    """`cached`: it was paid for by an earlier run."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    cached: bool = False


@dataclass(frozen=True)
class Limits:
    """What an endpoint allows, and our patience with it. `rpm`, `tpm`: requests and tokens a minute, 0: as many as it takes."""

    concurrency: int = 16
    rpm: float = 0
    tpm: float = 0
    retries: int = 8
    timeout_s: float = 120.0


USUAL_LIMITS = Limits()


class Unanswered(Exception):
    """One request failed for good; the others may go on."""


class Malformed(Exception):
    """Status 200 with a body that is no completion; `foreign`: it is not even JSON, so no model has written it."""

    def __init__(self, said: str, foreign: bool = False):
        super().__init__(said)
        self.foreign = foreign


class ErrorInBody(Exception):
    """Status 200 with an error for a body, as gateways send for the endpoints that they pass requests on to."""

    def __init__(self, error: dict[str, Any]):
        code = error.get("code")
        super().__init__(f"Error code: {code} - {error.get('message') or error}")
        self.status_code = int(code) if str(code).isdigit() else 502
        self.body, self.param = error, error.get("param")


def split_address(address: str) -> tuple[str, str]:
    """URL#name -> (URL, name). Raises UserError."""
    url, _, name = address.partition("#")
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and name and parts.port != 0
    except ValueError:  # a port that is no number
        whole = False
    if not whole:
        raise UserError(f"{_without_user(address)}: must be URL#name, as in https://api.openai.com/v1#gpt-4.1")
    if parts.username or parts.password:
        raise UserError(f"{_without_user(address)}: a key does not belong into an address; put it into {KEY}")
    return url.rstrip("/"), name


def _without_user(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//", address)


class Cache:
    """Replies by the exact request, in a file that is only ever appended to: a killed run has lost no reply that it had."""

    def __init__(self, path: Path):
        self.path, self.replies, self.file = path, {}, None
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines():
            try:
                row = json.loads(line)
                reply = Reply(**row["reply"])
                self.replies[row["key"]] = replace(reply, text=text_of(reply.text))
            except (ValueError, TypeError, KeyError, Malformed):
                continue  # the line during which a run was killed
        self.torn = bool(content) and not content.endswith(b"\n")

    def get(self, key: str) -> Reply | None:
        reply = self.replies.get(key)
        return replace(reply, cached=True) if reply else None

    def put(self, key: str, reply: Reply) -> None:
        self.replies[key] = reply
        if not self.file:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
            self.file.write(b"\n" * self.torn)
        self.file.write((json.dumps({"key": key, "reply": asdict(reply)}, ensure_ascii=False) + "\n").encode())


class Client:
    """One model behind one URL. Raises UserError, in one line without the key, when nothing there will ever work."""

    def __init__(
        self,
        address: str,
        limits: Limits = USUAL_LIMITS,
        cache: Cache | None = None,
        price: tuple[float, float] = (0.0, 0.0),
        money: Money | None = None,
        key_env: str = "",
    ):
        """`key_env` names the variable with the key; without, see `key_for`."""
        from openai import AsyncOpenAI

        self.url, self.name = split_address(address)
        self.label = self.name  # what tables call it
        self.limits, self.cache, self.price, self.money = limits, cache, price, money or Money()
        self.key_env, key = key_env or KEY, key_for(self.url, key_env)
        self.secret = key
        self.api = AsyncOpenAI(base_url=self.url, api_key=key or "none", max_retries=0, timeout=limits.timeout_s)
        self.unknown: set[str] = set()  # parameters that the endpoint has refused
        self.slots, self.gate, self.next_at = asyncio.Semaphore(limits.concurrency), asyncio.Lock(), 0.0
        self.failed_in_a_row = 0
        self.connected: asyncio.Task | None = None

    async def ask(self, messages: list[dict[str, str]], attempt: int = 0, **parameters: Any) -> Reply:
        """A reply to `messages`. The same `attempt` at the same request is paid for once.

        Raises Unanswered where this request failed for good, OverBudget, and ValueError where all would.
        """
        messages = [{**message, "content": repair_text(message["content"])} for message in messages]
        key = self.key(messages, attempt, parameters)
        if self.cache and (reply := self.cache.get(key)):
            return reply
        if not self.connected:
            self.connected = asyncio.ensure_future(self._connect())
        await self.connected
        async with self.slots:
            reply = await self._until_answered(messages, parameters)
        if self.cache:
            self.cache.put(key, reply)
        return reply

    def key(self, messages: list[dict[str, str]], attempt: int, parameters: dict[str, Any]) -> str:
        """What the cache knows this request by."""
        request = {"url": self.url, "model": self.name, "messages": messages, "attempt": attempt, **parameters}
        return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (self.price[0] * prompt_tokens + self.price[1] * completion_tokens) / 1e6

    async def _connect(self) -> None:
        """Is anybody there? Without asking first, a wrong port is known after 35 s of retries only."""
        parts = urlsplit(self.url)
        if getproxies().get(parts.scheme) and not proxy_bypass(parts.hostname):
            return
        try:
            connection = asyncio.open_connection(parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme])
            _, writer = await asyncio.wait_for(connection, 10)
            writer.close()
        except (OSError, asyncio.TimeoutError) as error:
            raise UserError(f"{self.url}: cannot be reached ({self._said(error)})") from None

    async def _wait_for_limits(self, tokens: int) -> None:
        """Requests begin as far apart as both limits ask for; whoever waits holds back those behind."""
        rpm, tpm = self.limits.rpm, self.limits.tpm
        async with self.gate:
            while (left := self.next_at - time.monotonic()) > 0:  # a 429 may have moved it meanwhile
                await asyncio.sleep(left)
            self.next_at = time.monotonic() + max(60 / rpm if rpm else 0, 60 * tokens / tpm if tpm else 0)

    async def _until_answered(self, messages: list[dict[str, str]], parameters: dict[str, Any]) -> Reply:
        """Try, and try again where that may help. Raises as `ask` does."""
        import openai

        began, failures, paid_failures = time.monotonic(), 0, 0
        while True:
            sent = self._known(parameters)
            try:
                reply = await self._send(messages, sent)
                self.failed_in_a_row = 0
                return replace(reply, seconds=time.monotonic() - began)
            except (openai.APIStatusError, ErrorInBody) as error:
                last = error
                if error.status_code in (400, 422) and self._leave_out(f"{error} {error.param}", parameters, sent):
                    continue
                self._end_the_run_at(error)
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    raise Unanswered(self._said(error)) from None
            except (openai.APIError, Malformed) as error:
                last = error
            failures, paid_failures = failures + 1, paid_failures + _may_be_billed(last)
            if failures > self.limits.retries or paid_failures == PAID_TRIES:
                raise self._failure(last) from None
            await self._back_off(last, failures)

    def _end_the_run_at(self, error: Any) -> None:
        """Raises UserError for what the endpoint will say to every request: to this key, of this model, without money."""
        status, body = error.status_code, error.body if isinstance(error.body, dict) else {}
        if status == 401 or (status == 403 and not _MODERATED.search(str(error))):
            name_it = f"name its variable with --judge_key_env or --model_key_env; {KEY} goes to OpenAI alone"
            what = f"the key in {self.key_env} was refused" if self.secret else f"wants a key ({name_it})"
            raise UserError(f"{self.url}: {what} ({status})") from None
        if status == 404:
            raise UserError(f"{self.url}: has no {self.name} (404)") from None
        if status == 402 or body.get("code") in NO_MONEY or body.get("type") in NO_MONEY:
            raise UserError(f"{self.url}: the account has no money left ({self._said(error)})") from None

    async def _send(self, messages: list[dict[str, str]], sent: dict[str, Any]) -> Reply:
        """One try, within the limits; what it may have cost without a usable reply is booked as spent."""
        most = sent.get("max_tokens", sent.get("max_completion_tokens", 1024))
        await self._wait_for_limits(estimate_tokens(messages) + most)
        reserved = spent = self.usd(most_tokens(messages, sent), most)
        await self.money.reserve(reserved)
        try:
            # Raw: what is no completion is told apart here, not by whichever attribute of it is missing.
            response = await self.api.chat.completions.with_raw_response.create(
                model=self.name, messages=messages, extra_headers=self._headers(), **sent
            )
            text, finish_reason, usage = read_completion(response.content)
            prompt_tokens = usage[0] if usage else estimate_tokens(messages)
            completion_tokens = usage[1] if usage else len(text.encode()) // BYTES_PER_TOKEN + 1
            spent = self.usd(prompt_tokens, completion_tokens) if usage else reserved
            return Reply(text, finish_reason, prompt_tokens, completion_tokens, 0.0)
        except Exception as error:
            spent = reserved if _may_be_billed(error) else 0.0
            raise
        finally:
            self.money.settle(reserved, spent)

    def _headers(self) -> dict[str, Any]:
        """The key; and nothing else that the environment holds for OpenAI goes to others: its client sends that to any URL."""
        from openai import Omit

        own = [line.partition(":")[0].strip() for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()]
        names = [] if _is_openai(self.url) else ["OpenAI-Organization", "OpenAI-Project", *filter(None, own)]
        return {**{name: Omit() for name in names}, "Authorization": f"Bearer {self.secret}" if self.secret else Omit()}

    async def _back_off(self, error: Exception, failures: int) -> None:
        """Half a second, doubled each time; or what the endpoint asks for, which then holds for every request."""
        response = getattr(error, "response", None)
        try:
            asked = float(response.headers.get("retry-after", "")) if response is not None else 0.0
        except ValueError:  # none, or a date
            asked = 0.0
        if asked > 0:
            self.next_at = max(self.next_at, time.monotonic() + min(asked, LONGEST_PAUSE_S))
        else:
            await asyncio.sleep(min(0.5 * 2 ** (failures - 1), LONGEST_BACKOFF_S) * random.uniform(0.75, 1))

    def _known(self, parameters: dict[str, Any]) -> dict[str, Any]:
        known = {key: value for key, value in parameters.items() if key not in self.unknown}
        if "max_tokens" in self.unknown and "max_tokens" in parameters:
            known["max_completion_tokens"] = parameters["max_tokens"]  # what newer models of OpenAI call it
        return known

    def _leave_out(self, said: str, parameters: dict[str, Any], sent: dict[str, Any]) -> bool:
        """Did the endpoint refuse a parameter, sent to it, that can be done without? It is left out from now on.

        Not so a limit of length where it says that prompt and reply are too long together: then replies had no limit at all.
        """
        if _ABOUT_LENGTH.search(said):
            return False
        marks = {"response_format": ("response_format", "json_schema", "schema", "structured")}
        for name in parameters:
            named = name in sent and any(mark in said for mark in marks.get(name, (name,)))
            if named and (name != "max_tokens" or _UNKNOWN.search(said)):
                self.unknown.add(name)  # others on their way with it are refused the same: each tries again without
                return True
        return False

    def _failure(self, error: Exception) -> Exception:
        """What tells that an endpoint is down is counted; a time-out or a malformed reply may be this one prompt's."""
        if not _may_be_billed(error) or getattr(error, "foreign", False):
            self.failed_in_a_row += 1
        if self.failed_in_a_row >= IN_A_ROW:
            return UserError(f"{self.url}: {IN_A_ROW} requests in a row failed for good ({self._said(error)})")
        return Unanswered(self._said(error))

    def _said(self, error: Exception) -> str:
        """The error in one line, without the key."""
        said = repair_text(" ".join(str(error).split())) or type(error).__name__
        said = said.replace(self.secret, "***") if len(self.secret) > 4 else said
        return re.sub(r"\bsk-[\w-]+", "***", said)[:200]


def key_for(url: str, key_env: str = "") -> str:
    """The key for the endpoint at `url`: that in the variable `key_env`, or OPENAI_API_KEY's where `url` is OpenAI's own (or lies
    where OPENAI_BASE_URL points to), else none. A key that was made for one host is no other host's business.

    Raises UserError for a variable that is not set, and for what cannot be a key.
    """
    if not key_env and not _is_openai(url):
        return ""
    name = key_env or KEY
    key = os.environ.get(name, "").strip()
    if key_env and not key:
        raise UserError(f"{name} is not set: it is to hold the key for {url}")
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise UserError(f"{name} holds a character that no key has (a space, a letter with an accent …)")
    return key


def _is_openai(url: str) -> bool:
    return _origin(url) in (_origin(OPENAI), _origin(os.environ.get("OPENAI_BASE_URL", "")))


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what browsers, too, take for one place."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def read_completion(body: bytes) -> tuple[str, str | None, tuple[int, int] | None]:
    """(text, why it ended, (prompt, completion) tokens) of a chat completion; a text that can be written to any file.

    Raises ErrorInBody for an error that was sent with status 200, Malformed for what is neither.
    """
    try:
        completion = parse_json(body)
    except ValueError:
        start = " ".join(body[:200].decode(errors="replace").split())[:60]
        raise Malformed(f"the reply is no JSON but {start!r}: is the URL right (most end in /v1)?", True) from None
    completion = completion if isinstance(completion, dict) else {}
    choices = completion.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    for error in (completion.get("error"), choice.get("error")):
        if error:
            raise ErrorInBody(error if isinstance(error, dict) else {"message": str(error)})
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Malformed("the reply has no choice with a message")
    reason, usage = choice.get("finish_reason"), completion.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    counted = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
    text = text_of(message.get("content")) or text_of(message.get("refusal"))
    return text, reason if isinstance(reason, str) else None, tuple(counts) if counted else None


def text_of(content: Any) -> str:
    """What a message says. Of a list of parts, those of text, joined: what a model thought is another kind. Raises Malformed."""
    if isinstance(content, list):
        content = "".join(_text_of_part(part) for part in content)
    if content is not None and not isinstance(content, str):
        raise Malformed(f"the reply's content is a {type(content).__name__}")
    return repair_text(content or "")


def _text_of_part(part: Any) -> str:
    if isinstance(part, dict):
        part = part.get("text") if part.get("type", "text") in ("text", "output_text") else ""
    return part if isinstance(part, str) else ""


def _may_be_billed(error: Exception) -> bool:
    """Has the endpoint perhaps worked for this failure? Not where it said no, or was never reached."""
    import openai

    if isinstance(error, (openai.APIStatusError, ErrorInBody)):
        return False
    # By name: they are httpx's or httpx2's, by the age of openai.
    return type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout")


def estimate_tokens(messages: Iterable[dict[str, str]]) -> int:
    """Before an endpoint has counted: a quarter of the bytes."""
    return sum(len(message["content"].encode()) for message in messages) // BYTES_PER_TOKEN + 1


def most_tokens(messages: list[dict[str, str]], sent: dict[str, Any]) -> int:
    """No tokenizer that works on bytes makes more of a prompt than it has bytes; JSON's own stand for the chat template."""
    return len(json.dumps([messages, sent.get("response_format")], ensure_ascii=False).encode())


def tell_apart(clients: list[Client]) -> None:
    """Judges of the same name are called name@host/path in tables. Raises UserError where two are the same."""
    if len({(client.url, client.name) for client in clients}) < len(clients):
        raise UserError("the same --judge is given twice")
    names = [client.name for client in clients]
    for client in clients:
        if names.count(client.name) > 1:
            client.label = f"{client.name}@{client.url.partition('//')[2]}"


def run_all(
    works: list[Callable[[], Awaitable[Result]]], what: str, money: Money, done: Callable[[int, Result], None]
) -> str | None:
    """Run all, with a progress bar; `done(index, result)` hears of each as it ends. Returns why it stopped early, or None:
    for want of money, or because an endpoint will never work. What is on its way then is paid for and ends on its own.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[usd]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=len(works), usd="")

        stopped = None

        async def one(index: int, work: Callable[[], Awaitable[Result]]) -> None:
            nonlocal stopped
            try:
                done(index, await work())
            except OverBudget:
                stopped = stopped or f"stopped before ${money.limit:.2f} would be exceeded"
            except UserError as error:
                stopped, money.closed = stopped or str(error), True
            bar.update(task, advance=1, usd=f"${money.spent:.2f}" if money.spent else "")

        async def everything() -> str | None:
            tasks = [asyncio.ensure_future(one(index, work)) for index, work in enumerate(works)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for each in tasks:
                    each.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return f"{stopped}; spent ${money.spent:.2f}" if stopped and money.spent else stopped

        return asyncio.run(everything())
