"""The HTTP server of the gateway and of our worker: uvicorn's, with the settings that both share."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from fastft.common import logs

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections (aiohttp 15 s, openai 5 s), because closing one that a client is about to use
causes an error."""


def reporting(application: ASGIApp) -> ASGIApp:
    """The same application, whose bugs are logged with a line that asks for a report. uvicorn then ends the response."""

    async def reported(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await application(scope, receive, send)
        except Exception as bug:
            logs.log_bug(logger, bug, "%s %s failed", scope.get("method"), scope.get("path"))

    return reported


def in_background(work: Coroutine[Any, Any, None]) -> asyncio.Task:
    """A task that runs beside the server. If a bug ends it, that is logged at once; else nobody would hear of it."""

    def tell(task: asyncio.Task) -> None:
        if not task.cancelled() and (bug := task.exception()):
            logs.log_bug(logger, bug, "%s has ended", work.__qualname__)

    task = asyncio.create_task(work)
    task.add_done_callback(tell)
    return task


class ReadyServer(uvicorn.Server):
    """Serves an ASGI application, calls `ready` once it listens, and leaves the signals of the process to whoever runs it."""

    def __init__(self, application: ASGIApp, ready: Callable[[], None], **settings: Any):
        """`settings` are further ones of uvicorn's."""
        super().__init__(
            uvicorn.Config(
                reporting(application),
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
