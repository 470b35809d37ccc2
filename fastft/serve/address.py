"""Addresses to listen on: sockets that are bound, and whether others can reach them."""

import ipaddress
import socket

from fastft.errors import UserError

LAST_PORT = (1 << 16) - 1
SEND_BUFFER = 256 << 10
"""Bytes that the system holds for a client that does not read; by default Linux lets it grow to 4 MB."""


def check_port(port: int) -> None:
    """Raise UserError unless `port` is one on which a server can listen, or 0."""
    if not 0 <= port <= LAST_PORT:
        raise UserError(f"--port {port}: must be between 0 and {LAST_PORT}; 0 takes a free one")


def bound(host: str, port: int) -> socket.socket:
    """A socket bound to the address, which refuses connections until a server listens. Raises UserError."""
    check_port(port)  # the system would take 70000 for 4464
    listener = None
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        if listener:
            listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{host}:{port}: {reason}; choose another --port, or 0 for a free one") from None
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def written(host: str, port: int) -> str:
    """The address as it is written in a URL."""
    return f"{f'[{host}]' if ':' in host else host}:{port}"
