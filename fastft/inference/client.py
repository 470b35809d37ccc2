"""Ask OpenAI-compatible endpoints, many requests at once, within limits and a budget, with retries, paying for none twice.

    client = Client("https://api.openai.com/v1#gpt-4.1", cache=Cache(Path("judged/cache.jsonl")), limits=Limits(rpm=500))
    reply = await client.ask([{"role": "user", "content": "…"}], temperature=0)

Connection errors, time-outs, 408, 409, 429, 5xx, and replies that are not JSON or have no choice are tried again after growing
waits, each try within the limits and the budget. Nothing starts while an endpoint asks to wait (`pace.py`). A refused key, an
unknown model, an account without money and an endpoint that is not there end the run; any other failure concerns one request
alone.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import logging
import random
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastft.common.files import FullDiskError
from fastft.common.records import repair_text
from fastft.errors import UserError
from fastft.inference.batch import Batches
from fastft.inference.budget import FREE, Cache, Money, OverBudget, Price
from fastft.inference.completion import ErrorInBody, Malformed, Reply
from fastft.inference.connection import (
    Connection,
    Tries,
    Unanswered,
    check_pauses,
    estimate_tokens,
    may_be_billed,
    most_reply_tokens,
)
from fastft.inference.endpoint import USUAL_LIMITS, Limits, key_variables
from fastft.inference.pace import Line
from fastft.inference.transport import Lost, Unreached

__all__ = [
    "Client",
    "ClientPool",
    "Unanswered",
    "estimate_tokens",
    "heeding",
    "make_clients",
    "progress_bar",
    "run_all",
]

logger = logging.getLogger(__name__)
LONGEST_BACKOFF_S = 8.0
DISK_PATIENCE_S = 300  # how long replies wait in memory for room on the disk before the run ends
BYTES_OF_A_ROW = 4096  # room on the disk for all of a reply but its text
BYTES_OF_A_TOKEN = 16  # room on the disk that a token of a reply may need; few tokens of JSON are longer
BAR_S = 0.1  # seconds between two updates of the progress bar
AT_ONCE = 1024  # requests that are prepared at a time; in batch mode as many as two full batches hold
AT_ONCE_IN_BATCHES = 100_000
Result = TypeVar("Result")


class Client:
    """One model at one URL. Raises UserError, in one line without the key, if no request to it can succeed."""

    def __init__(
        self,
        address: str,
        limits: Limits = USUAL_LIMITS,
        cache: Cache | None = None,
        price: Price = FREE,
        money: Money | None = None,
        key_env: str = "",
        one_model: bool = False,
        batch: bool = False,
    ):
        """`key_env` names the variable with the key; `key_for` says which key is sent if none is named.

        With `one_model`, the run ends when the endpoint begins to answer under another model's name. With `batch` (or that of
        the limits), requests go into batches, at half the `price`; that needs a cache.
        """
        batch = batch or limits.batch
        connection = Connection(address, limits, price, key_env, one_model, batch)
        self._begin([connection], cache, money or Money(), batch)

    def _begin(self, connections: list[Connection], cache: Cache | None, money: Money, batch: bool) -> None:
        self.connections, self.cache, self.money = connections, cache, money
        self.url, self.name, self.price = connections[0].url, connections[0].name, connections[0].price
        self.label = self.name  # what tables call it
        self._remember()
        self.line, self.order = Line([connection.pace for connection in connections]), itertools.count()
        money.when_closed.append(self.line.close)
        self.on_the_way: dict[str, asyncio.Task] = {}  # by key: the request that equal ones wait for
        self.connected: asyncio.Task | None = None
        self.batches = Batches(connections[0], cache, money) if batch else None
        most = sum(connection.limits.concurrency for connection in connections)
        self.at_once = AT_ONCE_IN_BATCHES if batch else max(AT_ONCE, 2 * most)
        money.at_once = max(money.at_once, self.at_once)

    def _remember(self) -> None:
        """Take over what the cache knows from other runs: by which name the model answers, and pauses that are not over."""
        for connection in self.connections if self.cache else ():
            connection.model = connection.model or self.cache.models.get(connection.address, "")
            left = self.cache.pauses.get(connection.address, 0.0) - time.time()
            if left > 0:
                connection.pace.pause(left)

    async def ask(self, messages: list[dict[str, str]], attempt: int = 0, **parameters: Any) -> Reply:
        """Return a reply to `messages`. The same `attempt` at the same request is paid for once, in one run or in several.

        Raises Unanswered if this request failed for good, OverBudget, and UserError if every request would fail.
        """
        messages = [{**message, "content": repair_text(message["content"])} for message in messages]
        keys = [key_of(connection, messages, attempt, parameters) for connection in self.connections]
        if reply := self._cached(keys):
            self._check_name(reply)
            return reply
        if task := self.on_the_way.get(keys[0]):
            return replace(await asyncio.shield(task), cached=True)
        task = self.on_the_way[keys[0]] = asyncio.ensure_future(self._pay(keys, messages, parameters))
        task.add_done_callback(lambda ended: self._forget(keys[0], ended))
        return await asyncio.shield(task)

    def cached(self, messages: list[dict[str, str]], attempt: int, parameters: dict[str, Any]) -> Reply | None:
        """Return the reply to this request that is paid for already, None if there is none."""
        return self._cached([key_of(connection, messages, attempt, parameters) for connection in self.connections])

    def _cached(self, keys: list[str]) -> Reply | None:
        return next(filter(None, map(self.cache.get, keys)), None) if self.cache else None

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the cost of these tokens in dollars."""
        return self.connections[0].usd(prompt_tokens, completion_tokens)

    def _forget(self, key: str, ended: asyncio.Task) -> None:
        del self.on_the_way[key]
        if not ended.cancelled():
            ended.exception()  # taken note of, even if those who wait were cancelled meanwhile

    async def _pay(self, keys: list[str], messages: list[dict[str, str]], parameters: dict[str, Any]) -> Reply:
        """Get a reply from an endpoint, and keep it under that endpoint's key."""
        if not self.connected:
            self.connected = asyncio.ensure_future(self._connect())
        await asyncio.shield(self.connected)
        if reply := self._cached(keys):  # by another run, which has ended since this one has read the cache
            self._check_name(reply)
            return reply
        if not self.batches:
            return await self._until_answered(keys, messages, parameters)
        reply = await self.batches.ask(keys[0], messages, parameters)
        self._check_name(reply)
        return reply

    async def _connect(self) -> None:
        """Check once that somebody listens, and that replies can be kept."""
        if self.cache:
            self.cache.open()
            self._remember()  # another run may have ended since the cache was read
        check_pauses(self.connections, "it was said to an earlier run")
        for connection in self.connections:
            await connection.reach()

    async def _wait_for_disk(self) -> None:
        """Wait while replies wait in memory for room on the disk: nothing is asked then. Raises FullDiskError."""
        began = time.monotonic()
        while self.cache:
            try:
                return self.cache.check()
            except FullDiskError:
                if time.monotonic() - began > DISK_PATIENCE_S:
                    raise
            await asyncio.sleep(1)

    def _check_name(self, reply: Reply) -> None:
        for connection in self.connections:
            if connection.address == reply.endpoint:
                connection.check_name(reply)

    async def _until_answered(
        self, keys: list[str], messages: list[dict[str, str]], parameters: dict[str, Any]
    ) -> Reply:
        """Send a request, again and again if that may help, and keep its reply before another request has its turn."""
        began, order, tries = time.monotonic(), next(self.order), Tries()
        tokens = estimate_tokens(messages) + most_reply_tokens(parameters)
        most = max(connection.most_usd(messages, parameters) for connection in self.connections)
        while True:
            await self._wait_for_disk()
            place, started = await self._turn(order, tokens, most)
            connection = self.connections[place]
            try:
                sent, last = await self._try_once(connection, started, most, messages, parameters)
                if isinstance(last, Reply):
                    connection.failed_in_a_row = 0
                    reply = replace(last, seconds=time.monotonic() - began)
                    if self.cache:
                        self.cache.put(keys[place], reply)
                    connection.check_name(reply)
                    return reply
                wait = connection.count(last, tries, parameters, sent)
                check_pauses(self.connections, connection.said(last))
                if wait and not getattr(last, "pause_s", 0.0):  # no time is named, so this request keeps its place
                    backoff_s = min(0.5 * 2 ** (tries.failed - 1), LONGEST_BACKOFF_S)
                    await asyncio.sleep(backoff_s * random.uniform(0.75, 1))
            except UserError:
                self.money.close()  # before another request has its turn
                raise
            finally:
                self.line.end(place)

    async def _turn(self, order: int, tokens: int, most_usd: float) -> tuple[int, int]:
        """Wait until there is enough money, and then for this request's turn, so that nothing is waited for after it."""
        await self.money.reserve(most_usd)
        try:
            return await self.line.turn(order, tokens)
        except (OverBudget, asyncio.CancelledError):
            self.money.settle(most_usd, 0.0)
            raise

    async def _try_once(
        self,
        connection: Connection,
        started: int,
        reserved: float,
        messages: list[dict[str, str]],
        parameters: dict[str, Any],
    ) -> tuple[dict[str, Any], Reply | Exception]:
        """Try once. Returns the parameters that were sent, and the reply or why there is none.

        What a failed try may have cost is booked as spent.
        """
        sent, spent = connection.known(parameters), 0.0
        size = BYTES_OF_A_ROW + BYTES_OF_A_TOKEN * most_reply_tokens(parameters)
        try:
            with self.cache.room(size) if self.cache else contextlib.nullcontext():
                spent = reserved  # unless it ends in another way than by being cancelled
                reply = await connection.send(messages, sent)
            spent = reply.usd
            connection.pace.answered()
            return sent, reply
        except (ErrorInBody, Malformed, Lost, Unreached) as error:
            spent = connection.most_usd(messages, sent) if may_be_billed(error) else 0.0
            if isinstance(error, ErrorInBody) and (error.status_code == 429 or error.pause_s > 0):
                connection.pace.overloaded(started, error.pause_s)
                if self.cache and error.pause_s > 0:
                    self.cache.put_pause(connection.address, time.time() + error.pause_s)
            return sent, error
        finally:
            self.money.settle(reserved, spent)


