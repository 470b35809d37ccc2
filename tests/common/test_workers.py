"""Batches in worker processes: results in order, and errors with their cause."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

import pytest

from fastft.common.workers import ordered_map, process_pool


class Odd(Exception):
    """An exception that the parent cannot unpickle."""

    def __init__(self, one: str, two: str):
        super().__init__(one)


def double(number: int) -> int:
    return 2 * number


def fail(number: int) -> int:
    raise Odd("one", "two")


@pytest.fixture
def pool():
    with process_pool(2, ["fastft.common.workers"]) as made:
        yield made


class StartsOneMore:
    """The end of a queue that Python closes when it has ended the workers of a broken pool; a worker is started just then."""

    def __init__(self, pool):
        self.pool, self.queue, self.reader, self.started = (
            pool,
            pool._call_queue,
            pool._call_queue._reader,
            threading.Event(),
        )
        self.queue._reader = self

    def close(self) -> None:
        self.queue._reader = self.reader
        self.pool._spawn_process()
        self.started.set()
        self.reader.close()


def test_a_worker_that_is_started_just_when_the_pool_breaks_is_ended():
    """Python waits for it for ever, while it waits for the queue's lock, which the killed worker had."""
    with pytest.raises(BrokenProcessPool), process_pool(2, ["fastft.common.workers"]) as pool:
        assert pool.submit(abs, -1).result() == 1
        late = StartsOneMore(pool)
        time.sleep(0.5)  # until the worker waits for more, with the lock
        os.kill(next(iter(pool._processes)), signal.SIGKILL)
        assert late.started.wait(60)
        pool.submit(abs, -1)


def test_results_come_in_order(pool):
    assert (
        list(ordered_map(double, range(20), pool)) == list(ordered_map(double, range(20), None)) == [*range(0, 40, 2)]
    )


def test_a_pool_that_breaks_between_two_batches_says_why(pool):
    """What breaks the pool is told to the batches that are under way, and not to the next one."""

    def batches() -> Iterator[int]:
        yield 1
        while not pool._broken:
            time.sleep(0.01)
        yield 2

    with pytest.raises(BrokenProcessPool) as caught:
        list(ordered_map(fail, batches(), pool))
    assert "missing 1 required positional argument: 'two'" in str(caught.value.__cause__)
