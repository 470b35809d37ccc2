"""Notices of AWS, GCP and Azure, from a server that plays each cloud's metadata service over real HTTP."""

import json
import logging
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from fastft.train.preemption import notices
from fastft.train.preemption.stop import NOTICE_S

PATIENCE_S = 10.0
VARIABLES = {
    "aws": "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "gcp": "GCE_METADATA_HOST",
    "azure": "AZURE_METADATA_ENDPOINT",
}


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


class Heard:
    """The part of Stopping that a watcher uses."""

    def __init__(self):
        self.reason, self.seconds, self.save_soon = None, None, False

    def request(self, reason: str, seconds: float) -> None:
        self.seconds, self.reason = seconds, reason


@pytest.fixture
def play(monkeypatch):
    """Start one cloud, and have the addresses of the others lead nowhere."""
    clouds = []

    def start(kind: str | None) -> Cloud | None:
        for name, variable in VARIABLES.items():
            host = "127.0.0.1:9"  # the discard port, where nobody listens
            monkeypatch.setenv(variable, host if name == "gcp" else f"http://{host}")
        if kind is None:
            return None
        clouds.append(Cloud(kind))
        host = f"127.0.0.1:{clouds[-1].server_address[1]}"
        monkeypatch.setenv(VARIABLES[kind], host if kind == "gcp" else f"http://{host}/")
        return clouds[-1]

    yield start
    for cloud in clouds:
        cloud.preempt(0)
        cloud.shutdown()
        cloud.server_close()


def eventually(condition) -> bool:
    end = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


@pytest.mark.parametrize("kind", VARIABLES)
def test_a_notice_asks_for_a_stop_and_says_how_much_time_is_left(play, kind, caplog):
    caplog.set_level(logging.INFO, logger="fastft")
    cloud, heard = play(kind), Heard()
    notices.watch(heard, poll_s=0.05)
    assert eventually(lambda: cloud.asked > 1) and heard.reason is None
    assert caplog.messages == [f"notices: from the metadata service of {kind.upper()}"]
    cloud.preempt(20)
    assert eventually(lambda: heard.reason)
    assert heard.reason.startswith({"aws": "AWS", "gcp": "GCP", "azure": "Azure"}[kind])
    assert heard.seconds == (NOTICE_S if kind == "gcp" else 20)  # by the service's clock; this machine's is years off


@pytest.mark.parametrize("kind", VARIABLES)
def test_a_service_that_fails_for_a_while_is_asked_again(play, kind):
    cloud, heard = play(kind), Heard()
    notices.watch(heard, poll_s=0.02)
    assert eventually(lambda: cloud.asked > 0)
    cloud.failures = 3
    assert eventually(lambda: cloud.failures == 0) and heard.reason is None
    cloud.preempt(20)
    assert eventually(lambda: heard.reason)


def test_an_aws_notice_never_gives_more_than_two_minutes(play):
    cloud, heard = play("aws"), Heard()
    cloud.preempt(100_000)
    notices.watch(heard, poll_s=0.02)
    assert eventually(lambda: heard.reason) and heard.seconds == notices.AWS_NOTICE_S


def test_a_rebalance_recommendation_saves_once_and_goes_on(play):
    cloud, heard = play("aws"), Heard()
    cloud.rebalance = True
    notices.watch(heard, poll_s=0.02)
    assert eventually(lambda: heard.save_soon)
    heard.save_soon, asked = False, cloud.asked
    assert eventually(lambda: cloud.asked > asked + 4)
    assert not heard.save_soon and heard.reason is None


def test_without_a_metadata_service_nothing_is_watched(play, caplog):
    caplog.set_level(logging.INFO, logger="fastft")
    play(None)
    thread = notices.watch(Heard())
    thread.join(PATIENCE_S)
    assert not thread.is_alive() and not caplog.records
