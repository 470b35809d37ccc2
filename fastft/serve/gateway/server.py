"""Serve the gateway with uvicorn until it is told to stop, and run what runs beside it: health checks, the watch, the drain."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from fastft.serve.gateway.app import Gateway

logger = logging.getLogger(__name__)


async def serve(
    gateway: Gateway, listener: Any, ready: Callable[[], None], stop: asyncio.Event, grace_s: float
) -> None:
    """Serve until `stop` is set, then drain."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    from fastft.serve.ready_server import ReadyServer, in_background

    most_connections, first_request_s = 2 * gateway.settings.most_requests, gateway.settings.upload_s

    class Protocol(HttpToolsProtocol):
        """uvicorn's protocol with a limit on connections, and on the time that a client takes for its first headers."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # Cancelled as soon as it is no longer needed, because it keeps an ended connection in memory.
            self.patience = self.loop.call_later(first_request_s, self._require_request)
            if len(self.connections) > most_connections:
                transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self.patience.cancel()
            super().connection_lost(exc)

        def _require_request(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.abort()

        def on_headers_complete(self) -> None:
            self.patience.cancel()
            super().on_headers_complete()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["fastft.abort"] = self.transport.abort

    server = ReadyServer(gateway, ready, http=Protocol)
    tasks = [in_background(gateway.watch_forever()), in_background(gateway.pool.check_forever())]

    async def end() -> None:
        await stop.wait()
        await gateway.drain(grace_s)
        server.should_exit = True

    tasks.append(in_background(end()))
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in tasks:
            task.cancel()
        await gateway.pool.close()
