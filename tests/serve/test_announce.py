"""Workers that announce themselves to a gateway, are asked while they are there, and take their leave."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import clouds, gateways, models
from helpers.serving import SETTINGS, wait_until, worker

from fastft.errors import UserError
from fastft.serve.announce import reachable_url

ADMIN, OWN = "the gateway's admin key", "the worker's key"
KEYS = {"ADMIN_KEY": ADMIN, "OWN_KEY": OWN}
MORE = {"max_tokens": 3, "ignore_eos": True}
NOWHERE = "127.0.0.1:9"  # the discard port: no cloud's metadata service


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    models.make_model(path)
    return path


@pytest.fixture(autouse=True)
def no_cloud(monkeypatch):
    for name, variable in clouds.VARIABLES.items():
        monkeypatch.setenv(variable, NOWHERE if name == "gcp" else f"http://{NOWHERE}")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def gateway(directory: Path, *flags: str):
    config = {"admin_key_env": "ADMIN_KEY", "worker_key_envs": ["OWN_KEY"], "check_s": 0.5}
    return gateways.gateway(*flags, config=config, directory=directory)


def announced(tiny: Path, to: str, *flags: str):
    address = to.removesuffix("/v1")
    return worker(
        tiny, "--api_key_env", "OWN_KEY", "--announce", address, "--announce_key_env", "ADMIN_KEY", *flags
    )  # fmt: skip


def served(process) -> list[str]:
    return [each["id"] for each in process.get("/v1/models").json["data"]]


def test_a_worker_comes_and_goes_by_itself(tiny, tmp_path):
    with gateway(tmp_path) as front:
        front.name = "tiny"
        assert served(front) == []
        with announced(tiny, front.url) as process:
            wait_until(lambda: served(front) == ["tiny"], "the gateway knows it")
            assert front.chat("hello", **MORE).status == 200, "and has its key"
            process.process.send_signal(signal.SIGTERM)
            assert process.process.wait(60) == 0
        assert served(front) == [] and front.chat("hello", **MORE).status == 404
        assert ADMIN not in "".join(process.said + front.said) and OWN not in "".join(process.said + front.said)


def test_a_gateway_that_is_started_later_or_again_hears_of_it(tiny, tmp_path):
    with gateway(tmp_path) as first:
        port = first.address[1]
    with announced(tiny, f"http://127.0.0.1:{port}") as process:
        wait_until(lambda: any("does not take this worker" in line for line in process.said), "it is said")
        with gateway(tmp_path, "--port", str(port)) as second:
            wait_until(lambda: served(second) == ["tiny"], "the new gateway knows it")
        assert sum("does not take this worker" in line for line in process.said) == 1, "once, not at every try"


def test_a_gateway_that_refuses_is_named_with_its_words(tiny, tmp_path, monkeypatch):
    with gateway(tmp_path) as front:
        monkeypatch.setenv("ADMIN_KEY", "a wrong one")
        with announced(tiny, front.url) as process:
            wait_until(lambda: any("does not take this worker" in line for line in process.said), "it is said")
            assert process.get("/health").status == 200, "it serves all the same"


def test_a_clouds_notice_drains_it(tiny, tmp_path, monkeypatch):
    """The gateway asks it nothing more, a running answer is finished, and the process ends by itself."""
    cloud = clouds.Cloud("aws")
    monkeypatch.setenv(clouds.VARIABLES["aws"], f"http://127.0.0.1:{cloud.server_address[1]}/")
    with gateway(tmp_path) as front:
        front.name = "tiny"
        with announced(tiny, front.url) as process:
            wait_until(lambda: served(front) == ["tiny"], "the gateway knows it")
            cloud.preempt(120)
            wait_until(lambda: served(front) == [], "the gateway has forgotten it")
            assert process.process.wait(60) == 0
            assert any("AWS: spot terminate" in line for line in process.said)
    cloud.shutdown()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--announce", "10.0.0.1:8000", "--announce_key_env", "HOME"], "must be the gateway's address"),
        (["--announce", "http://127.0.0.1:1"], "--announce needs --announce_key_env"),
        (
            ["--announce", "http://127.0.0.1:1", "--announce_key_env", "NO_SUCH"],
            "there is no such environment variable",
        ),
    ],
)
def test_an_address_that_cannot_be_announced_to_is_one_line(tiny, flags, words):
    command = [sys.executable, "-m", "fastft.serve.worker", "--model", str(tiny), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **SETTINGS})
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_what_listens_on_all_addresses_is_reached_by_the_one_that_reaches_the_gateway():
    assert reachable_url("0.0.0.0", 9000, "http://127.0.0.1:8000") == "http://127.0.0.1:9000/v1"
    assert reachable_url("10.1.2.3", 9000, "http://127.0.0.1:8000") == "http://10.1.2.3:9000/v1"
    assert reachable_url("worker-3", 9000, "http://127.0.0.1:8000") == "http://worker-3:9000/v1"
    with pytest.raises(UserError, match="is the name right"):
        reachable_url("0.0.0.0", 9000, "http://no-such-host.invalid:8000")
