"""TODO docstring of fastft.common.workers."""

import collections
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import parent_process
from typing import Any, Protocol

EARLY = 32  # batches that are done while workers start, at most: 10 s of work


class Pool(Protocol):
    """Where shards are worked on."""

    ahead: int  # shards that may be handed out and not yet taken back: enough for every worker, a few MiB each

    def submit(self, function: Callable, batch: Any) -> Any:
        """function(batch), later: the return value's `result()` waits for it."""


def begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: a worker whose parent was killed would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # what was imported stays: without it a tenth of the time goes into looking through it for garbage

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def in_background(pool: Pool, function: Callable, argument: Any) -> Future:
    """function(argument) in a worker. Not `pool.submit`, which waits until the first worker has started: 3 s of imports."""
    threads = ThreadPoolExecutor(1)
    begun = threads.submit(lambda: pool.submit(function, argument).result())
    threads.shutdown(wait=False)
    return begun


def ordered_map(function: Callable, batches: Iterable, pool: Pool | None, loading: Future | None = None) -> Iterator:
    """function(batch) for each batch, in order; few batches are under way at a time, so memory stays small.

    While a worker is `loading`, this process does the work, and keeps what it has done until it knows that all is well.
    """
    if pool is None:
        yield from map(function, batches)
        return
    batches, early = iter(batches), []
    while loading and not loading.done() and len(early) < EARLY and (batch := next(batches, None)) is not None:
        early.append(function(batch))
    if loading:
        loading.result()
    yield from early
    waiting: collections.deque = collections.deque()
    for batch in batches:
        waiting.append(pool.submit(function, batch))
        if len(waiting) > pool.ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
