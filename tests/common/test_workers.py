"""Batches in worker processes: results in order, and errors with their cause."""

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import pytest

from fastft.common.workers import ordered_map


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
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as made:
        made.ahead = 4
        yield made


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
