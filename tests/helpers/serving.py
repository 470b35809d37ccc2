"""Workers in processes of their own, the clients that talk to them over real sockets, and a model that knows its answers."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from helpers import forks, models

ROOT = Path(__file__).parents[2]
SETTINGS = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT = {**os.environ, **SETTINGS}
# What the taught model answers, at temperature 0.
ANSWERS = {
    "emoji": "A family 👩\u200d👩\u200d👧 and 日本語, ¿Dónde? 🎉 end",
    "count": "one two three four five six seven eight nine ten",
    "hello": "Hello there",
}


def teach(path: Path, **sizes) -> Path:
    """Save a tiny model that has learned ANSWERS by heart, with the end of turn."""
    import torch
    from transformers import AutoModelForCausalLM

    from fastft.data.conversation import Message
    from fastft.data.template.chat_template import load_template

    models.make_model(path, **{"hidden_size": 64, "max_position_embeddings": 8192, **sizes})
    model, template = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), load_template(str(path))
    pairs = [[Message("user", q), Message("assistant", a, train=True)] for q, a in ANSWERS.items()]
    encoded = template.encode_many(pairs)
    longest = max(len(each.ids) for each in encoded)
    ids_BT = torch.tensor([each.ids + [0] * (longest - len(each.ids)) for each in encoded])
    labels_BT = torch.tensor(
        [
            [i if t else -100 for i, t in zip(each.ids, each.trained)] + [-100] * (longest - len(each.ids))
            for each in encoded
        ]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    for _ in range(400):
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.005:
            break
    assert loss < 0.05, f"the model did not learn its answers (loss {loss:.3f})"
    model.save_pretrained(path)
    return path


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.content)

    @property
    def error(self) -> dict:
        return self.json["error"]


@dataclass
class Stream:
    """A stream of server-sent events that has been read to its end."""

    status: int
    events: list[dict]
    comments: list[str]
    done: bool
    first_s: float | None = None
    """When the first event came, on time.monotonic's clock."""

    def text(self, index: int = 0) -> str:
        return "".join(c["delta"].get("content", "") for c in self.choices(index))

    def choices(self, index: int = 0) -> list[dict]:
        return [c for event in self.events for c in event.get("choices", ()) if c["index"] == index]

    def finish_reasons(self, index: int = 0) -> list[str]:
        return [c["finish_reason"] for c in self.choices(index) if c["finish_reason"]]


@dataclass
class WorkerProcess:
    url: str
    name: str
    process: subprocess.Popen
    said: list[str] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname, parts.port

    def connect(self, timeout: float = 120) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=timeout)

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: dict | bytes, **headers: str) -> Reply:
        return self.request("POST", path, body, headers)

    def request(self, method: str, path: str, body: dict | bytes | None = None, headers: dict | None = None) -> Reply:
        connection = self.connect()
        try:
            content = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def ask(self, question: str = "count", **more) -> dict:
        """The body of a chat request, greedy unless `more` says otherwise."""
        messages = [{"role": "user", "content": question}]
        return {"model": self.name, "messages": messages, "temperature": 0, **more}

    def chat(self, question: str = "count", **more) -> Reply:
        return self.post("/v1/chat/completions", self.ask(question, **more))

    def stream(self, question: str = "count", path: str = "/v1/chat/completions", **more) -> Stream:
        connection = self.connect()
        try:
            body = json.dumps(self.ask(question, stream=True, **more)).encode()
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return read_stream(response)
        finally:
            connection.close()

    def open(self, body: dict, path: str = "/v1/chat/completions", receive_buffer: int | None = None) -> socket.socket:
        """Send a request and return its socket; what the worker answers is left unread."""
        connection = socket.socket()
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(120)
        connection.connect(self.address)
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        return connection

    def health(self) -> dict:
        return self.get("/health").json

    def metric(self, name: str) -> float:
        """The value of a figure, named as in /metrics with its labels."""
        text = self.get("/metrics").content.decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def idle(self) -> bool:
        health = self.health()
        return health["running"] == health["waiting"] == 0


def read_stream(response) -> Stream:
    events, comments, done, first = [], [], False, None
    for line in response:
        line = line.decode().rstrip("\r\n")
        if line.startswith(":"):
            comments.append(line[1:].strip())
        elif line == "data: [DONE]":
            done = True
        elif line.startswith("data: "):
            assert not done, "an event after [DONE]"
            first = first or time.monotonic()
            events.append(json.loads(line[6:]))
    return Stream(response.status, events, comments, done, first)


def wait_until(holds: Callable[[], bool], what: str, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"did not come to pass: {what}"
        time.sleep(0.02)


def started(kind: type[WorkerProcess], command: list[str], **environment: str) -> contextlib.AbstractContextManager:
    """A process that says "ready URL…"; killed at the end, with all that it started."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = {**os.environ, **SETTINGS, **environment}
    return until_the_end(kind, subprocess.Popen(command, text=True, env=env, start_new_session=True, **pipes))


@contextlib.contextmanager
def until_the_end(kind: type[WorkerProcess], process: subprocess.Popen | forks.Process) -> Iterator:
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
    reader.start()
    try:
        ready = process.stdout.readline().split()
        if ready[:1] != ["ready"]:
            process.wait(60)
            reader.join(60)
            raise AssertionError("".join(said))
        url, _, name = ready[1].partition("#")
        yield kind(url, name, process, said)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        reader.join(10)
        process.stderr.close()


def worker(
    model: Path, *flags: str, launcher: tuple[str, ...] = ()
) -> contextlib.AbstractContextManager[WorkerProcess]:
    """A worker that is ready. `launcher`: a command that starts it."""
    command = ["-m", "fastft.serve.worker", "--model", str(model), *flags]
    if launcher:
        return started(WorkerProcess, [*launcher, sys.executable, *command])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return until_the_end(WorkerProcess, forks.Process(command, env={**os.environ, **SETTINGS}, **pipes))
