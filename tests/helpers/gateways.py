"""Gateways in processes of their own, `fastft serve`, and the scripted workers behind them."""

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.ports import free_port
from helpers.serving import ROOT, WorkerProcess, started, wait_until


class Scripted(WorkerProcess):
    """A scripted worker, and what it has seen."""

    def do(self, **script) -> None:
        assert self.post("/script", script).status == 200

    @property
    def seen(self) -> dict:
        return self.get("/seen").json

    @property
    def entry(self) -> str:
        return f"{self.url}#{self.name}"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def scripted(name: str = "m", port: int | None = None) -> contextlib.AbstractContextManager[Scripted]:
    command = [sys.executable, str(ROOT / "tests/helpers/scripted_worker.py"), name, str(port or free_port())]
    return started(Scripted, command)


@contextlib.contextmanager
def gateway(*flags: str, config: dict | None = None, directory: Path | None = None, **environment: str) -> Iterator:
    """`fastft serve` on a free port, where a later one can take its place, with `config` as its file in `directory`."""
    command = [sys.executable, "-m", "fastft", "serve", "--port", str(free_port()), *flags]
    if config:
        (directory / "serve.yaml").write_text(json.dumps(config))  # JSON is YAML
        command += ["--config", str(directory / "serve.yaml")]
    with started(WorkerProcess, command, **environment) as process:
        process.name = "m"
        yield process


def events(directory: Path) -> list[dict]:
    from fastft.serve.gateway.events import read_events

    return list(read_events(directory))


def event_of(directory: Path, reply_id: str) -> dict:
    """The event with an id, as soon as it is written."""
    wait_until(lambda: any(each["id"] == reply_id for each in events(directory)), f"event {reply_id} is written")
    return next(each for each in events(directory) if each["id"] == reply_id)


async def ask(gateway: Any, method: str, path: str, request: dict | None = None) -> tuple[int, str, bytes]:
    """(status, content type, body) of the gateway's response, in this process."""
    sent: list[dict] = []
    asked = [{"type": "http.request", "body": json.dumps(request).encode(), "more_body": False}]

    async def receive() -> dict:
        if asked:
            return asked.pop()
        await asyncio.Event().wait()

    async def send(message: dict) -> None:
        sent.append(message)

    await gateway({"type": "http", "method": method, "path": path, "headers": [], "scheme": "http"}, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"])[b"content-type"].decode(), body
