"""Notices of AWS, GCP and Azure, from a server that plays each cloud's metadata service over real HTTP."""

import logging
import time

import pytest
from helpers.clouds import VARIABLES, Cloud

from fastft.train.preemption import notices
from fastft.train.preemption.stop import NOTICE_S

PATIENCE_S = 10.0


class Heard:
    """The part of StopFlag that a watcher uses."""

    def __init__(self):
        self.reason, self.seconds, self.save_soon = None, None, False

    def set(self, reason: str, seconds: float) -> None:
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
