"""When the next checkpoint is due: after a number of steps, or at Young's interval for what was measured, on a fake clock."""

import logging
from types import SimpleNamespace

import pytest

from fastft.config import CheckpointConfig
from fastft.train.checkpoint.save_interval import SaveInterval


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("fastft.train.checkpoint.save_interval.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def save_interval(every="auto", hours=0.5, machines=1, blocking_s=None, upload_s=None):
    writer = SimpleNamespace(
        last_blocking_s=blocking_s, uploader=None if upload_s is None else SimpleNamespace(seconds=upload_s)
    )
    return SaveInterval(CheckpointConfig(every=every, preemption_hours=hours), machines, writer), writer


def test_steps_are_counted_and_the_clock_is_not_asked(clock, caplog):
    by_count, _ = save_interval(every=20)
    clock.now += 1e6
    assert [step for step in range(1, 61) if by_count.is_due(step)] == [20, 40, 60]
    assert not by_count.wants_one()
    by_count.saved()
    assert not caplog.records


def test_every_0_never_saves(clock):
    never, _ = save_interval(every=0)
    clock.now += 1e6
    assert not any(never.is_due(step) for step in range(1, 100)) and not never.wants_one()


@pytest.mark.parametrize(
    ("blocking_s", "hours", "machines", "upload_s", "interval_s"),
    [
        (2.0, 0.5, 1, None, 84.85),  # sqrt(2 x 2 x 1,800)
        (2.0, 0.5, 4, None, 42.43),  # four machines: one of them is preempted four times as often
        (2.0, 0.5, 1, 300.0, 300.0),  # never before the last one is safe
        (None, 0.5, 1, None, 60.0),  # nothing measured: 1 s is assumed
    ],
)
def test_auto_waits_for_youngs_interval(clock, blocking_s, hours, machines, upload_s, interval_s):
    auto, writer = save_interval(hours=hours, machines=machines, blocking_s=blocking_s, upload_s=upload_s)
    assert auto.interval_s() == pytest.approx(interval_s, abs=0.01)
    assert not auto.is_due(20)
    clock.now += interval_s - 0.1
    assert not auto.wants_one()
    clock.now += 0.2
    assert auto.wants_one()
    writer.last_blocking_s = blocking_s or 1.0  # a save that was begun has been measured
    auto.saved()
    assert not auto.wants_one()


def test_it_logs_the_interval_and_again_when_that_has_doubled(clock, caplog):
    caplog.set_level(logging.INFO, logger="fastft")
    auto, writer = save_interval(blocking_s=2.0)
    for blocking_s in (2.0, 4.0, 9.0):
        writer.last_blocking_s = blocking_s
        auto.saved()
    first, second = caplog.messages
    assert first == (
        "checkpoints: every 85 s: training waits 2.00 s for one, an upload takes 0 s, assuming a preemption every 0.5 h "
        "(sqrt(2 x wait x hours))"
    )
    assert second.startswith("checkpoints: every 3 min: training waits 9.00 s for one")
