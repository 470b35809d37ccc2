"""Send many requests to OpenAI-compatible endpoints, within limits and a budget, with retries, paying for none twice.

    client = Client("https://api.openai.com/v1#gpt-4.1", cache=Cache(Path("judged/cache.jsonl")), limits=Limits(rpm=500))
    reply = await client.ask([{"role": "user", "content": "…"}], temperature=0)

Connection errors, time-outs, 408, 409, 429 (whose Retry-After holds back every request), 5xx, and replies that are not JSON or
have no choice are tried again after growing waits, each try within the limits and the budget. A parameter that the endpoint says
it does not know (`response_format`, `temperature`, `max_tokens`) is left out from then on. A refused key, an unknown model, an
account without money and an endpoint that is not there end the run; any other failure concerns one request alone.
"""

import asyncio
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from fastft.common.records import repair_text
from fastft.errors import UserError, is_ours
from fastft.inference.budget import FREE, Cache, Money, OverBudget, Price
from fastft.inference.completion import ErrorInBody, Malformed, Reply, read_completion
from fastft.inference.endpoint import KEY, USUAL_LIMITS, Limits, is_openai, key_for, key_variables, split_address

BYTES_PER_TOKEN = 4  # before the endpoint has counted: English text has four to five, other scripts fewer
PAID_TRIES = 3  # of time-outs, cut and malformed replies, because the endpoint may bill each of them
IN_A_ROW = 8  # after so many requests in a row fail for good, the endpoint counts as down
LONGEST_BACKOFF_S = 8.0
LONGEST_PAUSE_S = 300.0  # limit on Retry-After, because some endpoints name the end of the day
NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached")  # codes of a 429 for which waiting does not help
# A 400 about the prompt's length may name parameters that the endpoint does support.
_ABOUT_LENGTH = re.compile(r"context|too (?:large|long|many)|reduce the length|input tokens", re.IGNORECASE)
_UNKNOWN = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|instead", re.IGNORECASE
)
# Some endpoints refuse a single prompt with 403, which otherwise means that the key is refused.
_MODERATED = re.compile(r"flagged|moderat|content.?(?:filter|policy)|safety", re.IGNORECASE)
Result = TypeVar("Result")


class Unanswered(Exception):
    """One request failed for good; the others may go on."""


