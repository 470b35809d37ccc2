"""Ask the teachers what the plan says, all of them at once, each within its limits and its money.

    failures = ask_all(config, Path("runs/orca/plan.jsonl"), answers)

Every address of a teacher has as many requests in flight as its limits allow, and takes the next row of the plan when one ends;
in batch mode, all rows wait for their batches. A row that failed for good does not stop the others. A teacher stops when its
money is used up, when no address of it can ever answer, when its model's name changes, or when the disk is full; what is in
flight then is paid for, so it ends and is kept.
"""

import asyncio
import logging
import math
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from fastft.distill.settings import DistillConfig, TeacherConfig
from fastft.distill.teachers.answers import Answers, key_of, messages_of
from fastft.errors import UserError
from fastft.inference.budget import FREE, Cache, Money, OverBudget
from fastft.inference.client import Client, Unanswered, heeding, progress_bar
from fastft.inference.completion import Reply

logger = logging.getLogger(__name__)


class Purse:
    """Money inside other money: the teacher's inside the run's, an address's inside the teacher's. A `Money` to its user.

    A request is reserved in all of them. Closing a purse closes none around it.
    """

    def __init__(self, limit: float | None, whole: "Money | Purse"):
        self.own, self.whole = Money(limit), whole

    def __getattr__(self, name: str) -> Any:
        """Everything but reserving and paying is the purse's own: its limit, what is spent, whether it is closed."""
        return getattr(self.own, name)

    async def reserve(self, usd: float) -> None:
        await self.own.reserve(usd)
        try:
            await self.whole.reserve(usd)
        except BaseException:
            self.own.settle(usd, 0.0)
            raise

    def commit(self, usd: float) -> None:
        self.own.commit(usd)
        self.whole.commit(usd)

    def settle(self, reserved: float, usd: float) -> None:
        self.own.settle(reserved, usd)
        self.whole.settle(reserved, usd)

    @property
    def narrower(self) -> str:
        """The limit that is reached first, for a message."""
        left, left_of_all = (
            math.inf if money.limit is None else money.limit - money.spent for money in (self.own, self.whole)
        )
        return f"its max_usd of ${self.limit:,.2f}" if left <= left_of_all else f"max_usd of ${self.whole.limit:,.2f}"


@dataclass
class Failures:
    """Why rows have no answer: by key, and for the rows that were not asked by teacher."""

    by_key: dict[str, str] = field(default_factory=dict)
    over_budget: dict[str, str] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    judge_usd: float = 0.0

    def of(self, teacher: str, key: str) -> tuple[str, str]:
        """The (status, reason) of a row that has no answer."""
        if key in self.by_key:
            return "failed", self.by_key[key]
        if teacher in self.over_budget:
            return "over budget", self.over_budget[teacher]
        return "failed", f"not asked: {self.stopped.get(teacher, 'the run was interrupted')}"


class _Asking:
    """One teacher at work."""

    def __init__(
        self, teacher: TeacherConfig, plan: Path, missing: array, answers: Answers, money: Purse, failures: Failures
    ):
        self.left = len(missing)
        self.teacher, self.answers, self.money, self.failures = teacher, answers, money, failures
        self.rows = ((key_of(teacher, row), row) for row in rows_at(plan, missing))
        self.again: deque[tuple[str, dict[str, Any]]] = deque()  # rows whose address has proved useless
        # Each address has a purse of its own inside the teacher's, because a client closes its purse when it is useless.
        numbers = range(len(teacher.addresses))
        self.clients = [_client(teacher, number, Purse(None, money), answers) for number in numbers]
        self.useless: dict[str, str] = {}  # by address
        self.ended = False
        self.task: asyncio.Task | None = None

    def start(self, advance: Any) -> asyncio.Task:
        """Begin to ask in a task of its own."""
        self.task = asyncio.ensure_future(self._run(advance))
        return self.task

    def interrupt(self) -> None:
        """Send nothing more, not even what waits for its turn. What is in flight ends, but batches, which are found again."""
        self.ended = True
        for client in self.clients:
            client.money.close()
        if self.teacher.mode == "batch":
            self.task.cancel()

    async def _run(self, advance: Any) -> None:
        """Ask until no row is left or the teacher has stopped."""
        while True:
            good = [client for client in self.clients if client.url not in self.useless]
            at_once = min(self.left, good[0].at_once) if self.teacher.mode == "batch" else self.teacher.concurrency
            await asyncio.gather(*(self._work(client, advance) for _ in range(at_once) for client in good))
            if self.ended or not self.again:
                return
            if len(self.useless) == len(self.clients):
                return self._stop("; ".join(dict.fromkeys(self.useless.values())))

    def close(self) -> None:
        """Close the files of the clients."""
        for client in self.clients:
            client.cache.close()

    async def _work(self, client: Client, advance: Any) -> None:
        while not self.ended and client.url not in self.useless:
            key, row = self.again.popleft() if self.again else next(self.rows, (None, None))
            if key is None:
                return
            try:
                reply = await client.ask(messages_of(row), **self.teacher.sent)
            except Unanswered as error:
                self.failures.by_key[key] = str(error)
            except OverBudget:
                if self.ended or client.url in self.useless:  # the purse was closed
                    self.again.append((key, row))
                    continue
                self.failures.over_budget[self.teacher.name] = f"stopped before {self.money.narrower} would be exceeded"
                self.ended = True
            except UserError as error:
                self.again.append((key, row))
                if client.url not in self.useless:
                    logger.warning("%s: %s", self.teacher.name, error)
                self.useless[client.url] = str(error)
                continue
            else:
                self._keep(key, row, reply)
            advance(self.money.spent)

    def _keep(self, key: str, row: dict[str, Any], reply: Reply) -> None:
        """Write an answer down at once; then see whether the teacher may go on."""
        known = list(self.answers.versions.get((self.teacher.name, self.teacher.model), []))
        is_new = bool(reply.model and known and reply.model not in known)
        try:
            self.answers.add(key, row, self.teacher, reply)
        except UserError as error:  # the disk is full, and this answer was the first in the reserve
            self._stop(str(error))
        if is_new and not self.teacher.any_version:
            self._stop(
                f"{self.teacher.name}: the endpoint answered as {known[-1]!r} and now as {reply.model!r}; set any_version: true "
                "to go on with both"
            )

    def _stop(self, why: str) -> None:
        self.ended = True
        self.failures.stopped.setdefault(self.teacher.name, why)


