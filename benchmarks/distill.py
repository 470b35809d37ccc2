"""Measure `fastft distill`: rows a second with its ledger, memory and the time to go on; or what 20 kills cost.

    python benchmarks/distill.py speed [--queries 100000]       # an endpoint on this machine that answers at once
    python benchmarks/distill.py kills [--kills 20]             # 168 rows, 8 of them equal; 429, 500, a 400, odd bodies

`speed` also gives the CPU seconds, because the wall time on a machine that others use says little. `kills` runs the same rows
once without kills and once with a SIGKILL of the whole process group after every few answers, and compares what is written.
"""

import asyncio
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastft.common.command_line import option, parse, run

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


@dataclass
class DistillBenchmark:
    what: Literal["speed", "kills"] = option("speed", positional=True)
    """Which measurement."""
    queries: int = 100_000
    """For speed: how many."""
    kills: int = 20
    """For kills: how many."""
    near: float = 0.8
    """For speed: the similarity of near duplicates, 0 for no search."""


class AtOnce(asyncio.Protocol):
    """An HTTP server that answers every request at once with the same completion."""

    TEXT = "First, what is asked is restated. Then each step follows from the one before. " * 8
    BODY = json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "at-once",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 60, "completion_tokens": 120, "total_tokens": 180},
        }
    ).encode()
    HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    first_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport, self.pending = transport, b""

    def data_received(self, data: bytes) -> None:
        self.pending += data
        while (end := self.pending.find(b"\r\n\r\n")) >= 0:
            head = self.pending[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n")[0]) if at >= 0 else 0
            if len(self.pending) < end + 4 + size:
                return
            self.pending = self.pending[end + 4 + size :]
            AtOnce.first_at = AtOnce.first_at or time.time()
            if head.startswith(
                b"get /first"
            ):  # what the benchmark asks: when the first request came, and from now on anew
                said = f"{AtOnce.first_at}".encode()
                AtOnce.first_at = 0.0
                self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(said) + said)
            else:
                self.transport.write(self.HEAD + self.BODY)


def serve(ready: multiprocessing.Queue) -> None:
    async def forever() -> None:
        server = await asyncio.get_running_loop().create_server(AtOnce, "127.0.0.1", 0)
        ready.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(forever())


def first_request(port: int) -> float:
    """When the first request came since the last call, in unix seconds."""
    from urllib.request import urlopen

    return float(urlopen(f"http://127.0.0.1:{port}/first").read())


def measured(settings: Path) -> tuple[float, float, float]:
    """Run `fastft distill`. Returns its seconds, CPU seconds and largest memory in MB."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "fastft.distill.command", str(settings)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - began, cpu, after.ru_maxrss / 1e3


def speed(config: DistillBenchmark, place: Path) -> None:
    """Ask so many queries, then go on from half of the answers, then run once more with nothing left to ask."""
    import random

    ready: multiprocessing.Queue = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(ready,), daemon=True)
    server.start()
    port, words = ready.get(), random.Random(0)
    with (place / "queries.jsonl").open("w") as file:
        for number in range(config.queries):
            text = " ".join(f"{words.randrange(10**6)}" for _ in range(30))
            row = {
                "id": f"q{number}",
                "collection": "mine",
                "task": f"t{number % 100}",
                "query": f"{number}: sort {text}",
            }
            file.write(json.dumps(row) + "\n")
    teacher = {"name": "first", "url": f"http://127.0.0.1:{port}/v1", "model": "at-once", "concurrency": 64}
    given = {
        "queries": str(place / "queries.jsonl"),
        "messages": "none",
        "output": str(place / "run"),
        "teachers": [teacher],
    }
    settings = place / "distill.yaml"
    settings.write_text(json.dumps({**given, "verify": {"near": config.near}}))
    seconds, cpu, memory = measured(settings)
    print(
        f"{config.queries:,} rows: {seconds:.0f} s ({config.queries / seconds:,.0f} rows/s), {cpu:.0f} s of CPU, {memory:.0f} MB"
    )
    first_request(port)
    answers = place / "run/answers.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[: len(lines) // 2]))
    began = time.time()
    seconds, cpu, memory = measured(settings)
    print(
        f"half of them again: the first request after {first_request(port) - began:.1f} s; {seconds:.0f} s, {memory:.0f} MB"
    )
    seconds, cpu, memory = measured(settings)
    print(f"nothing to ask: {seconds:.0f} s, {cpu:.0f} s of CPU, {memory:.0f} MB: reading, verifying and writing")
    server.terminate()


def kills(config: DistillBenchmark, place: Path) -> None:
    from helpers import openai_server
    from helpers.distilling import distill, kept, rejected, rows, settings, start, write_lines
    from helpers.faulty_teacher import FaultyTeacher
    from helpers.kill_runs import UNREAD_S

    marks = {20: " [400]", 40: " [malformed]", 60: " [empty]"}
    queries = [{"id": f"q{n}", "query": f"What is {n}?{marks.get(n, '')}"} for n in range(160)]
    queries += [{"id": f"again{n}", "query": f"What is {n}?"} for n in range(8)]
    given_to = {"teacher_concurrency": 8, "teacher_retries": 50, "verify": {"repeats": "share", "near": 0}}
    found = {}
    for name, count in (("whole", 0), ("killed", config.kills)):
        at = place / name
        at.mkdir()
        write_lines(at / "queries.jsonl", queries)
        teacher, failed = FaultyTeacher(wait_s=0.25), [0]

        def reply(body: dict, number: int, teacher: FaultyTeacher = teacher, failed: list[int] = failed) -> object:
            said = teacher(body, number)
            failed[0] += isinstance(said, openai_server.Failure) or b'"choices": []' in (
                said if isinstance(said, bytes) else b""
            )
            return said

        with openai_server.endpoint(reply) as server:
            given, in_flight, before = settings(at, server.url, **given_to), 0, 0
            for kill in range(1, count + 1):
                process = start(at, **given)
                while teacher.seen.total() < kill * 160 // (count + 1) and process.poll() is None:
                    time.sleep(0.01)
                os.killpg(process.pid, signal.SIGKILL)
                for pause in server.pauses:  # nobody can obey what was said to a run that had no time to read it
                    pause.unread = pause.unread or time.monotonic() - pause.began < UNREAD_S
                process.wait()
                # What the run had asked and not yet written down: the endpoint may have sent some of it.
                path = at / "run/answers.jsonl"
                ended = failed[0] + (path.read_bytes().count(b"\n") if path.is_file() else 0)
                in_flight, before = in_flight + len(server.requests) - ended - before, len(server.requests) - ended
            assert distill(at, **given) == 0
            twice = sum(each - 1 for each in server.paid_for.values())
            late = sorted(each for pause in server.pauses if not pause.unread for each in pause.started)
            print(
                f"{name}: {len(kept(at))} kept, {len(rejected(at))} rejected, {len(server.requests)} requests, "
                f"paid twice {twice} (in flight at the kills: {in_flight}), {len(server.pauses)} pauses, "
                f"{len(late)} requests in them, the latest {max(late, default=0):.2f} s after their begin"
            )
        found[name] = (
            [row["messages"] for row in kept(at)],
            rejected(at),
            sorted(row["key"] for row in rows(at / "run/answers.jsonl")),
        )
    print("equal:", found["whole"] == found["killed"])


def main() -> None:
    [config] = parse(sys.argv[1:], "benchmarks/distill.py", "Measure fastft distill.", DistillBenchmark)
    with tempfile.TemporaryDirectory() as place:
        (speed if config.what == "speed" else kills)(config, Path(place))


if __name__ == "__main__":
    sys.exit(run(main))
