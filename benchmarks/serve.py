"""What a worker gives for a second of CPU time, beside what transformers brings along: all contestants in one run.

    OMP_NUM_THREADS=1 python benchmarks/serve.py --model DIR [--rounds 3] [--requests 1 8]

Every contestant is a server in a process of its own with one thread, bfloat16, and the same client: prompts of about 190
tokens that differ from the first word on, 64 new tokens, greedy, streamed, so many requests at once. They take turns,
`--rounds` times. Printed are medians: tokens per second of the server's CPU time, which holds on a busy machine; the ratio
to the first contestant; seconds to the first token of the request that got it last, as a share of the time of all answers.

`transformers serve` needs `pip install transformers[serving]`; without it, only the worker is measured. Its continuous
batching gets a fixed number of cache blocks: by default it takes 60 % of the machine's memory.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

from fastft.common.command_line import option, parse, run
from fastft.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.ports import free_port  # noqa: E402

TOKENS = 64
WORDS = (
    "river garden window letter mountain winter music engine harbour kitchen forest paper bridge candle market silver island "
    "teacher morning stone animal village ocean carpet lantern shadow bread clock feather ladder mirror needle orchard pillow"
).split()
START_LIMIT_S = 300
TRANSFORMERS = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]


@dataclass
class ServeBenchmark:
    """Options of this benchmark."""

    model: str
    """A model's directory."""
    rounds: int = 3
    """Rounds; the medians over them are printed."""
    requests: list[int] = option([1, 8], several=True)
    """Numbers of requests at once."""


@dataclass
class Contestant:
    name: str
    command: list[str]
    port: int
    process: psutil.Process | None = None

    def cpu_seconds(self) -> float:
        everyone = [self.process, *self.process.children(recursive=True)]
        return sum(times.user + times.system for each in everyone for times in [each.cpu_times()])


def contestants(model: str) -> list[Contestant]:
    ports = [free_port() for _ in range(3)]
    ours = [sys.executable, "-m", "fastft.serve.worker", "--model", model, "--name", model, "--dtype", "bfloat16"]
    found = [Contestant("fastft worker", [*ours, "--port", str(ports[0])], ports[0])]
    if importlib.util.find_spec("fastapi"):
        theirs = [*TRANSFORMERS, model, "--dtype", "bfloat16", "--device", "cpu"]
        blocks = [
            "--continuous-batching",
            "--cb-block-size",
            "32",
            "--cb-num-blocks",
            "256",
            "--cb-max-batch-tokens",
            "2048",
        ]
        found.append(
            Contestant(
                "transformers serve --continuous-batching", [*theirs, *blocks, "--port", str(ports[1])], ports[1]
            )
        )
        found.append(Contestant("transformers serve", [*theirs, "--port", str(ports[2])], ports[2]))
    return found


@contextlib.contextmanager
def running(contestant: Contestant) -> Iterator[None]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(contestant.command, stdout=subprocess.DEVNULL, env=environment)
    contestant.process = psutil.Process(process.pid)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def ready(contestant: Contestant, session: aiohttp.ClientSession) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(f"http://127.0.0.1:{contestant.port}/health") as response:
                if response.status == 200:
                    return
        if time.monotonic() > deadline or not contestant.process.is_running():
            raise UserError(f"{contestant.name}: did not start")
        await asyncio.sleep(0.5)


def prompt(luck: random.Random) -> str:
    words = " ".join(luck.choices(WORDS, k=130))
    return f"{words}. Write a long story in which all of these words appear, and do not stop before each was used."


async def ask(contestant: Contestant, session: aiohttp.ClientSession, model: str, text: str) -> tuple[int, float]:
    """(tokens generated, when the first came)."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first, tokens = 0.0, 0
    async with session.post(f"http://127.0.0.1:{contestant.port}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            if any(choice["delta"].get("content") for choice in event["choices"]):
                first = first or time.monotonic()
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    assert tokens, f"{contestant.name} gave no usage"
    return tokens, first


async def measure(contestant: Contestant, session: aiohttp.ClientSession, model: str, texts: list[str]) -> dict:
    cpu, began = contestant.cpu_seconds(), time.monotonic()
    answers = await asyncio.gather(*(ask(contestant, session, model, text) for text in texts))
    spent, wall = contestant.cpu_seconds() - cpu, time.monotonic() - began
    tokens, last_first = sum(n for n, _ in answers), max(first for _, first in answers) - began
    memory = contestant.process.memory_info().rss / 1e6
    return {
        "tokens/CPU s": tokens / spent,
        "tokens/s": tokens / wall,
        "last first token": last_first / wall,
        "MB": memory,
    }


async def compare(everyone: list[Contestant], model: str, requests: list[int], rounds: int) -> dict:
    figures: dict[tuple[str, int], list[dict]] = {}
    luck = random.Random(0)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1800)) as session:
        for contestant in everyone:
            await ready(contestant, session)
            await measure(contestant, session, model, [prompt(luck)])  # what the first request alone costs is left out
        for _ in range(rounds):
            for n in requests:
                texts = [prompt(luck) for _ in range(n)]
                for contestant in everyone:
                    measured = await measure(contestant, session, model, texts)
                    figures.setdefault((contestant.name, n), []).append(measured)
    return figures


def main() -> None:
    [options] = parse(sys.argv[1:], "benchmarks/serve.py", __doc__.splitlines()[0], ServeBenchmark)
    everyone, console = contestants(options.model), Console(width=130)
    with contextlib.ExitStack() as stack:
        for contestant in everyone:
            stack.enter_context(running(contestant))
        figures = asyncio.run(compare(everyone, options.model, options.requests, options.rounds))
    table = Table("", "requests", "tokens/CPU s (range)", "of the worker's", "tokens/s", "last first token", "MB")
    for n in options.requests:
        of_ours = statistics.median(each["tokens/CPU s"] for each in figures[everyone[0].name, n])
        for contestant in everyone:
            runs = figures[contestant.name, n]
            median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            low, high = min(run["tokens/CPU s"] for run in runs), max(run["tokens/CPU s"] for run in runs)
            per_cpu = f"{median['tokens/CPU s']:.1f} ({low:.1f}-{high:.1f})"
            share, wall = f"{median['tokens/CPU s'] / of_ours:.2f}", f"{median['tokens/s']:.1f}"
            table.add_row(
                contestant.name,
                str(n),
                per_cpu,
                share,
                wall,
                f"{median['last first token']:.0%}",
                f"{median['MB']:.0f}",
            )
    console.print(table)


if __name__ == "__main__":
    sys.exit(run(main))
