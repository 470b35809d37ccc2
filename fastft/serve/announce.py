"""Announce a worker to its gateway at regular intervals, and sign it off before it ends.

    task = loop.create_task(announce(gateway, own_url))
    ...
    await take_leave(gateway, own_url)               # before it stops answering

The gateway forgets a worker LEASE_S after its last announcement, so a machine that vanishes without notice is dropped.
"""

import asyncio
import ipaddress
import logging
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
import orjson

from fastft.common.urls import parse_http
from fastft.errors import UserError
from fastft.serve.address import is_loopback, written

logger = logging.getLogger(__name__)

LEASE_S = 30.0
EVERY_S = 8.0
"""Three announcements may be lost before the lease runs out."""
WAIT_S = 5.0
"""Seconds to wait for the gateway's reply."""


@dataclass(frozen=True)
class GatewayAddress:
    """The gateway's address and the keys for an announcement."""

    url: str
    """http://HOST:PORT of `fastft serve`."""
    admin_key: str
    worker_key_env: str | None
    """Name, on the gateway's machine, of the environment variable with this worker's key (worker_key_envs there)."""

    def __post_init__(self) -> None:
        if not parse_http(self.url):
            raise UserError(f"--announce {self.url}: must be the gateway's address, such as http://10.0.0.1:8000")


def reachable_url(host: str, port: int, gateway: str) -> str:
    """Base URL of a worker that listens on `host`, as the gateway sees it. Raises UserError if that cannot be known.

    A worker that listens on all addresses is reached by the one from which this machine reaches the gateway.
    """
    if is_loopback(host) and not is_loopback(urlsplit(gateway).hostname or ""):
        raise UserError(
            f"--announce {gateway}: it cannot reach this worker at {host}; give --host 0.0.0.0 and --api_key_env NAME"
        )
    try:
        if not ipaddress.ip_address(host).is_unspecified:
            return f"http://{written(host, port)}/v1"
    except ValueError:
        return f"http://{host}:{port}/v1"  # a name
    parts = urlsplit(gateway)
    try:
        target = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        family, kind, _, _, address = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # a datagram socket: nothing is sent
            return f"http://{written(probe.getsockname()[0], port)}/v1"
    except OSError as error:
        raise UserError(f"--announce {gateway}: {error.strerror}; is the name right?") from None


async def announce(gateway: GatewayAddress, url: str) -> None:
    """Announce the worker `URL#NAME` until cancelled. A failure is logged once, and again when it becomes another."""
    request = {"url": url, "lease_s": LEASE_S}
    if gateway.worker_key_env:
        request["key_env"] = gateway.worker_key_env
    before = "not yet"
    async with _session() as session:
        while True:
            trouble = await _ask(session, "POST", gateway, request)
            if trouble != before:
                if trouble:
                    logger.warning(
                        "%s does not take this worker: %s; asked again every %g s", gateway.url, trouble, EVERY_S
                    )
                else:
                    logger.info("%s knows this worker", gateway.url)
            before = trouble
            await asyncio.sleep(EVERY_S)


async def take_leave(gateway: GatewayAddress, url: str) -> None:
    """Tell the gateway to send this worker no more requests. If the gateway cannot be reached, the lease runs out anyway."""
    async with _session() as session:
        if trouble := await _ask(session, "DELETE", gateway, {"url": url}):
            logger.warning("%s was not told that this worker leaves: %s", gateway.url, trouble)


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT_S))


async def _ask(session: aiohttp.ClientSession, method: str, gateway: GatewayAddress, request: dict) -> str | None:
    """Send one request to the gateway; return None, or what went wrong."""
    target = f"{gateway.url.rstrip('/').removesuffix('/v1')}/admin/workers"
    headers = {"authorization": f"Bearer {gateway.admin_key}", "content-type": "application/json"}
    try:
        async with session.request(
            method, target, data=orjson.dumps(request), headers=headers, allow_redirects=False
        ) as response:
            content = await response.read()
            return None if response.status == 200 else _message(content) or f"status {response.status}"
    except asyncio.TimeoutError:
        return f"no answer within {WAIT_S:g} s"
    except (aiohttp.ClientError, OSError) as error:
        return str(error)


def _message(content: bytes) -> str | None:
    """The message in an error of OpenAI's shape."""
    try:
        return str(orjson.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None
