"""What `fastft serve` does when something fails, counted: one table at the end, exit code 1 if a line is not as it should be.

    python benchmarks/serve_faults.py                        # a worker killed twice, clients that leave, 10,000 requests
    python benchmarks/serve_faults.py --soak_minutes 30      # instead of these: 80 % of what it can do, for so long

The real gateway, with the record on, before real workers on a tiny model, which are killed with SIGKILL. Every client keeps
what it was sent; at the end that is compared with the record, turn by turn.
"""

import asyncio
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import gateways
from helpers.serving import WorkerProcess, started, teach

from fastft.common.command_line import parse, run

AT_ONCE = 16
"""Clients that ask one short question after the other: as many as a worker has rows."""
SHORT, LONG = 12, 2000
"""Tokens of an answer."""
HUNG_S = 300.0
"""A client that has waited so long for the end of its answer will not see it."""
STOPPED_S = 2.0
"""After the last client has left."""
GROWTH = 0.05


@dataclass
class FaultsBenchmark:
    """Options of this benchmark."""

    streams: int = 50
    """Streams that run when a worker is killed."""
    requests: int = 1000
    """Short requests, during which a worker is killed."""
    leavers: int = 200
    """Clients that leave in mid-stream."""
    long_run: int = 10000
    """Requests over which memory may not grow; it is read first after a fifth of them."""
    connections: int = 4000
    """Connections that come and go, 500 at once; the gateway's memory is read first after a quarter of them."""
    soak_minutes: float = 0
    """Minutes at 80 % of what it can do; 0: the faults above."""


# Clients -------------------------------------------------------------------------------------------------------------------


@dataclass
class Received:
    """What a client got of one turn."""

    question: str
    id: str = ""
    """Of the turn's event in the record."""
    status: int | None = None
    text: str = ""
    end: str = "hung"
    """whole, left (by the client), refused, the code of an error, or cut: nothing of these, the stream just ended."""
    first_s: float | None = None
    seconds: float = 0.0


OUTCOMES = {"whole": "answered", "left": "client_left", "worker_lost": "died", "no_worker": "failed"}
"""End at the client -> outcome in the record."""


class Clients:
    """All that have asked one gateway."""

    def __init__(self, url: str, session: aiohttp.ClientSession):
        self.url, self.session = f"{url}/chat/completions", session
        self.received: list[Received] = []
        self.numbers = itertools.count()

    async def ask(self, tokens: int = SHORT, stream: bool = True, leave_after: int | None = None, **more) -> Received:
        """One question that no one else asks. `leave_after`: pieces of the answer after which the client is gone."""
        got = Received(f"question {next(self.numbers)}")
        self.received.append(got)
        began = time.monotonic()
        messages = [{"role": "user", "content": got.question}]
        body = {"model": "m", "messages": messages, "max_tokens": tokens, "ignore_eos": True, "stream": stream, **more}
        try:
            await asyncio.wait_for(self._send(got, body, leave_after, began), HUNG_S)
        except asyncio.TimeoutError:
            got.end = "hung"
        except aiohttp.ClientError:
            got.end = "cut"
        got.seconds = time.monotonic() - began
        return got

    async def _send(self, got: Received, body: dict, leave_after: int | None, began: float) -> None:
        async with self.session.post(self.url, json=body) as response:
            got.id, got.status = response.headers.get("x-fastft-event", ""), response.status
            if response.status != 200:
                error = json.loads(await response.read())["error"]
                got.end = "refused" if response.status in (400, 404) else error["code"]
            elif body["stream"]:
                await self._read(got, response, leave_after, began)
            else:
                got.text = json.loads(await response.read())["choices"][0]["message"]["content"]
                got.end = "whole"

    async def _read(
        self, got: Received, response: aiohttp.ClientResponse, leave_after: int | None, began: float
    ) -> None:
        pieces, error, finished = 0, None, False
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                error = event["error"]["code"] if "error" in event else error
                for choice in event.get("choices", ()):
                    got.first_s = got.first_s or time.monotonic() - began
                    got.text += choice["delta"].get("content") or ""
                    finished = finished or choice["finish_reason"] is not None
                    pieces += 1
                if leave_after is not None and pieces >= leave_after:
                    got.end = "left"
                    response.close()
                    return
            elif line == b"data: [DONE]\n":
                got.end = error or ("whole" if finished else "cut")
                return
        got.end = "cut"

    async def ask_many(self, count: int, at_once: int, after: dict | None = None, **more) -> list[Received]:
        """Ask `count` short questions, every other one streamed. `after`: what to do when so many have been asked."""
        left, found = iter(range(count)), []

        async def client() -> None:
            for number in left:
                if act := (after or {}).get(number):
                    act()
                found.append(await self.ask(stream=number % 2 == 0, **more))

        await asyncio.gather(*(client() for _ in range(at_once)))
        return found


