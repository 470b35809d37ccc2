"""Send HTTP requests with aiohttp, through the proxy that the environment names, one session for each event loop.

    response = await send("POST", url, headers, json_bytes, timeout_s=120)
    response.status, response.headers, response.content

A request costs 0.1 ms of a core this way. With openai's own client it was 1.7 ms, so that one core sent fewer than 600 a second.
"""

import asyncio
import email.utils
import os
import ssl
import time
from collections.abc import AsyncGenerator, Mapping
from datetime import timezone
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from fastft.common.urls import parse_http
from fastft.errors import UserError
from fastft.inference.endpoint import origin_of

PIECE = 1 << 20  # bytes of a download at a time
MOST_REDIRECTS = 5
CONNECT_S = 30.0  # for a connection; a request that has none yet is not billed
HEADER_BYTES = 1 << 16  # of one header; with aiohttp's usual 8190, a reply that is paid for can be lost by its cookies
LONGEST_RETRY_AFTER_S = 86_400.0  # what is longer is a mistake (milliseconds), and the next run obeys it, too


class Unreached(Exception):
    """No connection was made, so the endpoint cannot have billed anything."""


class Untrusted(Unreached):
    """The endpoint has no certificate for its name that is signed by anybody who is trusted."""


class Lost(Exception):
    """The connection broke, or the time was over, after the request was sent: the endpoint may bill it."""


class Response(NamedTuple):
    """What came back, whatever its status. Names of headers are looked up in any case."""

    status: int
    headers: Mapping[str, str]
    content: bytes


def proxy_for(url: str) -> str | None:
    """Return the proxy that the environment names for `url`, None for none. Raises UserError for one that cannot be used."""
    parts, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    # NO_PROXY may name a host with its port.
    if not proxy or proxy_bypass(parts.hostname) or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        right, why = bool(parse_http(proxy)), "only http and https are spoken"
        urlsplit(proxy).port  # noqa: B018  whose error says what is wrong
    except ValueError as error:
        why = str(error)
    if not right:
        raise UserError(
            f"the proxy that the environment names cannot be used ({why}); correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY"
        )
    return proxy


async def send(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: Any = None,
    timeout_s: float = 120.0,
    proxy: str | None = None,
    to: Path | None = None,
) -> Response:
    """Send a request and return its response. With `to`, the content of a status below 300 goes to that file instead.

    Redirects that keep the method are followed; of the headers, another host gets the content type alone. Raises Unreached or
    Lost.
    """
    for _ in range(MOST_REDIRECTS):
        response = await _send_once(method, url, headers, body, timeout_s, proxy, to)
        target = _redirected(method, url, response)
        if not target:
            break
        if not _is_same_host(url, target):
            headers = {name: value for name, value in headers.items() if name.lower() == "content-type"}
        url, proxy = target, proxy_for(target)
    return response


async def _send_once(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: Any,
    timeout_s: float,
    proxy: str | None,
    to: Path | None,
) -> Response:
    import aiohttp

    session, timeout = await _session(), aiohttp.ClientTimeout(total=timeout_s, connect=min(timeout_s, CONNECT_S))
    options = {"headers": headers, "data": body, "timeout": timeout, "proxy": proxy, "allow_redirects": False}
    try:
        async with session.request(method, url, **options) as response:
            if to and response.status < 300:
                with open(to, "wb") as file:
                    async for piece in response.content.iter_chunked(PIECE):
                        file.write(piece)
                return Response(response.status, response.headers, b"")
            return Response(response.status, response.headers, await response.read())
    except aiohttp.ClientConnectorCertificateError as error:
        raise Untrusted(str(error)) from None
    except (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError, aiohttp.ConnectionTimeoutError) as error:
        raise Unreached(str(error) or "no connection in time") from None
    except (aiohttp.InvalidURL, UnicodeError) as error:  # a name that no host can have
        raise Unreached(str(error)) from None
    except asyncio.TimeoutError:
        raise Lost(f"no answer in {timeout_s:g} s") from None
    except aiohttp.ClientError as error:
        raise Lost(str(error) or type(error).__name__) from None


def _redirected(method: str, url: str, response: Response) -> str | None:
    """Return where a response says to ask instead, None if nowhere, or if the request would become another there."""
    location = response.headers.get("Location")
    if not location or response.status not in ((301, 302, 303, 307, 308) if method == "GET" else (307, 308)):
        return None
    try:
        target = urljoin(url, location)
    except ValueError:
        return None
    return target if parse_http(target) else None


def _is_same_host(url: str, target: str) -> bool:
    """Return whether `target` may have the headers for `url`: the same origin, or its https in the place of http."""
    (scheme, host, port), there = origin_of(url), origin_of(target)
    return there in ((scheme, host, port), ("https", host, 443 if (scheme, port) == ("http", 80) else port))


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Return the seconds that the endpoint asks to wait for, a day at most: given as a number, or as a date.

    0 if it names none, or what is no time to come.
    """
    seconds = _seconds(headers.get("retry-after-ms")) / 1000 or _seconds(headers.get("retry-after"))
    return min(seconds or _seconds_until(headers.get("retry-after")), LONGEST_RETRY_AFTER_S)


def _seconds(said: str | None) -> float:
    try:
        return max(0.0, float(said or ""))
    except ValueError:
        return 0.0


def _seconds_until(date: str | None) -> float:
    try:
        then = email.utils.parsedate_to_datetime(date or "")
        utc = then if then.tzinfo else then.replace(tzinfo=timezone.utc)  # HTTP's dates are, without a zone, too
        return max(0.0, utc.timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


_sessions: dict[asyncio.AbstractEventLoop, tuple[AsyncGenerator, Any]] = {}


async def _session() -> Any:
    """Return the session of this event loop. `asyncio.run` ends the generators of its loop, and this one closes the session."""
    loop = asyncio.get_running_loop()
    if loop not in _sessions:
        generator = _open_session()
        _sessions[loop] = (generator, await generator.__anext__())
    return _sessions[loop][1]


async def _open_session() -> AsyncGenerator[Any, None]:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0, ssl=_trusted())  # how many are on the way is `Pace`'s decision
    options = {"cookie_jar": aiohttp.DummyCookieJar(), "max_line_size": HEADER_BYTES, "max_field_size": HEADER_BYTES}
    try:
        async with aiohttp.ClientSession(connector=connector, **options) as session:
            yield session
    finally:
        del _sessions[asyncio.get_running_loop()]


def _trusted() -> ssl.SSLContext:
    """Return whose certificates are trusted: the system's and Mozilla's, because a small container has none of its own.

    SSL_CERT_FILE and SSL_CERT_DIR replace both.
    """
    import certifi

    context = ssl.create_default_context()
    if not (os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")):
        context.load_verify_locations(certifi.where())
    return context
