"""Start the workers of a run, processes or a Ray cluster, and show how far it is, by a progress bar or by lines in a log."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from cleaning.sources.inputs import Input
from fastft.common.workers import Pool, process_pool
from fastft.errors import UserError

logger = logging.getLogger(__name__)

POOL_FROM = 1 << 20  # bytes of input; with fewer, the work takes less time than starting worker processes
LINE_EVERY = 30  # seconds between the lines that a log gets in place of a bar


@contextmanager
def worker_pool(
    sources: list[Input], workers: int | None, ray: str | None, preloaded: Sequence[str]
) -> Iterator[Pool | None]:
    """Start the workers for `sources`: processes, or the cores of the Ray cluster at `ray`.

    Gives None if this process alone is as fast. `preloaded` names the modules that the work needs: processes begin with
    these imported. Raises UserError if a worker is killed or memory runs out. Anything else that a worker raises is raised
    here, with the worker's traceback as its cause.
    """
    try:
        if ray is not None:
            from cleaning.run.cluster import ray_pool

            with ray_pool(ray, workers) as pool:
                yield pool
        else:
            with _process_pool(sources, workers or len(os.sched_getaffinity(0)), preloaded) as pool:
                yield pool
    except MemoryError:
        raise UserError(
            "not enough memory; use fewer --workers, unless one record of the input is that large"
        ) from None
    except BrokenProcessPool as error:
        if error.__cause__ is not None:  # the traceback of what went wrong between the processes: a bug
            raise
        raise UserError("a worker process was killed, most likely for memory: use fewer --workers") from None


@contextmanager
def _process_pool(sources: list[Input], workers: int, preloaded: Sequence[str]) -> Iterator[Pool | None]:
    if workers == 1 or (all(source.path for source in sources) and sum(s.size for s in sources) < POOL_FROM):
        yield None
        return
    with process_pool(workers, preloaded) as pool:
        yield pool


def _done(task: Task) -> str:
    """Describe the progress of a pass: "1,204 conversations, 502/s, 3.1 MB/s"."""
    count, seconds = task.fields["conversations"], task.elapsed
    if not seconds:
        return ""
    megabytes = f", {task.completed / seconds / 1e6:,.1f} MB/s" if task.fields["of_bytes"] else ""
    return f"{count:,} conversations, {count / seconds:,.0f}/s{megabytes}"


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_done(task))


class Bar:
    """The progress of one pass at a time: a bar, or a line every LINE_EVERY seconds where there is no terminal."""

    def __init__(self, progress: Progress):
        self.progress, self.task, self.conversations, self.logged = progress, None, 0, time.monotonic()

    def begin(self, label: str, total: int | None, of_bytes: bool = False) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(label, total=total, conversations=0, of_bytes=of_bytes)
        self.conversations = 0

    def advance(self, amount: int, conversations: int) -> None:
        self.conversations += conversations
        self.progress.update(self.task, advance=amount, conversations=self.conversations)
        if time.monotonic() - self.logged > LINE_EVERY and not self.progress.console.is_terminal:
            self.logged = time.monotonic()
            logger.info("%s", self._line(self.progress.tasks[0]))

    def _line(self, task: Task) -> str:
        share = f"{task.percentage:.0f} %, " if task.total else ""
        left = task.time_remaining
        return f"{task.description}: {share}{_done(task)}" + (f", about {left / 60:.0f} min left" if left else "")


@contextmanager
def progress_bar(sources: list[Input]) -> Iterator[Bar]:
    """Show progress on stderr, on a terminal as a bar if there is much to do. The first pass counts bytes of the inputs."""
    console = Console(stderr=True)
    size = sum(source.size for source in sources)
    packed = any(source.packed for source in sources)
    columns = (TextColumn("{task.description}"), BarColumn(), _Speed(), TimeRemainingColumn())
    hidden = not console.is_terminal or (size < POOL_FROM and not packed)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        bar = Bar(progress)
        bar.begin("cleaning", None if packed else size, of_bytes=True)
        yield bar
