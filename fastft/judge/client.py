"""Many requests to OpenAI-compatible endpoints: concurrent, within limits, retried, never paid twice, never over budget.

    client = Client("https://api.openai.com/v1#gpt-4.1", cache=Cache(Path("judged/cache.jsonl")), limits=Limits(rpm=500))
    reply = await client.ask([{"role": "user", "content": "…"}], temperature=0)

The key comes from OPENAI_API_KEY and is written nowhere. Retries are the openai client's (connections, time-outs, 408, 409, 429
with Retry-After, 5xx; exponential backoff); answers that are no JSON or have no choice are asked for again here. What an
endpoint says it does not know (`response_format`, `temperature`, `max_tokens`) is left out from then on.
"""

import asyncio
import hashlib
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

KEY = "OPENAI_API_KEY"
BYTES_PER_TOKEN = 4  # before the endpoint has counted: English text has four to five, other scripts fewer
MALFORMED_TRIES = 3
IN_A_ROW = 8  # requests that fail for good, one after the other: the endpoint is down
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


class OverBudget(Exception):
    """The next request could cost more than what is left."""


def split_address(address: str) -> tuple[str, str]:
    """URL#name -> (URL, name). Raises ValueError."""
    url, _, name = address.partition("#")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not name:
        raise ValueError(f"{_without_user(address)}: must be URL#name, as in https://api.openai.com/v1#gpt-4.1")
    if parts.username or parts.password:
        raise ValueError(f"{_without_user(address)}: a key does not belong into an address; put it into {KEY}")
    return url.rstrip("/"), name


