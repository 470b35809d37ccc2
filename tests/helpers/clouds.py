"""A server that plays a cloud's metadata service over real HTTP: AWS's, GCP's or Azure's."""

import json
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from fastft.train.preemption import notices

VARIABLES = {
    "aws": "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "gcp": "GCE_METADATA_HOST",
    "azure": "AZURE_METADATA_ENDPOINT",
}
"""Environment variables with the service's address."""


class Cloud(ThreadingHTTPServer):
    """A cloud whose clock says `now`, and whose metadata service says `action`, `rebalance` and so on."""

    daemon_threads = True

    def __init__(self, kind: str):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.kind, self.now, self.asked, self.failures = kind, 1_700_000_000.0, 0, 0
        self.action = self.rebalance = None
        self.switched_on = False
        self.changed = threading.Condition()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def preempt(self, in_seconds: float) -> None:
        with self.changed:
            self.action = self.now + in_seconds
            self.changed.notify_all()


class _Answers(BaseHTTPRequestHandler):
    def log_message(self, *words) -> None:
        pass

    def date_time_string(self, timestamp=None) -> str:
        return formatdate(self.server.now, usegmt=True)

    def do_PUT(self) -> None:
        wanted = self.path == "/latest/api/token" and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self.answer(200, f"token-{self.server.asked}") if self.server.kind == "aws" and wanted else self.answer(404)

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.server.failures:
            self.server.failures -= 1
            return self.answer(500)
        url = urlsplit(self.path)
        getattr(self, self.server.kind)(url.path, parse_qs(url.query))

    def aws(self, path: str, query: dict) -> None:
        if not self.headers.get("X-aws-ec2-metadata-token", "").startswith("token-"):
            self.answer(401)
        elif path == "/latest/meta-data/spot/instance-action" and self.server.action:
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.server.action))
            self.answer(200, json.dumps({"action": "terminate", "time": when}))
        elif path == "/latest/meta-data/events/recommendations/rebalance" and self.server.rebalance:
            self.answer(200, json.dumps({"noticeTime": "2023-11-14T22:13:20Z"}))
        else:
            self.answer(404)

    def gcp(self, path: str, query: dict) -> None:
        if path != "/computeMetadata/v1/instance/preempted" or self.headers.get("Metadata-Flavor") != "Google":
            return self.answer(403)
        with self.server.changed:
            if query.get("last_etag") == ["before"]:
                self.server.changed.wait_for(lambda: self.server.action, float(query["timeout_sec"][0]))
            gone = self.server.action
        self.answer(200, "TRUE" if gone else "FALSE", "after" if gone else "before")

    def azure(self, path: str, query: dict) -> None:
        if self.headers.get("Metadata") != "true":
            return self.answer(400)
        if path == "/metadata/instance":
            return self.answer(200, json.dumps({"compute": {"name": "vm-7"}}))
        if path != "/metadata/scheduledevents":
            return self.answer(400)
        if not self.server.switched_on:  # minutes, on a fresh machine
            time.sleep(2 * notices.PROBE_S)
            self.server.switched_on = True
        now = formatdate(self.server.now, usegmt=True)
        events = [
            {"EventId": "1", "EventType": "Reboot", "NotBefore": "", "Resources": ["VM-7"]},
            {"EventId": "2", "EventType": "Preempt", "NotBefore": now, "Resources": ["vm-8"]},
        ]
        if self.server.action:
            when = formatdate(self.server.action, usegmt=True)
            events.append({"EventId": "3", "EventType": "Preempt", "NotBefore": when, "Resources": ["vm-8", "VM-7"]})
        self.answer(200, json.dumps({"Events": events}))

    def answer(self, code: int, body: str = "", tag: str = "0") -> None:
        self.send_response(code)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())