def ask_all(config: DistillConfig, plan: Path, answers: Answers, elsewhere: dict[str, float]) -> Failures:
    """Ask every row of the plan that has no answer yet. Returns why the others have none.

    `elsewhere` is what each teacher has cost before, beside its answers; it counts against the limits.
    """
    failures, whole = Failures(), Money(config.max_usd)
    spent = {each.name: answers.usd.get(each.name, 0.0) + elsewhere.get(each.name, 0.0) for each in config.teachers}
    whole.spent = sum(answers.usd.values()) + sum(elsewhere.values())  # with teachers that the settings no longer name
    missing = unanswered(config, plan, answers)
    if not any(missing.values()):
        return failures
    answers.open()
    purses = {each.name: Purse(each.max_usd, whole) for each in config.teachers if missing[each.name]}
    for name, purse in purses.items():
        purse.own.spent = spent[name]
    try:
        asyncio.run(_ask_all(config, plan, answers, failures, missing, purses))
    finally:
        for name, purse in purses.items():
            lost = purse.spent - answers.usd.get(name, 0.0) - elsewhere.get(name, 0.0)
            if lost > 1e-9:
                answers.add_failed_cost(name, lost)
        answers.close()
    return failures


async def _ask_all(
    config: DistillConfig,
    plan: Path,
    answers: Answers,
    failures: Failures,
    missing: dict[str, array],
    purses: dict[str, Purse],
) -> None:
    asking: list[_Asking] = []
    works = []
    with progress_bar() as bar, _stopped_by_signals(asking):
        for teacher in (each for each in config.teachers if missing[each.name]):
            task = bar.add_task(teacher.name, total=len(missing[teacher.name]), usd="")

            def advance(spent: float, task: Any = task) -> None:
                bar.update(task, advance=1, usd=f"${spent:,.2f}" if spent else "")

            asking.append(_Asking(teacher, plan, missing[teacher.name], answers, purses[teacher.name], failures))
            works.append(asking[-1].start(advance))
        try:
            for ended in await asyncio.gather(*works, return_exceptions=True):
                if isinstance(ended, Exception):
                    raise ended
        finally:
            for each in asking:
                each.close()


@contextmanager
def _stopped_by_signals(asking: list[_Asking]) -> Iterator[None]:
    """At Ctrl-C or SIGTERM, send nothing more and let what is in flight end, because it is paid for; then KeyboardInterrupt.

    The second signal ends everything at once.
    """
    signals: list[int] = []

    def stop() -> None:
        for each in asking:
            each.interrupt()
        if any(each.teacher.mode == "chat" for each in asking):
            logger.warning("stopping: waiting for the answers in flight, which are paid for; once more ends at once")

    with heeding(signals, stop):
        yield
    if signals:
        raise KeyboardInterrupt


def unanswered(config: DistillConfig, plan: Path, answers: Answers) -> dict[str, array]:
    """Where in the plan the rows begin that each teacher is to be asked, by teacher, each request once: bytes, int64."""
    found = {teacher.name: array("q") for teacher in config.teachers}
    begun: dict[str, set[str]] = {teacher.name: set() for teacher in config.teachers}
    place = 0
    with plan.open("rb") as file:
        for line in file:
            row = orjson.loads(line)
            for teacher in config.teachers:
                key = key_of(teacher, row) if teacher.name in row["teachers"] else None
                if key and key not in answers and key not in begun[teacher.name]:
                    begun[teacher.name].add(key)
                    found[teacher.name].append(place)
            place += len(line)
    return found


def rows_at(plan: Path, places: array) -> Iterator[dict[str, Any]]:
    """Yield the rows of a plan that begin at `places`."""
    with plan.open("rb") as file:
        for place in places:
            file.seek(place)
            yield orjson.loads(file.readline())


class PausesOnly(Cache):
    """What a client remembers over all starts when its replies are kept elsewhere: until when its endpoint asked to wait."""

    def get(self, key: str) -> None:
        return None

    def put(self, key: str, reply: Reply) -> None:
        pass

    def room(self, size: int) -> AbstractContextManager:
        """Reserve nothing: `Answers` keeps room for the replies on the way."""
        return nullcontext()


def _client(teacher: TeacherConfig, number: int, money: Purse, answers: Answers) -> Client:
    """The client for an address of a teacher. Answers are kept here and not in its cache, except those of batches."""
    batch = teacher.mode == "batch"
    kind = Cache if batch else PausesOnly
    cache = kind(answers.path.parent / ("batches" if batch else "endpoints") / f"{teacher.name}-{number + 1}.jsonl")
    prices = teacher.usd_per_million or FREE
    return Client(teacher.addresses[number], teacher.limits, cache, prices, money, teacher.key_env, batch=batch)
