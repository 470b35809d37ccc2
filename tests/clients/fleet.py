"""Fleets behind one URL of the gateway, real ones: `smg launch` before two workers, and Ray Serve with the example of
docs/serve.md (`make test-clients`).

What `fastft serve --model URL#NAME` relies on is tested here: answers, streams, the model's name, errors as they are, and that a
worker which is killed costs no request that had no answer yet.
"""

import concurrent.futures
import contextlib
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import environments
from helpers import gateways, serving
from helpers.ports import free_port
from helpers.serving import ANSWERS, ROOT, teach, wait_until


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@contextlib.contextmanager
def ended_with_its_group(command: list[str], log: Path):
    """A process that is killed at the end, with all that it has started."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    return teach(tmp_path_factory.mktemp("fleet") / "taught")


@pytest.fixture(scope="module")
def smg(taught, tmp_path_factory):
    """(gateway before smg, its two workers)."""
    port, place = free_port(), tmp_path_factory.mktemp("smg")
    with serving.worker(taught, "--name", "m") as a, serving.worker(taught, "--name", "m") as b:
        command = [environments.program("smg", "smg"), "launch", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--worker-urls", *(worker.url.removesuffix("/v1") for worker in (a, b)), "--policy", "round_robin"]
        command += ["--worker-startup-check-interval", "1", "--health-check-interval-secs", "1"]
        command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
        with ended_with_its_group(command, place / "smg.log"):
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/readiness"), "smg is ready", 120)
            flags = ["--model", f"http://127.0.0.1:{port}/v1#m", "--record", str(place / "record")]
            with gateways.gateway(*flags) as gateway:
                gateway.record = place / "record"
                wait_until(lambda: gateway.chat().status == 200, "smg knows its workers")
                yield gateway, (a, b)


def test_smg_answers_through_the_gateway(smg):
    gateway, _ = smg
    reply = gateway.chat()
    assert reply.json["choices"][0]["message"]["content"] == ANSWERS["count"]
    assert reply.json["model"] == reply.headers["x-fastft-model"] == "m"
    assert reply.json["usage"]["completion_tokens"] > 0


def test_smg_streams_through_the_gateway(smg):
    gateway, _ = smg
    stream = gateway.stream("emoji", stream_options={"include_usage": True})
    assert stream.text() == ANSWERS["emoji"] and stream.done and stream.finish_reasons() == ["stop"]
    assert {event["model"] for event in stream.events} == {"m"}
    assert stream.events[-1]["usage"]["completion_tokens"] > 0


def test_an_error_of_the_worker_comes_through_smg(smg):
    gateway, _ = smg
    refused = gateway.chat("long " * 2000)
    assert refused.status == 400 and refused.error["code"] == "context_length_exceeded"


def test_smg_asks_both_workers(smg):
    gateway, workers = smg
    before = [worker.metric('fastft_worker_requests_total{outcome="answered"}') for worker in workers]
    for _ in range(8):
        assert gateway.chat("hello").status == 200
    after = [worker.metric('fastft_worker_requests_total{outcome="answered"}') for worker in workers]
    assert all(now > then for now, then in zip(after, before)) and sum(after) == sum(before) + 8


def test_who_leaves_ends_the_work_behind_smg(smg):
    gateway, workers = smg
    connection = gateway.open(gateway.ask(max_tokens=8000, ignore_eos=True, stream=True))
    wait_until(lambda: any(worker.health()["running"] for worker in workers), "a worker answers")
    connection.close()
    wait_until(lambda: all(worker.idle() for worker in workers), "nobody works any more")


def test_a_worker_that_is_killed_costs_no_request(smg):
    """Of 60 requests, 8 at once, while one of two workers is killed: all are answered, by the other one. The last test: one
    worker is gone."""
    gateway, (a, _) = smg
    before = len(gateways.events(gateway.record))

    def ask(number: int) -> str:
        if number == 20:
            os.kill(a.process.pid, signal.SIGKILL)
        reply = gateway.chat()
        return reply.json["choices"][0]["message"]["content"] if reply.status == 200 else reply.content.decode()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        said = list(pool.map(ask, range(60)))
    assert set(said) == {ANSWERS["count"]}
    wait_until(lambda: len(gateways.events(gateway.record)) == before + 60, "the record has them")
    assert {event["outcome"] for event in gateways.events(gateway.record)[before:]} == {"answered"}


# Ray Serve -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_serve(taught, tmp_path_factory):
    """A gateway before the example of docs/serve.md, as it stands there but for the model, a CPU in the place of a GPU, and
    the port."""
    place, port = tmp_path_factory.mktemp("ray"), free_port()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serve.md").read_text(), re.DOTALL)
    [example] = [block for block in blocks if "serve.ingress" in block]
    for old, new in (("/shared/model", str(taught)), ('"num_gpus": 1', '"num_cpus": 0.5')):
        assert old in example
        example = example.replace(old, new)
    (place / "fleet.py").write_text(example)
    run = "import fleet, ray\nfrom ray import serve\nray.init(num_cpus=2, include_dashboard=False)\n"
    run += f"serve.start(http_options={{'host': '127.0.0.1', 'port': {port}}})\nserve.run(fleet.app, blocking=True)\n"
    (place / "run.py").write_text(run)
    # A busy machine is slower than Ray expects.
    slow = ["RAY_raylet_start_wait_time_s=180", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60", "RAY_USAGE_STATS_ENABLED=0"]
    command = ["env", *slow, "OMP_NUM_THREADS=1", environments.program("ray", "python"), str(place / "run.py")]
    with ended_with_its_group(command, place / "ray.log") as process:

        def is_ready() -> bool:
            assert process.poll() is None, (place / "ray.log").read_text()[-3000:]
            return answers(f"http://127.0.0.1:{port}/v1/models")

        wait_until(is_ready, "Ray Serve answers", 300)
        with gateways.gateway("--model", f"http://127.0.0.1:{port}/v1#mine") as gateway:
            gateway.name, gateway.metrics_of_a_replica = "mine", f"http://127.0.0.1:{port}/metrics"
            yield gateway


def test_ray_serve_answers_and_streams_through_the_gateway(ray_serve):
    reply = ray_serve.chat()
    assert reply.json["choices"][0]["message"]["content"] == ANSWERS["count"] and reply.json["model"] == "mine"
    stream = ray_serve.stream("emoji")
    assert stream.text() == ANSWERS["emoji"] and stream.done and stream.finish_reasons() == ["stop"]


def test_an_error_of_the_worker_comes_through_ray_serve(ray_serve):
    refused = ray_serve.chat("long " * 2000)
    assert refused.status == 400 and refused.error["code"] == "context_length_exceeded"


def test_who_leaves_ends_the_work_behind_ray_serve(ray_serve):
    """Ray passes the client's leaving on. Which replica had it, nobody outside can say: one of both will show it."""
    connection = ray_serve.open(ray_serve.ask(max_tokens=8000, ignore_eos=True, stream=True))
    assert connection.recv(1000)
    connection.close()

    def is_cancelled() -> bool:
        with urllib.request.urlopen(ray_serve.metrics_of_a_replica, timeout=30) as response:
            return b'fastft_worker_requests_total{outcome="cancelled"} 1.0' in response.read()

    wait_until(is_cancelled, "a replica has ended its answer")
    assert ray_serve.chat().status == 200
