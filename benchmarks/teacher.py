"""What asking a teacher costs: rows a second, memory and resume, and what is paid twice when a run is killed again and again.

    python benchmarks/teacher.py [--rows 100000] [--concurrency 64]      # a local server that answers at once
    python benchmarks/teacher.py --kills 20                             # a teacher that fails on purpose, also in batches

The speed is that of the client with its cache in one process, `tests/helpers/asking.py`; the server is another process. The
second form asks 168 rows, 8 of them equal: every 9th request gets a 429 with Retry-After 2, every 31st a 500, one row always a
400, one a malformed body at first, one an empty answer.
"""

import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import kill_runs
from helpers.faulty_teacher import FaultyTeacher

from fastft.common.command_line import parse, run

WORDS = 300  # of an answer, which is about 1.7 kB


@dataclass
class BenchmarkConfig:
    """What is measured."""

    rows: int = 100_000
    """Rows that are asked of a server that answers at once."""
    concurrency: int = 64
    """Requests at a time."""
    kills: int = 0
    """Measure kills instead of speed: so many, at random moments."""


class AtOnce(asyncio.Protocol):
    """An endpoint that answers as soon as it has read a request."""

    def __init__(self):
        message = {"role": "assistant", "content": "word " * WORDS}
        usage = {"prompt_tokens": 20, "completion_tokens": WORDS, "total_tokens": WORDS + 20}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = json.dumps({"id": "x", "model": "teacher", "choices": [choice], "usage": usage}).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.reply, self.read = head.encode() + body, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.read += data
        while (end := self.read.find(b"\r\n\r\n")) >= 0:
            size = int(self.read[:end].lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            if len(self.read) < end + 4 + size:
                return
            self.read = self.read[end + 4 + size :]
            self.transport.write(self.reply)


def serve(port: "multiprocessing.Queue[int]") -> None:
    """Serve `AtOnce` until the process is ended."""

    async def forever() -> None:
        server = await asyncio.get_running_loop().create_server(AtOnce, "127.0.0.1", 0)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(forever())


def measure_speed(config: BenchmarkConfig, directory: Path) -> Table:
    """Ask all rows, and then the same again, which is what a resumed run does first."""
    port: multiprocessing.Queue[int] = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(port,), daemon=True)
    server.start()
    rows = directory / "rows.jsonl"
    query = "What is the question? " * 20
    rows.write_text("".join(json.dumps({"id": f"q{i}", "query": f"{i}: {query}"}) + "\n" for i in range(config.rows)))
    command = [sys.executable, kill_runs.PROGRAM, rows, f"http://127.0.0.1:{port.get()}/v1#teacher", directory]
    table = Table("", "seconds", "rows/s", "CPU ms a row", "peak memory")
    for name in ("all asked", "all cached"):
        began = time.monotonic()
        process = subprocess.Popen([*command, "--concurrency", str(config.concurrency)], stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0
        seconds, cpu = time.monotonic() - began, used.ru_utime + used.ru_stime
        figures = f"{seconds:.1f}", f"{config.rows / seconds:,.0f}", f"{1000 * cpu / config.rows:.2f}"
        table.add_row(name, *figures, f"{used.ru_maxrss / 1024:,.0f} MiB")
    server.terminate()
    size = (directory / "cache.jsonl").stat().st_size
    table.caption = f"{config.rows:,} rows, {config.concurrency} at a time; a cache of {size / 1e6:,.0f} MB"
    return table


def measure_kills(config: BenchmarkConfig, directory: Path, console: Console) -> Table:
    """Kill a run of each kind, and compare it with one that nobody has killed."""
    rows = directory / "rows.jsonl"
    kill_runs.write_rows(rows)
    columns = ("kills", "as uninterrupted", "asked", "paid twice", "in flight at the kills", "the 8 equal rows paid")
    table = Table("", *columns, "Retry-Afters", "started in them", "the latest of them")
    for batch in (False, True):
        teacher = FaultyTeacher(wait_s=0.0 if batch else 0.25)
        whole = kill_runs.run_killed(rows, directory / f"whole{batch}", teacher, 0, batch=batch)
        console.print(f"{'batches' if batch else 'single requests'}: {whole.seconds:.0f} s without kills")
        killed = kill_runs.run_killed(
            rows,
            directory / f"killed{batch}",
            teacher,
            config.kills,
            batch=batch,
            most_s=0.5 if batch else 2.0,
            polls=40,
        )
        late = killed.started_in_pauses
        table.add_row(
            "batches" if batch else "single requests",
            *map(str, (killed.kills, whole.answers == killed.answers, killed.asked, killed.paid_twice)),
            *map(str, (killed.in_flight, f"{killed.repeats_paid} times", killed.pauses, len(late))),
            f"{max(late):.3f} s after" if late else "",
        )
    return table


def main() -> int:
    [config] = parse(sys.argv[1:], "benchmarks/teacher.py", "Measure what asking a teacher costs.", BenchmarkConfig)
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        console.print(measure_kills(config, directory, console) if config.kills else measure_speed(config, directory))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