def _without_user(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//", address)


class Money:
    """Dollars spent, and the limit. Prices are dollars per million tokens, (prompt, completion)."""

    def __init__(self, limit: float | None = None):
        self.limit, self.spent, self._reserved = limit, 0.0, 0.0

    def reserve(self, usd: float) -> None:
        if self.limit is not None and self.spent + self._reserved + usd > self.limit:
            raise OverBudget
        self._reserved += usd

    def settle(self, reserved: float, usd: float) -> None:
        self._reserved -= reserved
        self.spent += usd


class Cache:
    """Replies by the exact request, in a file that is only ever appended to: a killed run has lost no reply that it had."""

    def __init__(self, path: Path):
        self.path, self.replies = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines():
            try:
                row = json.loads(line)
                self.replies[row["key"]] = Reply(**row["reply"])
            except (ValueError, TypeError, KeyError):
                continue  # the line during which a run was killed
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        if content and not content.endswith(b"\n"):
            self.file.write(b"\n")

    def get(self, key: str) -> Reply | None:
        reply = self.replies.get(key)
        return replace(reply, cached=True) if reply else None

    def put(self, key: str, reply: Reply) -> None:
        self.replies[key] = reply
        self.file.write((json.dumps({"key": key, "reply": asdict(reply)}, ensure_ascii=False) + "\n").encode())


class Client:
    """One model behind one URL. Raises ValueError, in one line without the key, when nothing there will ever work."""

    def __init__(
        self,
        address: str,
        limits: Limits = USUAL_LIMITS,
        cache: Cache | None = None,
        price: tuple[float, float] = (0.0, 0.0),
        money: Money | None = None,
    ):
        from openai import AsyncOpenAI

        self.url, self.name = split_address(address)
        self.limits, self.cache, self.price, self.money = limits, cache, price, money or Money()
        key = os.environ.get(KEY) or "none"
        self.api = AsyncOpenAI(base_url=self.url, api_key=key, max_retries=limits.retries, timeout=limits.timeout_s)
        self.unknown: set[str] = set()  # parameters that the endpoint has refused
        self.slots, self.next_at = asyncio.Semaphore(limits.concurrency), 0.0
        self.answered = self.failed_in_a_row = 0
        self.connected: asyncio.Task | None = None

    async def ask(self, messages: list[dict[str, str]], attempt: int = 0, **parameters: Any) -> Reply:
        """A reply to `messages`. The same `attempt` at the same request is paid for once.

        Raises Unanswered where this request failed for good, OverBudget, and ValueError where all would.
        """
        request = {"url": self.url, "model": self.name, "messages": messages, "attempt": attempt, **parameters}
        key = hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
        if self.cache and (reply := self.cache.get(key)):
            return reply
        prompt = estimate_tokens(messages)
        most = parameters.get("max_tokens", 1024)
        if not self.connected:
            self.connected = asyncio.ensure_future(self._connect())
        await self.connected
        async with self.slots:
            reserved = self.usd(prompt, most)
            self.money.reserve(reserved)
            reply = None
            try:
                await self._wait_for_limits(prompt + most)
                reply = await self._send(messages, parameters)
            finally:
                self.money.settle(reserved, self.usd(reply.prompt_tokens, reply.completion_tokens) if reply else 0.0)
        if self.cache:
            self.cache.put(key, reply)
        return reply

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
            raise ValueError(f"{self.url}: cannot be reached ({self._said(error)})") from None

    async def _wait_for_limits(self, tokens: int) -> None:
        """Requests begin as far apart as both limits ask for."""
        gap = max(
            60 / self.limits.rpm if self.limits.rpm else 0, 60 * tokens / self.limits.tpm if self.limits.tpm else 0
        )
        now = time.monotonic()
        begin, self.next_at = max(now, self.next_at), max(now, self.next_at) + gap
        await asyncio.sleep(begin - now)

    async def _send(self, messages: list[dict[str, str]], parameters: dict[str, Any]) -> Reply:
        import openai

        began, tries = time.monotonic(), 0
        while True:
            try:
                completion = await self.api.chat.completions.create(
                    model=self.name, messages=messages, **self._known(parameters)
                )
                choice = completion.choices[0]
                usage = completion.usage
                text = choice.message.content or getattr(choice.message, "refusal", None) or ""
                self.answered, self.failed_in_a_row = self.answered + 1, 0
                return Reply(
                    text,
                    choice.finish_reason,
                    usage.prompt_tokens if usage else estimate_tokens(messages),
                    usage.completion_tokens if usage else len(text.encode()) // BYTES_PER_TOKEN + 1,
                    time.monotonic() - began,
                )
            except openai.BadRequestError as error:
                if not self._leave_out(str(error), parameters):
                    raise self._failure(error) from None
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                what = f"the key in {KEY} was refused" if error.status_code in (401, 403) else f"has no {self.name}"
                raise ValueError(f"{self.url}: {what} ({error.status_code})") from None
            except openai.APIConnectionError as error:
                if not self.answered:
                    raise ValueError(f"{self.url}: cannot be reached ({self._said(error)})") from None
                raise self._failure(error) from None
            except openai.APIStatusError as error:
                raise self._failure(error) from None
            except (openai.APIError, ValueError, AttributeError, TypeError, IndexError) as error:  # 200, and nonsense
                tries += 1
                if tries == MALFORMED_TRIES:
                    raise self._failure(error) from None

    def _known(self, parameters: dict[str, Any]) -> dict[str, Any]:
        known = {key: value for key, value in parameters.items() if key not in self.unknown}
        if "max_tokens" in self.unknown and "max_tokens" in parameters:
            known["max_completion_tokens"] = parameters["max_tokens"]  # what newer models of OpenAI call it
        return known

    def _leave_out(self, said: str, parameters: dict[str, Any]) -> bool:
        """Did the endpoint refuse a parameter that can be done without? It is left out from now on."""
        marks = {
            "response_format": ("response_format", "json_schema", "schema", "structured"),
            "max_tokens": ("max_tokens",),
        }
        for name in parameters:
            if any(mark in said for mark in marks.get(name, (name,))):
                new = name not in self.unknown
                self.unknown.add(name)
                if new:
                    return True
        return False

    def _failure(self, error: Exception) -> Exception:
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= IN_A_ROW:
            return ValueError(f"{self.url}: {IN_A_ROW} requests in a row failed for good ({self._said(error)})")
        return Unanswered(self._said(error))

    def _said(self, error: Exception) -> str:
        """The error in one line, without the key."""
        said = " ".join(str(error).split())[:200] or type(error).__name__
        said = said.replace(self.api.api_key, "***") if len(self.api.api_key) > 4 else said
        return re.sub(r"\bsk-[\w-]+", "***", said)


def estimate_tokens(messages: Iterable[dict[str, str]]) -> int:
    """Before an endpoint has counted: a quarter of the bytes."""
    return sum(len(message["content"].encode()) for message in messages) // BYTES_PER_TOKEN + 1


def run_all(
    works: list[Callable[[], Awaitable[Result]]], what: str, money: Money, done: Callable[[int, Result], None]
) -> str | None:
    """Run all, with a progress bar; `done(index, result)` hears of each as it ends. Returns why it stopped early, or None.

    Raises ValueError where an endpoint will never work.
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

        over = False

        async def one(index: int, work: Callable[[], Awaitable[Result]]) -> None:
            nonlocal over
            try:
                done(index, await work())
            except OverBudget:  # what is on its way is paid for: the others end on their own
                over = True
            bar.update(task, advance=1, usd=f"${money.spent:.2f}" if money.spent else "")

        async def everything() -> str | None:
            tasks = [asyncio.ensure_future(one(index, work)) for index, work in enumerate(works)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for each in tasks:
                    each.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return f"stopped before ${money.limit:.2f} would be exceeded; spent ${money.spent:.2f}" if over else None

        return asyncio.run(everything())
