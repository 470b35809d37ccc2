"""Kill a run again and again, and count what the endpoint was asked: used by a test and by `benchmarks/teacher.py`."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from helpers import openai_server
from helpers.faulty_teacher import FaultyTeacher
from helpers.openai_batches import BatchStore

PROGRAM = Path(__file__).with_name("asking.py")
UNREAD_S = 0.3  # how long a process on a busy machine may need to read what came in
CONCURRENCY = 8
REPEATED = "What is asked again and again?"


@dataclass
class Killed:
    """What a run that was killed has cost.

    `in_flight` are the requests on the way, summed over the kills: those that the endpoint was working on, and those whose
    answers the run may not have read yet.
    """

    answers: list[dict]
    kills: int
    asked: int
    paid_twice: int
    in_flight: int
    repeats_paid: int
    pauses: int
    started_in_pauses: list[float]
    """Seconds after the endpoint's 429 at which other requests came in, for every 429 that was read before a kill. Those that
    were on the way come in at once."""
    seconds: float


def write_rows(path: Path, number: int = 168, repeats: int = 8) -> None:
    """Write rows of which `repeats` are equal, one is always refused, one malformed at first, and one answered with nothing."""
    texts = [f"What is {i} times {i}?" for i in range(number - repeats - 3)]
    texts += ["[400] What is refused?", "[malformed] What is broken?", "[empty] What is nothing?"]
    step = len(texts) // repeats
    for i in range(repeats):
        texts.insert(i * (step + 1), REPEATED)
    path.write_text("".join(json.dumps({"id": f"q{i}", "query": text}) + "\n" for i, text in enumerate(texts)))


def run_killed(
    rows: Path,
    directory: Path,
    teacher: FaultyTeacher,
    kills: int,
    seed: int = 0,
    batch: bool = False,
    most_s: float = 3.0,
    polls: int = 3,
) -> Killed:
    """Start the run, kill it after up to `most_s` seconds from its first request on, and so on; then let it end."""
    rng, began, in_flight, killed = random.Random(seed), time.monotonic(), 0, 0
    store = BatchStore(polls=polls, end=lambda number: "expired" if number % 3 == 0 else "completed") if batch else None
    directory.mkdir()
    with openai_server.endpoint(replace(teacher), batches=store) as server:
        command = [
            sys.executable,
            str(PROGRAM),
            str(rows),
            f"{server.url}#teacher",
            str(directory),
            "--quick",
            "--concurrency",
            str(CONCURRENCY),
        ]
        while True:
            before = server.touched
            process = subprocess.Popen([*command, *["--batch"] * batch], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
            if killed < kills:
                while process.poll() is None and server.touched == before:
                    time.sleep(0.001)
                try:
                    process.wait(rng.uniform(0, most_s))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    with server.lock:
                        unread = sum(time.monotonic() - ended < UNREAD_S for ended in server.ended)
                        in_flight += min(CONCURRENCY, server.in_flight + unread)
                        for pause in server.pauses:
                            pause.unread = pause.unread or time.monotonic() - pause.began < UNREAD_S
                    process.wait()
                    killed += 1
                    continue
            said = process.communicate()[1].decode()
            assert process.returncode == 0, said
            break
        answers = [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]
        time.sleep(teacher.wait_s + 0.1)  # answers to those that were killed
        paid = store.paid if store else server.paid_for
        repeated = [body for body in server.requests if body["messages"][-1]["content"] == REPEATED]
        return Killed(
            answers=answers,
            kills=killed,
            asked=len(server.requests),
            paid_twice=sum(count - 1 for count in paid.values() if count > 1),
            in_flight=in_flight,
            repeats_paid=server.paid_for[openai_server.digest_of(repeated[0])] if not batch else 1,
            pauses=len(server.pauses),
            started_in_pauses=sorted(each for pause in server.pauses if not pause.unread for each in pause.started),
            seconds=time.monotonic() - began,
        )
