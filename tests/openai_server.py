"""An OpenAI-compatible endpoint on loopback that answers by script and fails on purpose, for tests over real HTTP.

    with endpoint(reply) as server: …  server.url, server.requests

`reply(body, number)` returns the text of the answer to the `number`-th request, a `Failure`, or a whole body (bytes).
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
    """`status` with an error's body; 0 closes the connection in the middle of an answer; `wait_s` before anything is sent."""

    status: int = 500
    message: str = "no"
    retry_after: str | None = None
    wait_s: float = 0.0


@dataclass
class Server:
    url: str
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    paid: int = 0  # answers that were sent whole
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextlib.contextmanager
def endpoint(reply: Callable[[dict, int], str | bytes | Failure]) -> Iterator[Server]:
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
                self.send(
                    answer.status, json.dumps({"error": {"message": answer.message}}).encode(), answer.retry_after
                )
                return
            content = answer if isinstance(answer, bytes) else completion(answer, body)
            self.send(200, content)
            with server.lock:
                server.paid += not isinstance(answer, bytes)

        def send(self, status: int, content: bytes, retry_after: str | None = None, length: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(length or len(content)))
            if retry_after:
                self.send_header("Retry-After", retry_after)
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


def completion(text: str, body: dict) -> bytes:
    tokens = sum(len(message["content"]) for message in body["messages"]) // 4
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": tokens, "completion_tokens": len(text) // 4, "total_tokens": tokens + len(text) // 4}
    reply = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [choice],
        "usage": usage,
    }
    return json.dumps(reply).encode()
