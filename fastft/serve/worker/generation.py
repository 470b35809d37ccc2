"""The thread that generates, with its queue. The event loop hands requests in and gets pieces of answers back.

    generation = Generation(step_loop, max_queue=64)     # within the event loop that uses it
    job = AnswerJob([answers to one prompt])
    generation.submit(job)                               # raises ApiError 429 when the queue is full, 503 while draining
    delta = await job.next(wait_s=10)                    # None: nothing yet
    generation.cancel(job)                               # its rows are free after the step that is being computed

First come, first served. A failure of one request ends that request. A failure that belongs to no single request ends all
running answers. The thread continues in both cases.
"""

import asyncio
import logging
import math
import queue
import threading
from collections.abc import Callable, Sequence

from fastft.common import logs
from fastft.errors import first_line
from fastft.inference.rows import Answering, Delta, StepLoop
from fastft.serve import protocol

logger = logging.getLogger(__name__)


class AnswerJob:
    """A request that has been accepted: one or more answers to one or more prompts."""

    def __init__(self, groups: Sequence[list[Answering]]):
        """Each group holds the answers to one prompt."""
        self.groups = groups
        self.answers = [answering for group in groups for answering in group]
        self.open = len(self.answers)
        self.begun = False
        self._deltas: asyncio.Queue[Delta | protocol.ApiError] = asyncio.Queue()

    @property
    def done(self) -> bool:
        return self.open == 0

    @property
    def prompt_tokens(self) -> int:
        return sum(len(group[0].prompt) for group in self.groups)

    @property
    def completion_tokens(self) -> int:
        return sum(len(answering.tokens) for answering in self.answers)

    async def next(self, wait_s: float | None = None) -> Delta | None:
        """The next piece of an answer; None if none comes within `wait_s`. Raises ApiError if the job has failed."""
        if self._deltas.empty():
            try:
                delta = await asyncio.wait_for(self._deltas.get(), wait_s)
            except asyncio.TimeoutError:
                return None
        else:
            delta = self._deltas.get_nowait()
        if isinstance(delta, protocol.ApiError):
            raise delta
        return delta

    def put(self, delta: Delta | protocol.ApiError) -> None:
        self.begun = True
        self._deltas.put_nowait(delta)


class Generation:
    """Owns the step loop, which only its thread touches; everything else here belongs to the event loop."""

    def __init__(self, loop: StepLoop, max_queue: int):
        self._loop, self.max_queue, self.max_rows = loop, max_queue, loop.max_rows
        self._events = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[tuple[Callable, list[list[Answering]]]] = queue.SimpleQueue()
        self.jobs: dict[AnswerJob, None] = {}  # in the order in which they came
        self._job_of: dict[Answering, AnswerJob] = {}
        self.draining = False
        self._seconds_of_a_job = 1.0  # recent mean
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    # On the event loop -----------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """The number of requests without a first token."""
        return sum(not job.begun for job in self.jobs)

    @property
    def running(self) -> int:
        return len(self.jobs) - self.waiting

    def position(self, job: AnswerJob) -> int:
        """The number of waiting requests that came earlier."""
        earlier = 0
        for other in self.jobs:
            if other is job:
                break
            earlier += not other.begun
        return earlier

    def submit(self, job: AnswerJob) -> None:
        """Accept a job, or raise ApiError."""
        if self.draining:
            raise protocol.shutting_down()
        beyond = len(self._job_of) - self.max_rows  # answers that wait for a row
        if beyond + len(job.answers) > self.max_queue and self.jobs:
            raise protocol.queue_full(max(beyond, 0), self._retry_after())
        self.jobs[job] = None
        self._job_of |= dict.fromkeys(job.answers, job)
        for group in job.groups:
            self._commands.put((self._loop.add, group))

    def cancel(self, job: AnswerJob) -> None:
        """Drop a job, whether it waits or runs. It yields nothing more."""
        if job in self.jobs:
            self._forget(job)
            self._commands.put((self._loop.remove, job.answers))

    def finish_at_once(self) -> None:
        """End all running answers with an error, and accept no more."""
        self.draining = True
        for job in list(self.jobs):
            self.cancel(job)
            job.put(protocol.shutting_down())

    def note_duration(self, seconds: float) -> None:
        """Note how long an answer took; this decides the Retry-After of requests that are refused."""
        self._seconds_of_a_job += 0.2 * (seconds - self._seconds_of_a_job)

    def _retry_after(self) -> int:
        """Seconds until a place is likely to be free."""
        return max(1, min(60, math.ceil(self._seconds_of_a_job * (1 + self.max_queue / 2) / self.max_rows)))

    def _forget(self, job: AnswerJob) -> None:
        del self.jobs[job]
        for answering in job.answers:
            self._job_of.pop(answering, None)

    def _hand_over(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            job = self._job_of.get(delta.answering)
            if job is None:  # cancelled in the meantime
                continue
            if delta.error:
                self.cancel(job)
                job.put(protocol.internal_error())
                continue
            job.open -= delta.finish_reason is not None
            job.put(delta)
            if delta.finish_reason is not None:
                del self._job_of[delta.answering]
            if job.done:
                self._forget(job)

    # In the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._obey()
                self._tell(self._step())
                self.steps += 1
        except _LoopClosedError:
            return

    def _step(self) -> list[Delta]:
        try:
            return self._loop.step()
        except Exception as error:
            return [Delta(answering, error=error) for answering in self._loop.clear()]

    def _obey(self) -> None:
        """Add and remove jobs as the event loop has asked; when idle, wait for its next request."""
        while not self._loop.busy or not self._commands.empty():
            act, answers = self._commands.get()
            try:
                act(answers)
            except Exception as error:
                self._tell([Delta(answering, error=error) for answering in answers])

    def _tell(self, deltas: list[Delta]) -> None:
        """Hand pieces of answers over to the event loop, and log what has ended some of them."""
        failed = [delta for delta in deltas if delta.error]
        for error in {id(delta.error): delta.error for delta in failed}.values():
            _log(error, sum(delta.error is error for delta in failed))
        if deltas:
            try:
                self._events.call_soon_threadsafe(self._hand_over, deltas)
            except RuntimeError:
                raise _LoopClosedError from None


class _LoopClosedError(Exception):
    """The event loop is closed: the process ends."""


def _log(error: Exception, answers: int) -> None:
    """Log what has ended so many answers: too little memory in one line, anything else as the bug that it is."""
    number = f"{answers} answer{'s' * (answers > 1)} failed"
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        logger.error("%s: %s", number, first_line(error))
    else:
        logs.log_bug(logger, error, number)
