"""What the gateway costs: CPU milliseconds of its process for a request, plain and for a stream of 16 chunks, and its memory.

    python benchmarks/gateway.py [--requests 2000] [--rounds 3] [--streams 100]

The real `fastft serve` with a virtual model and the record on, before two scripted workers; 8 clients at once, messages of 200
words. CPU time is the process's own, user and system, from /proc: it does not depend on what else the machine does.

The 16 chunks come all at once, and leave together. Of streams as engines send them, 20 chunks a second one by one, the CPU
time of a chunk is measured, and with it how many one core carries.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import gateways

from fastft.common.command_line import parse, run

GOALS = {"plain": 0.3, "stream": 0.5}
PACE_S, PACED_CHUNKS = 0.05, 100


@dataclass
class GatewayBenchmark:
    """Options of this benchmark."""

    requests: int = 2000
    """Requests of each kind in a round."""
    rounds: int = 3
    """Rounds; the medians over them are printed."""
    streams: int = 100
    """Streams at once whose chunks come one by one."""


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def ask_many(url: str, requests: int, stream: bool, at_once: int = 8) -> None:
    words = " ".join(f"word{i}" for i in range(200))
    left = iter(range(requests))

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        for each in left:
            messages = [{"role": "user", "content": f"{number} {each} {words}"}]
            async with session.post(url, json={"model": "best", "messages": messages, "stream": stream}) as response:
                content = await response.read()
                assert response.status == 200 and content.endswith(b"[DONE]\n\n") == stream, content[:200]

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session, number) for number in range(at_once)))


def main() -> None:
    [options] = parse(sys.argv[1:], "benchmarks/gateway.py", __doc__.splitlines()[0], GatewayBenchmark)
    costs: dict[str, list[float]] = {"plain": [], "stream": []}
    with tempfile.TemporaryDirectory() as place, gateways.scripted("m") as a, gateways.scripted("m") as b:
        config = {
            "workers": [{"url": a.entry}, {"url": b.entry}],
            "virtual": [{"name": "best", "model": "m"}],
            "record": str(Path(place) / "record"),
        }
        for worker in (a, b):
            worker.do(chunks=16)
        with gateways.gateway(config=config, directory=Path(place)) as served:
            pid, url = served.process.pid, f"{served.url}/chat/completions"
            memory = [rss_mb(pid)]
            for kind in costs:
                asyncio.run(ask_many(url, 200, kind == "stream"))
            for _ in range(options.rounds):
                for kind, found in costs.items():
                    before = cpu_s(pid)
                    asyncio.run(ask_many(url, options.requests, kind == "stream"))
                    found.append(1000 * (cpu_s(pid) - before) / options.requests)
                memory.append(rss_mb(pid))
            for worker in (a, b):
                worker.do(chunks=PACED_CHUNKS, delay_s=PACE_S)
            before = cpu_s(pid)
            asyncio.run(ask_many(url, options.streams, stream=True, at_once=options.streams))
            chunk_ms = 1000 * (cpu_s(pid) - before) / (options.streams * PACED_CHUNKS)
            events = len(gateways.events(Path(place) / "record"))
    table = Table("", "CPU ms a request, median (min-max)", "goal")
    for kind, found in costs.items():
        table.add_row(kind, f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})", f"{GOALS[kind]}")
    Console(width=100).print(table)
    print(f"one core: {1000 / statistics.median(costs['plain']):,.0f} plain requests a second")
    carried = 1000 * PACE_S / chunk_ms
    print(
        f"{options.streams} streams with a chunk every {PACE_S:g} s: {chunk_ms:.3f} ms a chunk, {carried:,.0f} streams a core"
    )
    print(f"RSS {memory[0]:.0f} MB at the start, {memory[-1]:.0f} MB after {events:,} requests (goal: under 60)")
    print(json.dumps({kind: [round(each, 3) for each in found] for kind, found in costs.items()}))


if __name__ == "__main__":
    sys.exit(run(main))
