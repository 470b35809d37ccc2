"""One model at one URL: send it a request once, and know what its errors mean.

    connection = Connection("https://api.openai.com/v1#gpt-4.1", Limits(rpm=500), price=(2.0, 8.0))
    reply = await connection.send(messages, {"temperature": 0})

A parameter that the endpoint says it does not know (`response_format`, `temperature`, `max_tokens`) is left out from then on. A
refused key, an unknown model and an account without money are errors of every request, and so is a name that changes.
"""

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import orjson

from fastft.common.records import repair_text
from fastft.errors import UserError
from fastft.inference import transport
from fastft.inference.budget import FREE, Price
from fastft.inference.completion import Completion, ErrorInBody, Malformed, Reply, error_of, read_completion
from fastft.inference.endpoint import KEY, USUAL_LIMITS, Limits, is_openai, key_for, split_address
from fastft.inference.pace import Pace

logger = logging.getLogger(__name__)
BYTES_PER_TOKEN = 4  # before the endpoint has counted: English text has four to five, other scripts fewer
BATCH_PRICE = 0.5  # of the usual one, at every vendor that has OpenAI's batches
LONGEST_PAUSE_S = 300.0  # a longer Retry-After ends the run, because some endpoints name the end of the day
IN_A_ROW = 8  # after so many requests in a row fail for good, the endpoint counts as down
PAID_TRIES = 3  # of time-outs, cut and malformed replies, because the endpoint may bill each of them
USUAL_REPLY = 1024  # tokens of a reply whose length nobody has limited, for budget and limits
NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached")  # codes of a 429 for which waiting does not help
# A 400 about the prompt's length may name parameters that the endpoint does support.
_ABOUT_LENGTH = re.compile(r"context|too (?:large|long|many)|reduce the length|input tokens", re.IGNORECASE)
_UNKNOWN = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|instead", re.IGNORECASE
)
# Some endpoints refuse a single prompt with 403, which otherwise means that the key is refused.
_MODERATED = re.compile(r"flagged|moderat|content.?(?:filter|policy)|safety", re.IGNORECASE)


class Unanswered(Exception):
    """One request failed for good; the others may go on."""


@dataclass
class Tries:
    """How often a request has failed, and how often it may have been billed."""

    failed: int = 0
    billed: int = 0