# Servers -------------------------------------------------------------------------------------------------------------------


@dataclass
class Fleet:
    gateway: WorkerProcess
    workers: list[WorkerProcess]
    record: Path

    def kill(self, number: int) -> None:
        os.kill(self.workers[number].process.pid, signal.SIGKILL)

    def alive(self) -> list[WorkerProcess]:
        return [worker for worker in self.workers if worker.process.poll() is None]

    def usage(self) -> dict[str, "Usage"]:
        """Of the gateway, and of all workers that are alive."""
        everyone = {"gateway": [self.gateway], "workers": self.alive()}
        return {
            name: Usage.of([psutil.Process(each.process.pid) for each in those]) for name, those in everyone.items()
        }


@dataclass(frozen=True)
class Usage:
    cpu_s: float
    rss_mb: float

    @classmethod
    def of(cls, processes: list[psutil.Process]) -> "Usage":
        times = [each.cpu_times() for each in processes]
        memory = sum(each.memory_info().rss for each in processes)
        return cls(sum(each.user + each.system for each in times), memory / 2**20)


@contextmanager
def fleet(place: Path, workers: int) -> Iterator[Fleet]:
    model, record = teach(place / "model"), place / "record"
    command = [sys.executable, "-m", "fastft.serve.worker", "--model", str(model), "--name", "m", "--max_queue", "256"]
    with ExitStack() as stack:
        found = [stack.enter_context(started(WorkerProcess, command)) for _ in range(workers)]
        flags = [flag for worker in found for flag in ("--model", f"{worker.url}#m")]
        gateway = stack.enter_context(gateways.gateway(*flags, "--record", str(record), "--check_s", "1"))
        yield Fleet(gateway, found, record)


# What is counted -----------------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """A line of the table."""

    what: str
    wanted: str
    found: str
    good: bool


@dataclass
class Ledger:
    lines: list[Line] = field(default_factory=list)

    def add(self, what: str, wanted: str, found: str, good: bool) -> None:
        self.lines.append(Line(what, wanted, found, good))
        print(f"{'ok  ' if good else 'FAIL'} {what}: {found}", flush=True)


async def killed_under_streams(fleet: Fleet, clients: Clients, options: FaultsBenchmark, ledger: Ledger) -> None:
    asked = [asyncio.create_task(clients.ask(LONG)) for _ in range(options.streams)]
    deadline = time.monotonic() + HUNG_S
    while sum(each.first_s is not None for each in clients.received) < options.streams * 0.6:
        assert time.monotonic() < deadline, "the streams do not begin"
        await asyncio.sleep(0.05)
    fleet.kill(0)
    ends = Counter(each.end for each in await asyncio.gather(*asked))
    good = not set(ends) - {"whole", "worker_lost"} and ends["worker_lost"] > 0
    what = f"kill -9 of a worker under {options.streams} streams"
    ledger.add(what, "each whole, or ended by an error event", _counted(ends), good)


