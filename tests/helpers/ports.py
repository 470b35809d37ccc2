"""Ports for servers that must be told theirs before they start: torchrun's store, engines behind HTTP."""

import fcntl
import socket
import tempfile
from pathlib import Path

FIRST, LAST = 20_000, 32_000
"""Below the ports that the kernel gives to outgoing connections (32,768 and up on Linux): one of those could take the port
between this call and the server's start. A torchrun agent whose store's port is taken waits ten minutes for the other one."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses, and that no other process gets from here before the 12,000 after it."""
    with (Path(tempfile.gettempdir()) / "fastft-tests-next-port").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        port = int(file.read() or FIRST)
        while not _is_free(port):
            port = _after(port)
        file.truncate(0)
        file.write(str(_after(port)))
    return port


def _after(port: int) -> int:
    return FIRST if port >= LAST else port + 1


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
