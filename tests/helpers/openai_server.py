"""Run an OpenAI-compatible endpoint on loopback that answers by script and fails on purpose, for tests over real HTTP.

    with endpoint(reply) as server: …  server.url, server.requests
    with endpoint(FaultyTeacher(), batches=BatchStore()) as server: …       # with /v1/files and /v1/batches, too

`reply(body, number)` returns the text of the answer to the `number`-th request (from 0 on), a `Failure`, or a whole body (bytes).
"""

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from helpers.openai_batches import BatchStore


@dataclass(frozen=True)
class Failure:
    """A reply that fails: `status` with an error as its body, sent after `wait_s` seconds.

    Status 0 closes the connection in the middle of an answer. `location` is where a redirect points to.
    """

    status: int = 500
    message: str = "no"
    retry_after: str | None = None
    wait_s: float = 0.0
    code: str | None = None
    location: str | None = None

    def body(self) -> bytes:
        return json.dumps({"error": {"message": self.message, "code": self.code}}).encode()


@dataclass
class Server:
    """A running endpoint, and what it was sent."""

    url: str
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    paid: int = 0  # answers by `reply` that were sent whole
    paid_for: Counter = field(default_factory=Counter)  # whole completions by their request (`digest_of`)
    touched: int = 0  # requests of any kind
    in_flight: int = 0
    ended: list[float] = field(default_factory=list)  # when each request was answered, on the monotonic clock
    pauses: list["Pause"] = field(default_factory=list)  # one for each Retry-After
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Pause:
    """A time for which the endpoint has asked not to be asked: seconds of the monotonic clock."""

    began: float
    ended: float
    in_flight: int  # requests that were being answered when it began, without the one that was refused
    started: list[float] = field(default_factory=list)  # seconds after `began` at which requests came in meanwhile
    unread: bool = False  # whether the run that it was said to was killed before it can have read it


class _Listener(ThreadingHTTPServer):
    request_queue_size = 128  # with the usual 5, the sixth of connections that are made at once comes in a second late


def digest_of(body: dict) -> str:
    """Return what tells one request from another."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def endpoint(
    reply: Callable[[dict, int], str | bytes | Failure], batches: BatchStore | None = None
) -> Iterator[Server]:
    """Serve until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server.touched += 1
            if batches and "/chat/" not in self.path:
                with contextlib.suppress(OSError):
                    self.send(*batches.handle(self.command, self.path, self.headers, content, answer_row))
                return
            body = json.loads(content)
            with server.lock:
                number = len(server.requests)
                server.requests.append(body)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                server.in_flight += 1
                now = time.monotonic()
                for pause in server.pauses:
                    if now < pause.ended:
                        pause.started.append(now - pause.began)
            answer = reply(body, number)
            try:
                with contextlib.suppress(OSError):
                    self.answer(answer, body)
            finally:
                with server.lock:
                    server.in_flight -= 1
                    server.ended.append(time.monotonic())

        def answer(self, answer: str | bytes | Failure, body: dict) -> None:
            if isinstance(answer, Failure):
                time.sleep(answer.wait_s)
                if answer.status == 0:
                    self.send(200, b'{"id": "x", "choices": [{"ind', length=500)
                    self.close_connection = True
                    return
                headers = {"Retry-After": answer.retry_after, "Location": answer.location}
                if answer.retry_after:
                    with server.lock:
                        now = time.monotonic()
                        server.pauses.append(Pause(now, now + float(answer.retry_after), server.in_flight - 1))
                self.send(answer.status, answer.body(), headers)
                return
            self.send(200, answer if isinstance(answer, bytes) else completion(answer, body))
            with server.lock:
                server.paid += not isinstance(answer, bytes)
                server.paid_for[digest_of(body)] += not isinstance(answer, bytes) or b'"choices": [{' in answer

        def send(self, status: int, content: bytes, headers: dict | None = None, length: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(length or len(content)))
            for name, value in (headers or {}).items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

        def log_message(self, *arguments) -> None:
            pass

    def answer_row(body: dict) -> tuple[int, bytes]:
        """Return (status, body) for a row of a batch."""
        with server.lock:
            number = len(server.requests)
            server.requests.append(body)
        answer = reply(body, number)
        if isinstance(answer, Failure):
            return answer.status or 500, answer.body()
        return 200, answer if isinstance(answer, bytes) else completion(answer, body)

    http = _Listener(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}/v1")
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def completion(content: str | list | None, body: dict, finish_reason: str = "stop", **message) -> bytes:
    """Return the body of a chat completion. `message` is what else its message holds, such as reasoning_content."""
    tokens, words = sum(len(each["content"]) for each in body["messages"]) // 4, len(content or "") // 4
    message = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    usage = {"prompt_tokens": tokens, "completion_tokens": words, "total_tokens": tokens + words}
    reply = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [choice],
        "usage": usage,
    }
    return json.dumps(reply).encode()
