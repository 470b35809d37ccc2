"""A real S3 server on loopback, and a proxy to it that can cut connections and slow them down."""

import contextlib
import logging
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator


class Line(socketserver.ThreadingTCPServer):
    """A proxy to `port`.

    Every `cut_every`-th connection is cut after 300 bytes of an answer, so 1 makes a server that never answers; 0 cuts none.
    Requests are slowed down to `bytes_per_s`; 0 is no limit.
    """

    allow_reuse_address = daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), _Connection)
        self.target, self.cut_every, self.bytes_per_s, self.connections, self.cuts = port, 0, 0, 0, 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """Print nothing: cutting connections is what this is for."""


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with self.server.lock:
            self.server.connections += 1
            cut = bool(self.server.cut_every) and self.server.connections % self.server.cut_every == 0
            self.server.cuts += cut
        with socket.create_connection(("127.0.0.1", self.server.target)) as upstream:
            back = threading.Thread(target=self._answers, args=(upstream, cut), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                while data := self.request.recv(16384):
                    if self.server.bytes_per_s:
                        time.sleep(len(data) / self.server.bytes_per_s)
                    upstream.sendall(data)
                upstream.shutdown(socket.SHUT_WR)
            back.join()

    def _answers(self, upstream: socket.socket, cut: bool) -> None:
        with contextlib.suppress(OSError):
            while data := upstream.recv(16384):
                self.request.sendall(data[:300] if cut else data)
                if cut:
                    self.request.shutdown(socket.SHUT_RDWR)
                    return
            self.request.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def s3(bucket: str = "runs") -> Iterator[Line]:
    """Start moto's server with one bucket, and point all S3 clients, those of child processes too, at the proxy to it."""
    import boto3
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
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket=bucket)
        yield line
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
        line.shutdown()
        line.server_close()
        server.stop()
