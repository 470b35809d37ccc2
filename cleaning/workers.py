"""Worker processes that end with their parent, batches in order, and the progress bar."""

import collections
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from cleaning.sources.inputs import Input

WAITING = 32  # batches handed out and not yet written: enough for every worker, at most a few MiB
POOL_FROM = 1 << 20  # bytes of input below which the work is done sooner than worker processes start


@contextmanager
def worker_pool(sources: list[Input], workers: int | None) -> Iterator[ProcessPoolExecutor | None]:
    """Worker processes, or None where this process alone is as fast."""
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1 or (all(source.path for source in sources) and sum(s.size for s in sources) < POOL_FROM):
        yield None
        return
    # "spawn": a forked child of a process with threads (torch, tokenizers, the progress bar) can hang. Ctrl-C is the
    # parent's to handle.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: a worker whose parent was killed would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def ordered_map(
    function: Callable, batches: Iterable[list], payload: Callable, pool: ProcessPoolExecutor | None
) -> Iterator[tuple[list, list]]:
    """(batch, function(payload(batch))) in order; at most WAITING batches are under way, so memory stays small."""
    if pool is None:
        for batch in batches:
            yield batch, function(payload(batch))
        return
    waiting: collections.deque = collections.deque()
    for batch in batches:
        waiting.append((batch, pool.submit(function, payload(batch))))
        if len(waiting) >= WAITING:
            batch, future = waiting.popleft()
            yield batch, future.result()
    while waiting:
        batch, future = waiting.popleft()
        yield batch, future.result()


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        count = task.fields["conversations"]
        return Text(f"{count:,} conversations, {count / task.elapsed:,.0f}/s" if task.elapsed else "")


class Bar:
    """The progress bar of one pass after the other."""

    def __init__(self, progress: Progress):
        self.progress, self.task, self.conversations = progress, None, 0

    def begin(self, label: str, total: int | None) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task, self.conversations = self.progress.add_task(label, total=total, conversations=0), 0

    def advance(self, amount: int, conversations: int) -> None:
        self.conversations += conversations
        self.progress.update(self.task, advance=amount, conversations=self.conversations)


@contextmanager
def progress_bar(sources: list[Input]) -> Iterator[Bar]:
    """A bar on stderr, drawn on a terminal if there is much to do. It begins with the bytes of the inputs."""
    console = Console(stderr=True)
    size = sum(source.size for source in sources)
    packed = any(source.packed for source in sources)
    columns = (TextColumn("{task.description}"), BarColumn(), _Speed(), TimeRemainingColumn())
    hidden = not console.is_terminal or (size < POOL_FROM and not packed)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        bar = Bar(progress)
        bar.begin("cleaning", None if packed else size)
        yield bar
