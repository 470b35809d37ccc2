"""`fastft serve` on real models: one command starts a worker for each directory, and ends them with itself."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import gateways, models
from helpers.serving import ENVIRONMENT, read_stream, wait_until

MORE = {"ignore_eos": True, "max_tokens": 12}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    models.make_model(path / "tiny")
    return path


@pytest.fixture(scope="module")
def running(directory, tmp_path_factory):
    record = tmp_path_factory.mktemp("record")
    flags = ["--model", str(directory / "tiny"), f"second={directory / 'tiny'}", "--record", str(record)]
    with gateways.gateway(*flags) as process:
        process.name, process.record = "tiny", record
        yield process


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(each) for each in found.stdout.split()]


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def test_each_directory_is_a_model_and_answers(running):
    assert [each["id"] for each in running.get("/v1/models").json["data"]] == ["tiny", "second"]
    for name in ("tiny", "second"):
        reply = running.post("/v1/chat/completions", running.ask("hello", **MORE) | {"model": name})
        assert reply.status == 200 and reply.json["model"] == name == reply.headers["x-fastft-model"]
        assert reply.json["usage"]["completion_tokens"] == 12


def test_the_record_equals_what_clients_received(running):
    received = {}
    for number in range(6):
        connection = running.connect()
        body = running.ask(f"hello {number}", stream=True, seed=number, **MORE) | {"temperature": 1}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        received[response.getheader("x-fastft-event")] = read_stream(response).text()
        connection.close()
    for each, text in received.items():
        event = gateways.event_of(running.record, each)
        assert event["answers"][0] == {"content": text, "finish_reason": "length"} and event["outcome"] == "answered"
        assert event["completion_tokens"] == 12, "though the client did not ask for usage"


def test_what_the_worker_refuses_comes_through(running):
    reply = running.chat("hello", temperature=9)
    assert reply.status == 400 and reply.error["param"] == "temperature"
    ignored = running.chat("hello", tools=[{"type": "function", "function": {"name": "f"}}], **MORE)
    assert ignored.headers["x-fastft-ignored"] == "tools"


def test_plain_completions_go_the_same_way(running):
    reply = running.post("/v1/completions", {"model": "tiny", "prompt": "hello", "max_tokens": 5, "ignore_eos": True})
    assert reply.status == 200 and reply.json["usage"]["completion_tokens"] == 5
    event = gateways.event_of(running.record, reply.headers["x-fastft-event"])
    assert event["prompt"] == "hello" and event["answers"][0]["content"] == reply.json["choices"][0]["text"]


def test_the_gateway_holds_no_torch(running):
    """It is small: what computes is the workers'."""
    maps = Path(f"/proc/{running.process.pid}/maps").read_text()
    assert "libtorch" not in maps and "site-packages/numpy" not in maps


@pytest.mark.parametrize(
    "number, gone_quietly", [(signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGKILL, False)]
)
def test_workers_end_with_it(directory, number, gone_quietly):
    """After kill -9, they notice by themselves."""
    with gateways.gateway("--model", str(directory / "tiny")) as process:
        workers = children(process.process.pid)
        assert len(workers) == 1 and alive(workers[0])
        process.process.send_signal(number)
        code = process.process.wait(60)
        assert (code == 0) == gone_quietly
        if gone_quietly:
            assert not alive(workers[0])
        wait_until(lambda: not alive(workers[0]), "the worker is gone")


def test_a_worker_that_dies_is_said_and_its_model_is_503(directory):
    with gateways.gateway("--model", str(directory / "tiny"), "--check_s", "0.3") as process:
        process.name = "tiny"
        os.kill(children(process.process.pid)[0], signal.SIGKILL)
        wait_until(lambda: any("the worker of tiny has ended (SIGKILL" in line for line in process.said), "it is said")
        reply = process.chat("hello")
        assert reply.status == 503 and reply.error["code"] == "no_worker"


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path):
    broken = tmp_path / "broken"
    models.make_model(broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    command = [sys.executable, "-m", "fastft", "serve", "--port", "0", "--model", str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and done.stdout == "" and len(errors) == 1
    assert "the worker of broken: " in errors[0] and "Traceback" not in done.stderr