class ClientPool(Client):
    """One model at several URLs: a request goes to the endpoint that is free, and is tried again wherever one is.

    What one of them has answered is not asked of another. Its cost before is estimated at the price of the first.
    """

    def __init__(self, clients: Sequence[Client]):
        """`clients` share a cache and the money. Raises UserError for an endpoint that is given twice, and for batches."""
        if any(client.batches for client in clients):
            raise UserError("several endpoints of one model cannot be asked through batches")
        connections = [connection for client in clients for connection in client.connections]
        if len({connection.address for connection in connections}) < len(connections):
            raise UserError("the same endpoint and model is given twice")
        self._begin(connections, clients[0].cache, clients[0].money, batch=False)


def key_of(connection: Connection, messages: list[dict[str, str]], attempt: int, parameters: dict[str, Any]) -> str:
    """Return the key of a request to this endpoint in the cache."""
    request = {
        "url": connection.url,
        "model": connection.name,
        "messages": messages,
        "attempt": attempt,
        **parameters,
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def make_clients(
    addresses: Sequence[str],
    key_envs: Sequence[str] = (),
    limits: Limits = USUAL_LIMITS,
    prices: Sequence[Price] | None = None,
    cache: Cache | None = None,
    money: Money | None = None,
    one_model: bool = False,
    batch: bool = False,
) -> list[Client]:
    """Return a client for each address; they share the cache and the money.

    Models of one name are labelled name@host/path. Raises UserError for an address that is given twice.
    """
    keys, prices, money = key_variables(key_envs, addresses), prices or [FREE] * len(addresses), money or Money()
    clients = [
        Client(address, limits, cache, price, money, key, one_model, batch)
        for address, price, key in zip(addresses, prices, keys)
    ]
    if len({(client.url, client.name) for client in clients}) < len(clients):
        raise UserError("the same endpoint and model is given twice")
    names = [client.name for client in clients]
    for client in clients:
        if names.count(client.name) > 1:
            client.label = f"{client.name}@{client.url.partition('//')[2]}"
    return clients


def run_all(
    works: Iterable[Callable[[], Awaitable[Result]]],
    what: str,
    money: Money,
    done: Callable[[int, Result], None],
    total: int | None = None,
) -> str | None:
    """Do all of `works`, with a progress bar; `done(index, result)` is called for each as it ends.

    `works` is read as it is needed, so that a million of them take no more memory than those that are worked on: about a
    thousand, or a hundred thousand for batches. `total` is their number, if `works` does not know it.

    Returns None, or why it stopped early: the money is used up, or an endpoint will never work. Requests that are in flight
    then are paid for, so they end on their own and are kept. The same holds after Ctrl-C or SIGTERM, and then it raises
    KeyboardInterrupt; the second of them ends everything at once.
    """
    signals: list[int] = []
    with progress_bar() as bar:
        task = bar.add_task(what, total=total or (len(works) if isinstance(works, Sequence) else None), usd="")
        stopped: list[str] = []
        ended = [0, 0.0]  # works, and when that was shown
        numbered = enumerate(works)

        async def one(index: int, work: Callable[[], Awaitable[Result]]) -> None:
            try:
                done(index, await work())
            except OverBudget:
                if not stopped:  # else the money was closed by an error that has been noted already
                    stopped.append(f"stopped before ${money.limit:.2f} would be exceeded")
            except UserError as error:
                stopped.append(str(error))
                money.close()
            ended[0] += 1
            if time.monotonic() > ended[1] + BAR_S:  # an update takes as long as a cached reply
                show()

        def show() -> None:
            bar.update(task, completed=ended[0], usd=f"${money.spent:.2f}" if money.spent else "")
            ended[1] = time.monotonic()

        def stop() -> None:
            stopped.append("interrupted")
            logger.warning("stopping: answers in flight are paid for, so they are waited for; once more ends at once")
            money.close()

        async def worker() -> None:
            for index, work in numbered:
                await one(index, work)

        async def everything() -> None:
            workers = []
            try:
                # A worker that has found nothing to wait for has done all there is to do.
                while len(workers) < (money.at_once or AT_ONCE) and not (workers and workers[-1].done()):
                    workers.append(asyncio.ensure_future(worker()))
                    await asyncio.sleep(0)
                await asyncio.gather(*workers)
            finally:
                for each in workers:
                    each.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

        async def until_signalled() -> None:
            with heeding(signals, stop):
                await everything()

        asyncio.run(until_signalled())
        show()
    if signals:
        raise KeyboardInterrupt
    if not stopped:
        return None
    return f"{stopped[0]}; spent ${money.spent:.2f}" if money.spent else stopped[0]


@contextlib.contextmanager
def heeding(signals: list[int], stop: Callable[[], None]) -> Iterator[None]:
    """Note Ctrl-C and SIGTERM in `signals`: the first calls `stop`, and the second cancels what runs in the block."""
    loop, task, before = asyncio.get_running_loop(), asyncio.current_task(), {}

    def heed(number: int) -> None:
        signals.append(number)
        if len(signals) == 1:
            stop()
        else:
            task.cancel()

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        loop.add_signal_handler(number, heed, number)
    try:
        yield
    except asyncio.CancelledError:
        if len(signals) < 2:
            raise
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def progress_bar() -> Any:
    """Return rich's bar on standard error, for tasks that have a field `usd`: what they have cost, "" for nothing."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns += (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[usd]}"))
    return Progress(*columns, console=Console(stderr=True), refresh_per_second=2)
