"""Run an OpenAI-compatible endpoint on loopback that answers by script and fails on purpose, for tests over real HTTP.

    with endpoint(reply) as server: …  server.url, server.requests

`reply(body, number)` returns the text of the answer to the `number`-th request (from 0 on), a `Failure`, or a whole body (bytes).
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


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


@dataclass
class Server:
    """A running endpoint, and what it was sent."""

    url: str
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    paid: int = 0  # answers by `reply` that were sent whole
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextlib.contextmanager
def endpoint(reply: Callable[[dict, int], str | bytes | Failure]) -> Iterator[Server]:
    """Serve until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number = len(server.requests)
                server.requests.append(body)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
            answer = reply(body, number)
            with contextlib.suppress(OSError):
                self.answer(answer, body)

        def answer(self, answer: str | bytes | Failure, body: dict) -> None:
            if isinstance(answer, Failure):
                time.sleep(answer.wait_s)
                if answer.status == 0:
                    self.send(200, b'{"id": "x", "choices": [{"ind', length=500)
                    self.close_connection = True
                    return
                error = {"message": answer.message, "code": answer.code}
                headers = {"Retry-After": answer.retry_after, "Location": answer.location}
                self.send(answer.status, json.dumps({"error": error}).encode(), headers)
                return
            content = answer if isinstance(answer, bytes) else completion(answer, body)
            self.send(200, content)
            with server.lock:
                server.paid += not isinstance(answer, bytes)

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

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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