class Client:
    """One model at one URL. Raises UserError, in one line without the key, if no request to it can succeed."""

    def __init__(
        self,
        address: str,
        limits: Limits = USUAL_LIMITS,
        cache: Cache | None = None,
        price: Price = FREE,
        money: Money | None = None,
        key_env: str = "",
    ):
        """`key_env` names the variable with the key; `key_for` says which key is sent if none is named."""
        from openai import AsyncOpenAI

        self.url, self.name = split_address(address)
        self.label = self.name  # what tables call it
        self.limits, self.cache, self.price, self.money = limits, cache, price, money or Money()
        self.key_env, self.secret = key_env or KEY, key_for(self.url, key_env)
        options = {"base_url": self.url, "max_retries": 0, "timeout": limits.timeout_s}
        try:
            self.api = AsyncOpenAI(api_key=self.secret or "none", **options)
        except Exception as error:  # a wrong proxy address; its HTTP library depends on openai's version
            if is_ours(error):
                raise
            raise UserError(
                f"the proxy that the environment names cannot be used ({self._said(error)}); correct HTTP_PROXY, HTTPS_PROXY or "
                "ALL_PROXY"
            ) from None
        self.unknown: set[str] = set()  # parameters that the endpoint has refused
        self.slots, self.gate, self.next_at = asyncio.Semaphore(limits.concurrency), asyncio.Lock(), 0.0
        self.failed_in_a_row = 0
        self.connected: asyncio.Task | None = None

    async def ask(self, messages: list[dict[str, str]], attempt: int = 0, **parameters: Any) -> Reply:
        """Return a reply to `messages`. The same `attempt` at the same request is paid for once.

        Raises Unanswered if this request failed for good, OverBudget, and UserError if every request would fail.
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
        """Return the key of this request in the cache."""
        request = {"url": self.url, "model": self.name, "messages": messages, "attempt": attempt, **parameters}
        return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the cost of these tokens in dollars."""
        return (self.price[0] * prompt_tokens + self.price[1] * completion_tokens) / 1e6

    async def _connect(self) -> None:
        """Check once that somebody listens and that replies can be kept. A wrong port would show only after 35 s of retries."""
        if self.cache:
            self.cache.open()
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
        """Wait for this request's turn: requests begin as far apart as `rpm` and `tpm` ask for, in the order of their arrival."""
        rpm, tpm = self.limits.rpm, self.limits.tpm
        async with self.gate:
            while (left := self.next_at - time.monotonic()) > 0:  # a 429 may have moved it meanwhile
                await asyncio.sleep(left)
            self.next_at = time.monotonic() + max(60 / rpm if rpm else 0, 60 * tokens / tpm if tpm else 0)

    async def _until_answered(self, messages: list[dict[str, str]], parameters: dict[str, Any]) -> Reply:
        """Send a request, again and again if that may help. Raises as `ask` does."""
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
        """Raise UserError for an error that every request would get, because of the key, the model or the account."""
        status, body = error.status_code, error.body if isinstance(error.body, dict) else {}
        if status == 401 or (status == 403 and not _MODERATED.search(str(error))):
            name_it = f"name its variable with --judge_key_env or --model_key_env; {KEY} is sent to OpenAI alone"
            what = f"the key in {self.key_env} was refused" if self.secret else f"wants a key ({name_it})"
            raise UserError(f"{self.url}: {what} ({status})") from None
        if status == 404:
            raise UserError(f"{self.url}: has no {self.name} (404)") from None
        if status == 402 or body.get("code") in NO_MONEY or body.get("type") in NO_MONEY:
            raise UserError(f"{self.url}: the account has no money left ({self._said(error)})") from None

    async def _send(self, messages: list[dict[str, str]], sent: dict[str, Any]) -> Reply:
        """Try once, within the limits. What a failed try may have cost is booked as spent."""
        most = sent.get("max_tokens", sent.get("max_completion_tokens", 1024))
        await self._wait_for_limits(estimate_tokens(messages) + most)
        reserved = spent = self.usd(most_tokens(messages, sent), most)
        await self.money.reserve(reserved)
        try:
            # The raw response, because openai's own parsing fails at whichever attribute a malformed body lacks first.
            response = await self.api.chat.completions.with_raw_response.create(
                model=self.name, messages=messages, extra_headers=self._headers(), **sent
            )
            completion = read_completion(response.content)
            text, usage = completion.text, completion.usage
            prompt_tokens = usage[0] if usage else estimate_tokens(messages)
            completion_tokens = usage[1] if usage else len(text.encode()) // BYTES_PER_TOKEN + 1
            spent = self.usd(prompt_tokens, completion_tokens) if usage else reserved
            return Reply(
                text,
                completion.finish_reason,
                prompt_tokens,
                completion_tokens,
                seconds=0.0,
                reasoning=completion.reasoning,
                refused=completion.refused,
                model=completion.model,
                endpoint=f"{self.url}#{self.name}",
                request_id=response.headers.get("x-request-id") or completion.id,
                usd=spent,
            )
        except Exception as error:
            spent = reserved if _may_be_billed(error) else 0.0
            raise
        finally:
            self.money.settle(reserved, spent)

    def _headers(self) -> dict[str, Any]:
        """Return the header with the key, and for URLs that are not OpenAI's the removal of headers that are meant for OpenAI.

        openai's client would send the organisation, project and custom headers from the environment to any URL.
        """
        from openai import Omit

        own = [line.partition(":")[0].strip() for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()]
        names = [] if is_openai(self.url) else ["OpenAI-Organization", "OpenAI-Project", *filter(None, own)]
        return {**{name: Omit() for name in names}, "Authorization": f"Bearer {self.secret}" if self.secret else Omit()}

    async def _back_off(self, error: Exception, failures: int) -> None:
        """Wait half a second, doubled at each failure; or as long as the endpoint asks, which then holds for every request."""
        response = getattr(error, "response", None)
        try:
            asked = float(response.headers.get("retry-after", "")) if response is not None else 0.0
        except ValueError:  # no Retry-After, or a date
            asked = 0.0
        if asked > 0:
            self.next_at = max(self.next_at, time.monotonic() + min(asked, LONGEST_PAUSE_S))
        else:
            await asyncio.sleep(min(0.5 * 2 ** (failures - 1), LONGEST_BACKOFF_S) * random.uniform(0.75, 1))

    def _known(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters without those that the endpoint has refused."""
        known = {key: value for key, value in parameters.items() if key not in self.unknown}
        if "max_tokens" in self.unknown and "max_tokens" in parameters:
            known["max_completion_tokens"] = parameters["max_tokens"]  # the name that newer models of OpenAI use
        return known

    def _leave_out(self, said: str, parameters: dict[str, Any], sent: dict[str, Any]) -> bool:
        """Return whether the endpoint refused an optional parameter, which is then left out of all further requests.

        `max_tokens` stays if the endpoint says that prompt and reply are too long together: without it, replies would
        have no limit at all.
        """
        if _ABOUT_LENGTH.search(said):
            return False
        marks = {"response_format": ("response_format", "json_schema", "schema", "structured")}
        for name in parameters:
            named = name in sent and any(mark in said for mark in marks.get(name, (name,)))
            if named and (name != "max_tokens" or _UNKNOWN.search(said)):
                self.unknown.add(name)  # requests in flight with it are refused, too, and each tries again without it
                return True
        return False

    def _failure(self, error: Exception) -> Exception:
        """Return Unanswered, or UserError after IN_A_ROW failures that speak of an endpoint that is down.

        A time-out or a malformed reply may be due to one prompt, so those do not count.
        """
        if not _may_be_billed(error) or getattr(error, "foreign", False):
            self.failed_in_a_row += 1
        if self.failed_in_a_row >= IN_A_ROW:
            return UserError(f"{self.url}: {IN_A_ROW} requests in a row failed for good ({self._said(error)})")
        return Unanswered(self._said(error))

    def _said(self, error: Exception) -> str:
        """Return the error in one line, without the key."""
        said = repair_text(" ".join(str(error).split())) or type(error).__name__
        said = said.replace(self.secret, "***") if len(self.secret) > 4 else said
        return re.sub(r"\bsk-[\w-]+", "***", said)[:200]


def _may_be_billed(error: Exception) -> bool:
    """Return whether the endpoint may bill a failed request: not if it refused the request or was never reached."""
    import openai

    if isinstance(error, (openai.APIStatusError, ErrorInBody)):
        return False
    # By name, because they are httpx's or httpx2's, depending on the version of openai.
    return type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout")


def estimate_tokens(messages: Iterable[dict[str, str]]) -> int:
    """Return about how many tokens the messages have, before an endpoint has counted: a quarter of their bytes."""
    return sum(len(message["content"].encode()) for message in messages) // BYTES_PER_TOKEN + 1


def most_tokens(messages: list[dict[str, str]], sent: dict[str, Any]) -> int:
    """Return an upper bound of the prompt's tokens: the bytes of its JSON, whose punctuation outweighs a chat template's.

    No tokenizer that works on bytes makes more tokens of a text than it has bytes.
    """
    return len(json.dumps([messages, sent.get("response_format")], ensure_ascii=False).encode())


def make_clients(
    addresses: Sequence[str],
    key_envs: Sequence[str] = (),
    limits: Limits = USUAL_LIMITS,
    prices: Sequence[Price] | None = None,
    cache: Cache | None = None,
    money: Money | None = None,
) -> list[Client]:
    """Return a client for each address; they share the cache and the money.

    Models of one name are labelled name@host/path. Raises UserError for an address that is given twice.
    """
    keys, prices, money = key_variables(key_envs, addresses), prices or [FREE] * len(addresses), money or Money()
    clients = [
        Client(address, limits, cache, price, money, key) for address, price, key in zip(addresses, prices, keys)
    ]
    if len({(client.url, client.name) for client in clients}) < len(clients):
        raise UserError("the same endpoint and model is given twice")
    names = [client.name for client in clients]
    for client in clients:
        if names.count(client.name) > 1:
            client.label = f"{client.name}@{client.url.partition('//')[2]}"
    return clients


def run_all(
    works: Sequence[Callable[[], Awaitable[Result]]], what: str, money: Money, done: Callable[[int, Result], None]
) -> str | None:
    """Do all of `works` at once, with a progress bar; `done(index, result)` is called for each as it ends.

    Returns None, or why it stopped early: the money is used up, or an endpoint will never work. Requests that are in flight
    then are paid for, so they end on their own and are kept.
    """
    with _progress_bar(what) as bar:
        task = bar.add_task(what, total=len(works), usd="")
        stopped: list[str] = []

        async def one(index: int, work: Callable[[], Awaitable[Result]]) -> None:
            try:
                done(index, await work())
            except OverBudget:
                if not stopped:  # else the money was closed by an error that has been noted already
                    stopped.append(f"stopped before ${money.limit:.2f} would be exceeded")
            except UserError as error:
                stopped.append(str(error))
                money.closed = True
            bar.update(task, advance=1, usd=f"${money.spent:.2f}" if money.spent else "")

        async def everything() -> None:
            tasks = [asyncio.ensure_future(one(index, work)) for index, work in enumerate(works)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for each in tasks:
                    each.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(everything())
    if not stopped:
        return None
    return f"{stopped[0]}; spent ${money.spent:.2f}" if money.spent else stopped[0]


def _progress_bar(what: str) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns += (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[usd]}"))
    return Progress(*columns, console=Console(stderr=True))
