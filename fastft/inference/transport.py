"""Send HTTP requests with aiohttp, through the proxy that the environment names, one session for each event loop.

    response = await send("POST", url, headers, json_bytes, timeout_s=120)
    response.status, response.headers, response.content

A request costs 0.1 ms of a core this way. With openai's own client it was 1.7 ms, so that one core sent fewer than 600 a second.
"""

import asyncio
import email.utils
import time
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from fastft.errors import UserError

PIECE = 1 << 20  # bytes of a download at a time


class Unreached(Exception):
    """No connection was made, so the endpoint cannot have billed anything."""


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
    if not proxy or proxy_bypass(parts.hostname):
        return None
    try:
        scheme, why = urlsplit(proxy).scheme, "only http and https are spoken"
        right = urlsplit(proxy).port is None or scheme in ("http", "https")
    except ValueError as error:
        right, why = False, str(error)
    if not right or scheme not in ("http", "https"):
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

    Raises Unreached or Lost.
    """
    import aiohttp

    session, timeout = await _session(), aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.request(method, url, headers=headers, data=body, timeout=timeout, proxy=proxy) as response:
            if to and response.status < 300:
                with open(to, "wb") as file:
                    async for piece in response.content.iter_chunked(PIECE):
                        file.write(piece)
                return Response(response.status, response.headers, b"")
            return Response(response.status, response.headers, await response.read())
    except (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError, aiohttp.ConnectionTimeoutError) as error:
        raise Unreached(str(error) or "no connection in time") from None
    except asyncio.TimeoutError:
        raise Lost(f"no answer in {timeout_s:g} s") from None
    except aiohttp.ClientError as error:
        raise Lost(str(error) or type(error).__name__) from None


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Return the seconds that the endpoint asks to wait for, 0 if it names none: as a number, or as a date."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        said = headers.get(name, "").strip()
        try:
            return max(0.0, float(said) / unit)
        except ValueError:
            pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except (TypeError, ValueError):
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

    connector = aiohttp.TCPConnector(limit=0)  # how many are on the way is `Pace`'s decision
    try:
        async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
            yield session
    finally:
        del _sessions[asyncio.get_running_loop()]