class Connection:
    """An endpoint with its limits, its price and its key, and what is known about it."""

    def __init__(
        self,
        address: str,
        limits: Limits = USUAL_LIMITS,
        price: Price = FREE,
        key_env: str = "",
        one_model: bool = False,
        batch: bool = False,
    ):
        """`key_env` names the variable with the key; `key_for` says which key is sent if none is named.

        With `one_model`, a model whose name changes ends the run; without, that is said once. With `batch`, the price is that
        of batches.
        """
        self.url, self.name = split_address(address)
        self.address = f"{self.url}#{self.name}"
        self.limits, self.one_model = limits, one_model
        self.price = (price[0] * BATCH_PRICE, price[1] * BATCH_PRICE) if batch else price
        self.key_env, self.secret = key_env or KEY, key_for(self.url, key_env)
        self.headers = self._own_headers()
        self.pace = Pace(limits)
        self.unknown: set[str] = set()  # parameters that the endpoint has refused
        self.model = ""  # the name by which it calls the model that answers
        self.failed_in_a_row = 0
        self.proxy = transport.proxy_for(self.url)

    def _own_headers(self) -> dict[str, str]:
        """Return the headers of every request. Those that the environment has for OpenAI are sent to OpenAI alone."""
        headers = {}
        if is_openai(self.url):
            for name, variable in ("OpenAI-Organization", "OPENAI_ORG_ID"), ("OpenAI-Project", "OPENAI_PROJECT_ID"):
                if value := os.environ.get(variable, "").strip():
                    headers[name] = _header(name, value, variable)
            for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines():
                name, _, value = line.partition(":")
                if name.strip() and name.strip().lower() != "authorization":
                    headers[name.strip()] = _header(name.strip(), value.strip(), "OPENAI_CUSTOM_HEADERS")
        return {**headers, **({"Authorization": f"Bearer {self.secret}"} if self.secret else {})}

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the cost of these tokens in dollars."""
        return (self.price[0] * prompt_tokens + self.price[1] * completion_tokens) / 1e6

    def most_usd(self, messages: list[dict[str, str]], parameters: dict[str, Any]) -> float:
        """Return the most that a request can cost."""
        return self.usd(most_tokens(messages, parameters), most_reply_tokens(parameters))

    async def reach(self) -> None:
        """Raise UserError if nobody listens. A wrong port would show only after 35 s of retries."""
        parts = urlsplit(self.url)
        if self.proxy:
            return
        try:
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            # A host whose IPv6 address does not answer may answer at its IPv4 address.
            connection = asyncio.open_connection(parts.hostname, port, happy_eyeballs_delay=0.25)
            _, writer = await asyncio.wait_for(connection, 10)
            writer.close()
        except (OSError, asyncio.TimeoutError, UnicodeError) as error:  # UnicodeError: a name that no host can have
            raise UserError(f"{self.url}: cannot be reached ({self.said(error)})") from None

    async def send(self, messages: list[dict[str, str]], sent: dict[str, Any]) -> Reply:
        """Try once. Raises ErrorInBody, Malformed, and transport's Unreached and Lost."""
        began = time.monotonic()
        response = await self.request("POST", "/chat/completions", self.body(messages, sent))
        completion = read_completion(response.content)
        return self.reply(
            completion, messages, sent, response.headers.get("x-request-id", ""), time.monotonic() - began
        )

    async def request(self, method: str, path: str, body: bytes | None = None, **options: Any) -> transport.Response:
        """Send a request to `path` below the URL. Raises ErrorInBody for a status of 300 or more, Unreached and Lost.

        `body` is JSON unless `options` say otherwise: `headers`, and what `transport.send` takes.
        """
        headers = {"Content-Type": "application/json", **options.pop("headers", {}), **self.headers}
        options.setdefault("timeout_s", self.limits.timeout_s)
        response = await transport.send(method, self._at(path), headers, body, proxy=self.proxy, **options)
        if response.status >= 300:
            raise error_of(response.status, response.content, transport.retry_after_s(response.headers))
        return response

    def _at(self, path: str) -> str:
        """Return the URL of `path`, to which what stands behind a question mark in the endpoint's URL is added."""
        base, _, query = self.url.partition("?")
        return base + path + (("&" if "?" in path else "?") + query if query else "")

    def body(self, messages: list[dict[str, str]], sent: dict[str, Any]) -> bytes:
        """Return the JSON of a request."""
        return orjson.dumps({"model": self.name, "messages": messages, **sent})

    def reply(
        self,
        completion: Completion,
        messages: list[dict[str, str]],
        sent: dict[str, Any],
        request_id: str,
        seconds: float = 0.0,
        batch: str = "",
    ) -> Reply:
        """Make a reply of what the endpoint has sent. Where it counts no tokens, the most that they can cost is its price."""
        usage, text = completion.usage, completion.text
        written = len((text + completion.reasoning).encode())
        prompt_tokens, completion_tokens = usage or (estimate_tokens(messages), written // BYTES_PER_TOKEN + 1)
        return Reply(
            text=text,
            finish_reason=completion.finish_reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            seconds=seconds,
            reasoning=completion.reasoning,
            refused=completion.refused,
            model=completion.model,
            endpoint=self.address,
            request_id=repair_text(request_id) or completion.id,
            batch=batch,
            usd=self.usd(prompt_tokens, completion_tokens) if usage else self.most_usd(messages, sent),
        )

    def known(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters without those that the endpoint has refused."""
        known = {key: value for key, value in parameters.items() if key not in self.unknown}
        if "max_tokens" in self.unknown and "max_tokens" in parameters:
            known["max_completion_tokens"] = parameters["max_tokens"]  # the name that newer models of OpenAI use
        return known

    def leave_out(self, error: Exception, parameters: dict[str, Any], sent: dict[str, Any]) -> bool:
        """Return whether the endpoint refused an optional parameter, which is then left out of all further requests.

        `max_tokens` stays if the endpoint says that prompt and reply are too long together: without it, replies would
        have no limit at all.
        """
        if not isinstance(error, ErrorInBody) or error.status_code not in (400, 422):
            return False
        said = f"{error} {error.param}"
        if _ABOUT_LENGTH.search(said):
            return False
        marks = {"response_format": ("response_format", "json_schema", "schema", "structured")}
        for name in parameters:
            named = name in sent and any(mark in said for mark in marks.get(name, (name,)))
            if named and (name != "max_tokens" or _UNKNOWN.search(said)):
                self.unknown.add(name)  # requests in flight with it are refused, too, and each tries again without it
                return True
        return False

    def end_the_run_at(self, error: ErrorInBody) -> None:
        """Raise UserError for an error that every request would get, because of the key, the model or the account."""
        status, body = error.status_code, error.body
        if status == 401 or (status == 403 and not _MODERATED.search(str(error))):
            name_it = f"name its variable with --judge_key_env or --model_key_env; {KEY} is sent to OpenAI alone"
            what = f"the key in {self.key_env} was refused" if self.secret else f"wants a key ({name_it})"
            raise UserError(f"{self.url}: {what} ({status})") from None
        if status == 404:
            raise UserError(f"{self.url}: has no {self.name} (404)") from None
        if status == 402 or body.get("code") in NO_MONEY or body.get("type") in NO_MONEY:
            raise UserError(f"{self.url}: the account has no money left ({self.said(error)})") from None

    def check_name(self, reply: Reply) -> None:
        """Notice that the endpoint answers under another name than before. With `one_model` this raises UserError.

        `reply` is kept already, so nothing that was paid for is lost.
        """
        if not reply.model or reply.model == self.model:
            return
        before, self.model = self.model, self.model if self.model and self.one_model else reply.model
        if not before:
            return
        changed = f"{self.url}: {self.name} was {before} and now is {reply.model}"
        if self.one_model:
            raise UserError(f"{changed}, so it may be another model; every answer so far is kept")
        logger.warning("%s", changed)

    def count(self, error: Exception, tries: Tries, parameters: dict[str, Any], sent: dict[str, Any]) -> bool:
        """Count a failed try. Returns whether the next should wait: not if it leaves out what has been refused.

        Raises Unanswered if this request should not be tried again, and UserError if none should.
        """
        if self.leave_out(error, parameters, sent):
            return False
        if isinstance(error, transport.Untrusted):
            trust = "SSL_CERT_FILE may name a file with the certificates to trust"
            raise UserError(f"{self.url}: {self.said(error)}; {trust}") from None
        if isinstance(error, ErrorInBody):
            self.end_the_run_at(error)
            if error.status_code not in (408, 409, 429) and error.status_code < 500:
                raise Unanswered(self.said(error)) from None
        tries.failed, tries.billed = tries.failed + 1, tries.billed + may_be_billed(error)
        if tries.failed > self.limits.retries or tries.billed == PAID_TRIES:
            raise self.failure(error) from None
        return True

    def failure(self, error: Exception) -> Exception:
        """Return Unanswered, or UserError after IN_A_ROW failures that speak of an endpoint that is down.

        A time-out or a malformed reply may be due to one prompt, so those do not count.
        """
        if not may_be_billed(error) or getattr(error, "foreign", False):
            self.failed_in_a_row += 1
        if self.failed_in_a_row >= IN_A_ROW:
            return UserError(f"{self.url}: {IN_A_ROW} requests in a row failed for good ({self.said(error)})")
        return Unanswered(self.said(error))

    def said(self, error: Exception) -> str:
        """Return the error in one line, without the key."""
        said = repair_text(" ".join(str(error).split())) or type(error).__name__
        # Nothing that moves a terminal's cursor.
        said = "".join(each if each.isprintable() else "\ufffd" for each in said)
        said = said.replace(self.secret, "***") if len(self.secret) > 4 else said
        return re.sub(r"\bsk-[\w-]+", "***", said)[:200]


def _header(name: str, value: str, variable: str) -> str:
    """Return the value of a header that `variable` holds. Raises UserError, without the value, for what no header can be."""
    if not (re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII) and re.fullmatch(r"[\t\x20-\x7e]*", value)):
        raise UserError(
            f"{variable} holds a character that no header of HTTP has (a line break, a letter with an accent …)"
        )
    return value


def check_pauses(connections: Iterable[Connection], said: str) -> None:
    """Raise UserError if every endpoint asks for so long a pause that the run should rather go on another time."""
    waits = {connection.url: connection.pace.paused_until - time.monotonic() for connection in connections}
    url = min(waits, key=waits.__getitem__)
    if waits[url] > LONGEST_PAUSE_S:
        minutes = f"{waits[url] / 60:,.0f} minutes"
        raise UserError(f"{url}: asks to wait {minutes} ({said}); start the same command again then")


def may_be_billed(error: Exception) -> bool:
    """Return whether the endpoint may bill a failed request: not if it refused the request or was never reached."""
    return isinstance(error, (Malformed, transport.Lost))


def estimate_tokens(messages: Iterable[dict[str, str]]) -> int:
    """Return about how many tokens the messages have, before an endpoint has counted: a quarter of their bytes."""
    return sum(len(message["content"].encode()) for message in messages) // BYTES_PER_TOKEN + 1


def most_tokens(messages: list[dict[str, str]], sent: dict[str, Any]) -> int:
    """Return an upper bound of the prompt's tokens: the bytes of its JSON, whose punctuation outweighs a chat template's.

    No tokenizer that works on bytes makes more tokens of a text than it has bytes.
    """
    return len(json.dumps([messages, sent.get("response_format")], ensure_ascii=False).encode())


def most_reply_tokens(parameters: dict[str, Any]) -> int:
    """Return the limit on the reply's tokens."""
    return parameters.get("max_tokens", parameters.get("max_completion_tokens", USUAL_REPLY))
