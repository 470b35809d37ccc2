"""A real S3 server on loopback, and a proxy to it that fails on purpose: cut, slow, refusing, or not there at all."""

import contextlib
import logging
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers.ports import free_port


@dataclass
class Refusal:
    """What the proxy answers instead of the server, as S3 would: a status, its code and its message.

    `key` limits it to requests that are signed with this access key, `method` to requests of this kind (GET, PUT, …),
    `path` to those whose path holds this text.
    """

    status: int
    code: str
    message: str = ""
    key: str = ""
    method: str = ""
    path: str = ""

    def fits(self, head: bytes) -> bool:
        method, path = head.split(b" ", 2)[:2]
        return (
            (not self.key or f"Credential={self.key}/".encode() in head)
            and method.decode().startswith(self.method)
            and self.path in path.decode()
        )

    def answer(self, head: bytes) -> bytes:
        body = f'<?xml version="1.0"?><Error><Code>{self.code}</Code><Message>{self.message or self.code}</Message></Error>'
        lines = f"HTTP/1.1 {self.status} Refused\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}"
        return f"{lines}\r\nConnection: close\r\n\r\n{'' if head.startswith(b'HEAD') else body}".encode()


EXPIRED = Refusal(403, "ExpiredToken", "The provided token has expired.")
SKEWED = Refusal(
    403, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large."
)
BUSY = Refusal(503, "SlowDown", "Please reduce your request rate.")
FORBIDDEN = Refusal(403, "AccessDenied", "Access Denied")


class Line:
    """A proxy to `port`.

    Every `cut_every`-th connection is cut after 300 bytes of an answer, so 1 makes a server that never answers; 0 cuts none.
    Requests are slowed down to `bytes_per_s`; 0 is no limit. `refusal` answers in place of the server. After `drop` nobody
    listens and all connections are broken, as in an outage of the network, until `restore`.
    """

    def __init__(self, port: int):
        self.target, self.cut_every, self.bytes_per_s, self.connections, self.cuts = port, 0, 0, 0, 0
        self.refusal: Refusal | None = None
        self.refused = 0
        self.lock = threading.Lock()
        self.open: set[socket.socket] = set()
        self.server: _Server | None = None
        self.port = free_port()  # known, because it listens there again after an outage
        self.restore()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def restore(self) -> None:
        """Listen, at the same port as before."""
        self.server = _Server(("127.0.0.1", self.port), _Connection)
        self.server.line, self.port = self, self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def drop(self) -> None:
        """Listen no more, and break all connections."""
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.server = None
        with self.lock:
            for connection in self.open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        """End all faults."""
        self.cut_every, self.bytes_per_s, self.refusal = 0, 0, None
        if self.server is None:
            self.restore()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    block_on_close = False
    line: Line

    def handle_error(self, request, client_address) -> None:
        """Print nothing: failing connections are what this is for."""


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        line = self.line = self.server.line
        with line.lock:
            line.open.add(self.request)
            line.connections += 1
            cut = bool(line.cut_every) and line.connections % line.cut_every == 0
            line.cuts += cut
        try:
            self._forward(cut)
        finally:
            with line.lock:
                line.open.discard(self.request)

    def _forward(self, cut: bool) -> None:
        line = self.line
        with socket.create_connection(("127.0.0.1", line.target)) as upstream:
            back = threading.Thread(target=self._answers, args=(upstream, cut), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                while data := self.request.recv(16384):
                    if line.bytes_per_s:
                        time.sleep(len(data) / line.bytes_per_s)
                    refusal = line.refusal
                    if refusal and _begins_request(data) and refusal.fits(data):
                        line.refused += 1
                        self.request.sendall(refusal.answer(data))
                        self.request.shutdown(socket.SHUT_WR)
                        self._drain()
                        break
                    upstream.sendall(data)
                upstream.shutdown(socket.SHUT_WR)
            back.join()

    def _drain(self) -> None:
        """Read what is still sent, else the reset of the connection would overtake the answer."""
        self.request.settimeout(1)
        with contextlib.suppress(OSError):
            while self.request.recv(65536):
                pass

    def _answers(self, upstream: socket.socket, cut: bool) -> None:
        with contextlib.suppress(OSError):
            while data := upstream.recv(16384):
                self.request.sendall(data[:300] if cut else data)
                if cut:
                    self.request.shutdown(socket.SHUT_RDWR)
                    return
            self.request.shutdown(socket.SHUT_WR)


def _begins_request(data: bytes) -> bool:
    return data.split(b" ", 1)[0] in (b"GET", b"PUT", b"POST", b"HEAD", b"DELETE")


def write_credentials(path: Path, key: str) -> None:
    """Write an AWS credentials file with the temporary credentials of `key`."""
    text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\naws_session_token = token-{key}\n"
    path.write_text(text)


@contextlib.contextmanager
def s3(bucket: str = "runs") -> Iterator[Line]:
    """Start moto's server with one bucket, and point all S3 clients, those of child processes too, at the proxy to it."""
    import boto3
    from moto.core.base_backend import BackendDict
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    port = server._server.server_port
    line = Line(port)
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": line.url,
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        BackendDict.reset()  # all of moto's servers in a process share their buckets
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket=bucket)
        yield line
    finally:
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
        line.drop()
        server.stop()
