"""Distributes batches over worker processes, and yields the results in order.

    for result in ordered_map(function, batches, pool): …

A pool is anything with `submit` and `ahead`: a ProcessPoolExecutor, or the cleaner's Ray cluster.
"""

import collections
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any, Protocol

EARLY = 32  # the most batches that this process works on while a worker is loading: 10 s of work


class Pool(Protocol):
    """Workers that call functions."""

    ahead: int  # batches that may be under way at a time: enough to keep every worker busy

    def submit(self, function: Callable, batch: Any) -> Any:
        """Call function(batch) in a worker, and return a future, whose `result()` waits for it."""


@contextmanager
def process_pool(
    workers: int, preloaded: Sequence[str], initializer: Callable[..., None] | None = None, initargs: tuple = ()
) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of worker processes that begin with the modules `preloaded`, and end it.

    With "fork", the child of a process with threads (torch, tokenizers, the progress bar) can hang. The fork server has no
    threads, and imports what the workers need once for all of them (transformers takes 2 s).
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([*preloaded])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=initializer or begin_worker, initargs=initargs)
    pool.ahead = 2 * workers
    try:
        yield pool
    except BaseException:
        # A process that is started just when the pool breaks is not ended by it, but waited for, for ever (Python 3.11.7;
        # seen once in some hundred runs). Python 3.14 has `terminate_workers`.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def begin_worker() -> None:
    """Prepare a worker: it ignores Ctrl-C, which its parent handles, and ends with its parent, even if that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # otherwise a tenth of the time is spent on garbage collection of the imported modules

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def in_background(pool: Pool, function: Callable, argument: Any) -> Future:
    """Call function(argument) in a worker without waiting. A thread submits it, because the first `pool.submit` takes 3 s."""
    threads = ThreadPoolExecutor(1)
    begun = threads.submit(lambda: pool.submit(function, argument).result())
    threads.shutdown(wait=False)
    return begun


def ordered_map(function: Callable, batches: Iterable, pool: Pool | None, loading: Future | None = None) -> Iterator:
    """Yield function(batch) for each batch, in order, with at most about `pool.ahead` batches in memory.

    Without a pool, this process does the work. `loading` is a call that must succeed before anything is yielded
    (`in_background`); while it runs, this process works on the first batches. Raises what `loading` raised.
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
        try:
            waiting.append(pool.submit(function, batch))
        except BrokenExecutor:
            for earlier in waiting:  # one of these broke the pool; its error has the cause, unlike this one
                earlier.result()
            raise
        if len(waiting) > pool.ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
