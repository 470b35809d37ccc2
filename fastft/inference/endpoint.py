"""Describe an endpoint: its address, its key, its limits, and the command-line options for them.

    url, name = split_address("https://api.openai.com/v1#gpt-4.1")
    [model, endpoint] = parse(argv, "fastft answer", "…", AnswerConfig, EndpointConfig)
    client = Client(address, endpoint.limits, price=endpoint.prices(1)[0], money=Money(endpoint.max_usd))

A key goes to one endpoint only (see `key_for`) and is written nowhere.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastft.common.command_line import option
from fastft.common.records import repair_text
from fastft.common.urls import parse_http
from fastft.errors import UserError
from fastft.inference.budget import Price, read_prices

KEY = "OPENAI_API_KEY"
OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Limits:
    """How an endpoint is asked: its limits, our time-out for it, one by one or in batches."""

    concurrency: int = 16
    """Requests in flight at a time."""
    rpm: float = 0.0
    """Requests a minute, 0 for no limit."""
    tpm: float = 0.0
    """Tokens a minute, 0 for no limit."""
    retries: int = 8
    timeout_s: float = 120.0
    """Seconds for one request."""
    batch: bool = False
    """Ask through batches instead of single requests."""


USUAL_LIMITS = Limits()


@dataclass(kw_only=True)
class EndpointConfig:
    """Limits and prices of endpoints. OPENAI_API_KEY is sent to OpenAI and to OPENAI_BASE_URL alone."""

    concurrency: int = Limits.concurrency
    """Requests at a time."""
    rpm: float = Limits.rpm
    """Requests a minute, 0 for no limit."""
    tpm: float = Limits.tpm
    """Tokens a minute, 0 for no limit."""
    timeout: float = Limits.timeout_s
    """Seconds for one request."""
    usd_per_million: list[str] = option(several=True)
    """IN,OUT: the price of a million prompt tokens and of a million reply tokens, such as 2.5,10; once, or once for each
    endpoint."""
    max_usd: float | None = None
    """Stop before more than this is spent; needs --usd_per_million."""
    batch: bool = False
    """Ask through the endpoint's batches (OpenAI's /v1/batches): half the price, and an answer within a day."""

    def __post_init__(self) -> None:
        if self.concurrency < 1 or not self.rpm >= 0 or not self.tpm >= 0 or not 0 < self.timeout < math.inf:
            raise UserError("--concurrency must be at least 1, --rpm and --tpm not below 0, --timeout above 0")
        if self.max_usd is not None and not self.usd_per_million:
            raise UserError("--max_usd needs --usd_per_million IN,OUT: prices are not known here")
        if self.max_usd is not None and not self.max_usd > 0:
            raise UserError("--max_usd must be above 0")

    @property
    def limits(self) -> Limits:
        return Limits(self.concurrency, self.rpm, self.tpm, timeout_s=self.timeout, batch=self.batch)

    def prices(self, number: int) -> list[Price]:
        """Return a price for each of `number` endpoints. Raises UserError."""
        return read_prices(self.usd_per_million, number)


def is_address(model: str) -> bool:
    """Return whether `model` names an endpoint; otherwise it is a directory, or a name on the Hub."""
    return model.startswith(("http://", "https://"))


def split_address(address: str) -> tuple[str, str]:
    """Return (URL, name) of URL#name, without slashes at the end of the URL's path. Raises UserError."""
    url, _, name = address.partition("#")
    parts = parse_http(url)
    if not (parts and name) or address != repair_text(address):  # bytes of a command line that are not UTF-8
        raise UserError(
            f"{_without_user(repair_text(address))}: must be URL#name, as in https://api.openai.com/v1#gpt-4.1"
        )
    if parts.username or parts.password:
        raise UserError(f"{_without_user(address)}: a key does not belong in an address; put it into {KEY}")
    base, mark, query = url.partition("?")
    return base.rstrip("/") + mark + query, name


def _without_user(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//", address)


def key_variables(names: Sequence[str], addresses: Sequence[str]) -> list[str]:
    """Return the name of the variable with the key for each address, "" if none is given. Raises UserError.

    One name for several addresses is valid only if they are on one host, so that no key is sent to a host by mistake.
    """
    if not all(re.fullmatch(r"(?:[A-Za-z_]\w*)?", name) for name in names):
        raise UserError("a key is given by the name of the environment variable that holds it")
    if len(names) == 1 and len({_host(address) for address in addresses}) == 1:
        return [*names] * len(addresses)
    if names and len(names) != len(addresses):
        raise UserError("name a key's variable once for each endpoint ('' for none), or once if all are on one host")
    return [*names] or [""] * len(addresses)


def _host(address: str) -> str:
    """Return the host and port of URL#name. Raises UserError as `split_address` does."""
    return urlsplit(split_address(address)[0]).netloc


def key_for(url: str, key_env: str = "") -> str:
    """Return the key for the endpoint at `url`, "" for none: a key that was made for one host is sent to no other.

    The key is the value of the variable `key_env`. Where none is named, OpenAI's own URL and the one in OPENAI_BASE_URL get
    OPENAI_API_KEY. Raises UserError for a variable that is not set, and for a value that cannot be a key.
    """
    if not key_env and not is_openai(url):
        return ""
    name = key_env or KEY
    key = os.environ.get(name, "").strip()
    if key_env and not key:
        raise UserError(f"{name} is not set; it should hold the key for {url}")
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise UserError(f"{name} holds a character that no key has (a space, a letter with an accent …)")
    return key


def is_openai(url: str) -> bool:
    """Return whether `url` is OpenAI's, or where OPENAI_BASE_URL points to. Raises UserError if that is no URL."""
    own = os.environ.get("OPENAI_BASE_URL", "").strip()
    if own and not parse_http(own):
        raise UserError(
            f"OPENAI_BASE_URL is {_without_user(own)!r}, which is no URL such as {OPENAI}; correct or unset it"
        )
    return origin_of(url) in [origin_of(each) for each in (OPENAI, own) if each]


def origin_of(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port, which is what browsers call the origin of a valid URL."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
