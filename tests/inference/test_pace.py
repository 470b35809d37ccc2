"""When requests start: limits a minute, additive increase and multiplicative decrease, and pauses in which nothing starts."""

import asyncio

import pytest

from fastft.inference import pace
from fastft.inference.endpoint import Limits
from fastft.inference.pace import Line, Pace


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def start_all(each: Pace) -> int:
    """Start what may start now. Returns how many are on the way then."""
    while not each.wait_s():
        each.start(10)
    return each.on_the_way


def test_after_a_pause_requests_start_one_by_one(clock):
    each = Pace(Limits(concurrency=16))
    assert start_all(each) == 16
    each.overloaded(0, pause_s=2.0)
    for _ in range(16):
        each.end()  # the others that were on the way have failed, too
    clock[0] += 1.99
    assert each.wait_s() == pytest.approx(0.01) and start_all(each) == 0
    clock[0] += 0.02
    numbers = []
    for _ in range(12):
        numbers.append(start_all(each))
        each.answered()
        each.end()
    assert numbers == [1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8], "one more for each answer, up to half of what it was"
    for _ in range(100):
        each.answered()
    assert each.window == 16, "and slowly back to where it was"


def test_requests_that_were_on_the_way_together_halve_it_once(clock):
    each = Pace(Limits(concurrency=16))
    rounds = [each.start(10) for _ in range(16)]
    for started in rounds:
        each.overloaded(started, pause_s=0.0)
        each.end()
    assert start_all(each) == 8
    each.overloaded(each.round, pause_s=0.0)
    assert each.window == 4


def test_a_longer_pause_is_not_shortened(clock):
    each = Pace(Limits())
    for seconds in (5.0, 1.0):
        each.overloaded(each.start(10), seconds)
        each.end()
    assert each.wait_s() == 5.0


def test_requests_and_tokens_a_minute_hold_together(clock):
    each, times = Pace(Limits(concurrency=1000, rpm=120, tpm=6000)), []
    for tokens in (10, 10, 200, 10, 10):
        clock[0] += each.wait_s()
        each.start(tokens)
        times.append(clock[0] - 1000)
    assert times == pytest.approx([0, 0.5, 1.0, 3.0, 3.5], abs=pace.CATCH_UP_S)


def test_a_line_serves_in_order_and_whatever_endpoint_is_free():
    async def work():
        line = Line([Pace(Limits(concurrency=1)), Pace(Limits(concurrency=2))])
        places = [(await line.turn(order, 10))[0] for order in range(3)]
        late = [asyncio.ensure_future(line.turn(order, 10)) for order in (9, 7, 8)]
        await asyncio.sleep(0)
        late[2].cancel()
        await asyncio.sleep(0)
        line.end(places[0])
        await asyncio.wait(late[1:2])
        assert not late[0].done(), "the lower number comes first"
        line.paces[places[0]].overloaded(0, pause_s=60.0)
        line.end(places[0])
        await asyncio.sleep(0)
        assert not late[0].done()
        line.end(1)
        await asyncio.wait(late[:1], timeout=30)
        assert late[0].done()
        return sorted(places)

    assert asyncio.run(work()) == [0, 1, 1]
