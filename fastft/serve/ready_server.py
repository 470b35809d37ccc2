"""The HTTP server of the gateway and of our worker: uvicorn's, with the settings that both share."""

import contextlib
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections (aiohttp 15 s, openai 5 s), because closing one that a client is about to use
causes an error."""


class ReadyServer(uvicorn.Server):
    """Serves an ASGI application, calls `ready` once it listens, and leaves the signals of the process to whoever runs it."""

    def __init__(self, application: Any, ready: Callable[[], None], **settings: Any):
        """`settings` are further ones of uvicorn's."""
        super().__init__(
            uvicorn.Config(
                application,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=5,
                **settings,
            )
        )
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