async def killed_under_requests(fleet: Fleet, clients: Clients, options: FaultsBenchmark, ledger: Ledger) -> None:
    kill = {options.requests // 3: lambda: fleet.kill(1)}
    found = await clients.ask_many(options.requests, AT_ONCE, kill)
    lost = [each for each in found if each.end != "whole" and not each.text]
    ends = Counter(each.end for each in found)
    what = f"{options.requests:,} requests, a worker killed meanwhile: lost before the first byte"
    ledger.add(what, "0", f"{len(lost)} ({_counted(ends)})", not lost and not set(ends) - {"whole", "worker_lost"})


async def leavers(fleet: Fleet, clients: Clients, options: FaultsBenchmark, ledger: Ledger) -> None:
    found = await asyncio.gather(*(clients.ask(4000, leave_after=3) for _ in range(options.leavers)))
    await asyncio.sleep(STOPPED_S)
    [last] = fleet.alive()
    health, steps = last.health(), last.metric("fastft_worker_steps")
    await asyncio.sleep(1.0)
    more = last.metric("fastft_worker_steps") - steps
    said = (
        f"{_counted(Counter(each.end for each in found))}; {health['running']} running, {health['waiting']} waiting, "
    )
    good = health["running"] == health["waiting"] == more == 0 and all(each.end == "left" for each in found)
    what = f"{options.leavers} clients leave in mid-stream; {STOPPED_S:g} s later"
    ledger.add(what, "nothing runs", f"{said}{more:.0f} steps in the next second", good)


async def memory(fleet: Fleet, clients: Clients, options: FaultsBenchmark, ledger: Ledger) -> None:
    first, seen = options.long_run // 5, {}
    look = {first: lambda: seen.update(fleet.usage())}
    found = await clients.ask_many(options.long_run, AT_ONCE, look)
    ends = Counter(each.end for each in found)
    ledger.add(f"{options.long_run:,} requests", "all whole", _counted(ends), set(ends) == {"whole"})
    _same_memory(ledger, f"request {first:,} to {options.long_run:,}", seen, fleet.usage())


async def connections(fleet: Fleet, clients: Clients, options: FaultsBenchmark, ledger: Ledger) -> None:
    seen, at_once = [], 500
    for _ in range(0, options.connections, at_once):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            replies = await asyncio.gather(*(session.get(f"{fleet.gateway.url}/models") for _ in range(at_once)))
            assert all(reply.status == 200 for reply in replies)
        seen.append(fleet.usage()["gateway"].rss_mb)
    first = len(seen) // 4
    what = f"RSS of the gateway, MB, connection {at_once * first:,} to {options.connections:,}"
    _same(ledger, what, GROWTH, seen[first - 1], seen[-1])


def _same_memory(ledger: Ledger, when: str, before: dict[str, Usage], after: dict[str, Usage]) -> None:
    for name in before:
        _same(ledger, f"RSS of the {name}, MB, {when}", GROWTH, before[name].rss_mb, after[name].rss_mb)


def _same(ledger: Ledger, what: str, growth: float, before: float, after: float) -> None:
    grown = after / before - 1
    ledger.add(what, f"grows by {growth:.0%} at most", f"{before:.3g} -> {after:.3g} ({grown:+.1%})", grown <= growth)


def compare_with_record(fleet: Fleet, clients: Clients, ledger: Ledger) -> None:
    """A client that left has got a beginning of what was sent to it; all others have got all of it."""
    recorded = gateways.events(fleet.record)
    events = {event["id"]: event for event in recorded}
    turns = [each for each in clients.received if each.id]
    wrong = Counter()
    for each in turns:
        event = events.pop(each.id, None)
        if event is None:
            wrong["not recorded"] += 1
            continue
        texts = "".join(answer["content"] for answer in event["answers"])
        same = texts.startswith(each.text) if each.end == "left" else texts == each.text
        wrong["another text"] += not same
        wrong["another question"] += event["messages"] != [{"role": "user", "content": each.question}]
        wrong["another outcome"] += event["outcome"] != OUTCOMES.get(each.end, "refused")
        wrong["another status"] += event["status"] != each.status
    wrong["nobody's"] = len(events)
    elsewhere = sum(event["failover"] and event["outcome"] == "answered" for event in recorded)
    wrong += Counter()  # without what is 0
    found = _counted(wrong) if wrong else f"{len(turns):,} of {len(turns):,}; {elsewhere} answered by a second worker"
    ledger.add("the record against what clients got", "equal", found, not wrong)


def _counted(ends: Counter) -> str:
    return ", ".join(f"{count:,} {end}" for end, count in ends.most_common())


# The soak ------------------------------------------------------------------------------------------------------------------

MIX = {
    "plain": (0.45, {"stream": False}),
    "stream": (0.45, {"stream": True}),
    "leaves": (0.05, {"stream": True, "tokens": LONG, "leave_after": 3}),
    "is wrong": (0.05, {"stream": False, "temperature": 9}),
}
"""How many do what."""
LOAD = 0.8
"""Of the rows of all workers that are busy: a client for each, who rests for a quarter of the time that its answer took. A rate
of requests would be another load as soon as the machine does something else, too."""
MORE_CPU = 0.25


def one_of(mix: dict, luck: random.Random) -> dict:
    return luck.choices([what for _, what in mix.values()], [share for share, _ in mix.values()])[0]


async def soak(fleet: Fleet, clients: Clients, options: FaultsBenchmark, ledger: Ledger) -> None:
    luck, began, seconds = random.Random(0), time.monotonic(), 60 * options.soak_minutes

    async def client() -> None:
        while time.monotonic() < began + seconds:
            got = await clients.ask(**one_of(MIX, luck))
            await asyncio.sleep(got.seconds * (1 / LOAD - 1))

    async def looks() -> list[tuple[int, dict[str, Usage]]]:
        """(requests so far, usage) after a fifth of the time, three fifths, and at the end."""
        found = []
        for share in (0.2, 0.6, 1.0):
            await asyncio.sleep(max(0.0, began + share * seconds - time.monotonic()))
            found.append((len(clients.received), fleet.usage()))
        return found

    everyone = (client() for _ in range(AT_ONCE * len(fleet.workers)))
    [(n_a, a), (n_b, b), (n_c, c)], *_ = await asyncio.gather(looks(), *everyone)
    ends = Counter(each.end for each in clients.received)
    good = not set(ends) - {"whole", "left", "refused"}
    what = f"{len(clients.received):,} requests in {options.soak_minutes:g} min, {LOAD:.0%} of what they can do"
    ledger.add(what, "none fails", _counted(ends), good)
    for name in a:
        before = 1000 * (b[name].cpu_s - a[name].cpu_s) / (n_b - n_a)
        after = 1000 * (c[name].cpu_s - b[name].cpu_s) / (n_c - n_b)
        _same(ledger, f"CPU of the {name}, ms a request, second and last two fifths", MORE_CPU, before, after)
    _same_memory(ledger, "from a fifth of the time on", a, c)
    idle = fleet.gateway.health()["in_flight"] == 0 and all(worker.idle() for worker in fleet.workers)
    ledger.add("afterwards", "idle", "idle" if idle else "something still runs", idle)


# -----------------------------------------------------------------------------------------------------------------------------


async def measure(fleet: Fleet, options: FaultsBenchmark, ledger: Ledger) -> None:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        clients = Clients(fleet.gateway.url, session)
        steps = (
            [soak]
            if options.soak_minutes
            else [killed_under_streams, killed_under_requests, leavers, memory, connections]
        )
        for step in steps:
            await step(fleet, clients, options, ledger)
        await asyncio.sleep(1.0)  # events gather before they are written
        compare_with_record(fleet, clients, ledger)


def main() -> int:
    [options] = parse(sys.argv[1:], "benchmarks/serve_faults.py", __doc__.splitlines()[0], FaultsBenchmark)
    ledger = Ledger()
    with tempfile.TemporaryDirectory() as place, fleet(Path(place), 2 if options.soak_minutes else 3) as servers:
        asyncio.run(measure(servers, options, ledger))
    table = Table("", "wanted", "found", "")
    for line in ledger.lines:
        table.add_row(line.what, line.wanted, line.found, "ok" if line.good else "FAILED")
    Console(width=150).print(table)
    return 0 if all(line.good for line in ledger.lines) else 1


if __name__ == "__main__":
    sys.exit(run(main))
