"""What goes over the wire: proxies, redirects, headers and times to wait, with no key for another host."""

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import openai_server
from helpers.judging import SECRET, error_of, run_answer, write_ground
from helpers.openai_server import Failure, completion

from fastft.errors import UserError
from fastft.inference.budget import Money
from fastft.inference.client import Client
from fastft.inference.completion import ErrorInBody, read_completion
from fastft.inference.connection import Connection
from fastft.inference.endpoint import Limits
from fastft.inference.transport import Unreached, proxy_for, retry_after_s, send

OK = (200, {}, completion("Fine.", {"model": "m", "messages": []}))
ASK = [{"role": "user", "content": "What is one?"}]


@contextlib.contextmanager
def recorded(answer, tls=None):
    """Serve on loopback: `answer(path)` gives (status, headers, content). Yields the URL and the requests as (path, headers)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            status, headers, content = answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def ask(address: str, **options) -> str:
    return asyncio.run(Client(address, Limits(retries=0), **options).ask(ASK)).text


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "3"}, 3.0),
        ({"retry-after-ms": "-4", "retry-after": "3"}, 3.0),
        ({"retry-after": lambda now: formatdate(now + 4000, usegmt=True)}, 4000.0),
        ({"retry-after": lambda now: time.asctime(time.gmtime(now + 4000))}, 4000.0),
        ({"retry-after": lambda now: formatdate(now - 40, usegmt=True)}, 0.0),
        *(({"retry-after": said}, 86_400.0) for said in ("1e400", "inf", "9" * 5000, "Wed, 21 Oct 9998 07:28:00 GMT")),
        *(
            ({"retry-after": said}, 0.0)
            for said in ("", "-5", "nan", "later", "5, 10", "Wed, 99 Oct 2015 99:28:00 GMT")
        ),
        ({"retry-after": "Wed, 21 Oct 99999999999999 07:28:00 GMT"}, 0.0),
        ({}, 0.0),
    ],
)
def test_a_time_to_wait_is_read_in_every_form(monkeypatch, headers, seconds):
    monkeypatch.setenv("TZ", "America/New_York")  # a date without a zone is UTC, wherever the run is
    time.tzset()
    said = {name: value(time.time()) if callable(value) else value for name, value in headers.items()}
    try:
        assert retry_after_s(said) == pytest.approx(seconds, abs=600 if said != headers else 1e-6)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_proxy_may_be_named_without_its_scheme_and_with_a_password(monkeypatch):
    with recorded(lambda path: OK) as (url, seen):
        monkeypatch.setenv("HTTP_PROXY", url.replace("http://", "me:word@"))
        assert ask("http://nowhere.invalid/v1#m") == "Fine."
    [(path, headers)] = seen
    assert (
        path == "http://nowhere.invalid/v1/chat/completions" and headers["proxy-authorization"] == "Basic bWU6d29yZA=="
    )


def test_no_proxy_may_name_a_port(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1:8000,localhost")
    assert proxy_for("http://127.0.0.1:8000/v1") is None and proxy_for("http://localhost:1/v1") is None
    assert proxy_for("http://127.0.0.1:8001/v1") == "http://127.0.0.1:9"


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1080", "http://", "http://127.0.0.1:99999"])
def test_a_proxy_that_cannot_be_used_is_one_line(monkeypatch, proxy):
    for name in ("HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(UserError, match="correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY"):
        Client("http://nowhere.invalid/v1#m")


def test_a_redirect_takes_none_of_the_headers_to_another_host(monkeypatch):
    """Gateways want keys in headers of their own, which are as secret as the usual one."""
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"api-key: {SECRET}")
    with recorded(lambda path: OK) as (elsewhere, away):

        def answer(path):
            return (307, {"Location": "/v2/chat"} if path.startswith("/v1") else {"Location": f"{elsewhere}/v3"}, b"")

        with recorded(answer) as (url, seen):
            monkeypatch.setenv("OPENAI_BASE_URL", url)
            assert ask(f"{url}/v1#m") == "Fine."
    assert [path for path, _ in seen] == ["/v1/chat/completions", "/v2/chat"]
    assert all(headers["api-key"] == SECRET and SECRET in headers["authorization"] for _, headers in seen)
    [(path, headers)] = away
    assert path == "/v3" and SECRET not in str(headers) and headers["content-type"] == "application/json"


def test_a_post_is_never_sent_again_as_a_get():
    with recorded(lambda path: (302, {"Location": "/login"}, b"")) as (url, seen):
        with pytest.raises(Exception, match="302"):
            ask(f"{url}/v1#m")
        assert len(seen) == 1
        asyncio.run(send("GET", url, {}))
        assert [path for path, _ in seen[1:]][:2] == ["/", "/login"] and len(seen) < 10, "and not for ever"


def test_what_stands_behind_a_question_mark_stays_there():
    with recorded(lambda path: OK) as (url, seen):
        ask(f"{url}/v1/?api-version=2024-10-21#m")
        connection = Connection(f"{url}/v1?api-version=1#m")
        asyncio.run(connection.request("GET", "/batches?limit=100"))
    assert [path for path, _ in seen] == [
        "/v1/chat/completions?api-version=2024-10-21",
        "/v1/batches?limit=100&api-version=1",
    ]


@pytest.mark.parametrize("variable", ["OPENAI_ORG_ID", "OPENAI_CUSTOM_HEADERS"])
def test_a_header_that_none_can_be_is_one_line_without_it(monkeypatch, variable):
    monkeypatch.setenv(variable, f"X-Own: {SECRET}\rX-Other: 1\u20ac")
    with pytest.raises(UserError, match=f"{variable} holds a character") as caught:
        Client("https://api.openai.com/v1#m")
    assert SECRET not in str(caught.value)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1\n")  # `export OPENAI_ORG_ID=$(cat file)` in some shells
    monkeypatch.delenv("OPENAI_CUSTOM_HEADERS", raising=False)
    assert Client("https://api.openai.com/v1#m").connections[0].headers["OpenAI-Organization"] == "org-1"


@pytest.mark.parametrize("host", ["a..b", "a" * 70 + ".com"])
def test_a_name_that_no_host_can_have_is_one_line(tmp_path, capsys, host):
    assert "cannot be reached" in error_of(capsys, [*write_ground(tmp_path, 1), "--judge", f"http://{host}/v1#j"])
    with pytest.raises(Unreached):
        asyncio.run(send("GET", f"http://{host}/", {}))


def test_a_name_may_have_a_space_and_must_be_utf8(tmp_path, capsys):
    with openai_server.endpoint(lambda body, number: "Fine.") as server:
        options = [write_ground(tmp_path, 1)[4], "-o", str(tmp_path / "o.jsonl"), "--model"]
        assert run_answer([*options, f"{server.url}#my model"]) == 0 and server.requests[0]["model"] == "my model"
        capsys.readouterr()
        assert run_answer([*options, f"{server.url}#my m\udcff"]) == 1
        assert "#my m\ufffd: must be URL#name" in capsys.readouterr().err


def test_a_long_header_costs_no_reply():
    with recorded(lambda path: (200, {"Set-Cookie": "a" * 20_000}, OK[2])) as (url, seen):
        assert ask(f"{url}/v1#m") == "Fine." and len(seen) == 1


@pytest.mark.parametrize("code", ["²", "9" * 5000, 5, [], None])
def test_a_code_that_is_no_status_is_an_error_that_may_pass(code):
    assert ErrorInBody({"message": "no", "code": code}).status_code == 502


def test_a_count_that_no_request_has_is_none():
    body = completion("Fine.", {"model": "m", "messages": []})
    assert read_completion(body).usage == (0, 1)
    assert (
        read_completion(body.replace(b'"completion_tokens": 1', b'"completion_tokens": 1' + b"0" * 400)).usage is None
    )


def test_what_an_endpoint_says_moves_no_cursor(tmp_path, capsys):
    with openai_server.endpoint(lambda body, number: Failure(400, "no \x1b[2J\x9b1m")) as server:
        said = error_of(capsys, [*write_ground(tmp_path, 1), "--judge", f"{server.url}#j"])
    assert "no \ufffd[2J\ufffd1m" in said


def test_a_certificate_of_nobody_who_is_trusted_ends_the_run_at_once(tmp_path, monkeypatch):
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate]
    options = ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with recorded(lambda path: OK, context) as (url, seen):
        money = Money(1.0)
        with pytest.raises(UserError, match="SSL_CERT_FILE may name") as caught:
            ask(f"{url}/v1#m", price=(1.0, 1.0), money=money)
        assert "certificate verify failed" in str(caught.value) and not seen and not money.spent
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        assert ask(f"{url}/v1#m") == "Fine."
