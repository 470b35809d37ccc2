"""The cleaner on one big array file: memory and speed, and what twenty SIGKILLs do to the result.

    python benchmarks/scale.py memory --megabytes 2048       peak memory of all processes together, conversations/s
    python benchmarks/scale.py kills --megabytes 64           killed twenty times at random moments, then finished

The dump is made on the spot: ShareGPT conversations of 1 to 8 rounds of page HTML from 50,000 sentences of random words,
of which one in fifty is another's copy; 8 KB each, as in real dumps. Near duplicates and the language filter are on.
"""

import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastft.common.command_line import option, parse, run

PAGE = '<div class="markdown prose w-full break-words">%s</div>'
OPTIONS = ("--languages", "en", "--keep_refusals")


@dataclass
class ScaleBenchmark:
    """Options of this benchmark."""

    what: Literal["memory", "kills"] = option(positional=True)
    """memory: the peak memory and the speed of one run. kills: runs that are killed at random moments, and finished."""
    megabytes: int = 64
    """The size of the dump."""
    workers: int | None = None
    """Number of worker processes, by default one a core."""
    times: int = 20
    """How often a run is killed."""


def make_dump(path: Path, megabytes: int) -> int:
    """Write a JSON array of about that size; returns its conversations."""
    choose = random.Random(0)
    syllables = [a + b for a in "bcdfglmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "in")]
    words = ["".join(choose.choices(syllables, k=choose.randint(1, 3))) for _ in range(20_000)]
    words[::4] = ["the", "of", "and", "to", "in", "is", "that", "for", "with", "as"] * 500  # reads as English
    sentences = [" ".join(choose.choices(words, k=choose.randint(6, 20))) + "." for _ in range(50_000)]

    def paragraphs(count: int) -> str:
        return "".join(f"<p>{' '.join(choose.choices(sentences, k=5))}</p>" for _ in range(count))

    written, count, last = 0, 0, []
    with path.open("w") as out:
        out.write("[")
        while written < megabytes << 20:
            if count % 50 or not last:
                last = []
                for _ in range(choose.randint(1, 8)):
                    last.append({"from": "human", "value": " ".join(choose.choices(sentences, k=2))})
                    last.append({"from": "gpt", "value": PAGE % paragraphs(choose.randint(1, 4))})
            record = json.dumps({"id": f"c{count}", "conversations": last})
            written += out.write(f"{',' if count else ''}\n{record}")
            count += 1
        out.write("]\n")
    return count


def command(dump: Path, out: Path, workers: int | None) -> list[str]:
    more = ("--workers", str(workers)) if workers else ()
    return [sys.executable, "-m", "cleaning", str(dump), "-o", str(out), *OPTIONS, *more]


def memory_of(root: int) -> int:
    """Resident bytes of a process and all that come from it."""
    parents, resident = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            parents[int(entry.name)], resident[int(entry.name)] = int(fields[1]), int(fields[21])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family and pid not in family}:
        family |= more
    return sum(resident.get(pid, 0) for pid in family) * os.sysconf("SC_PAGE_SIZE")


def measure_memory(dump: Path, out: Path, workers: int | None, conversations: int) -> None:
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(command(dump, out, workers))
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(0.1)
    took, size = time.monotonic() - began, dump.stat().st_size
    assert process.returncode == 0
    print(
        f"{size / 1e6:,.0f} MB, {conversations:,} conversations: {took:,.0f} s, {conversations / took:,.0f} conversations/s, "
        f"{size / 1e6 / took:.1f} MB/s; peak memory of all processes {peak / 1e6:,.0f} MB"
    )


def kill_and_finish(dump: Path, directory: Path, workers: int | None, times: int) -> None:
    began = time.monotonic()
    subprocess.run(command(dump, directory / "whole", workers), check=True, stdout=subprocess.DEVNULL)
    took, moments = time.monotonic() - began, random.Random(1)
    killed = starts = 0
    while killed < times:
        starts += 1
        process = subprocess.Popen(command(dump, directory / "out", workers), stdout=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0, 0.5) * took)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        if (directory / "out/report.json").exists():  # it has finished: the next run begins with an empty directory
            same(directory)
            for path in (directory / "out").iterdir():
                path.unlink()
    subprocess.run(command(dump, directory / "out", workers), check=True, stdout=subprocess.DEVNULL)
    same(directory)
    print(
        f"killed {killed} times in a run of {took:.0f} s, started {starts + 1} times: every finished result is identical"
    )


def same(directory: Path) -> None:
    names = sorted(path.name for path in (directory / "whole").iterdir())
    assert names == sorted(path.name for path in (directory / "out").iterdir())
    _, different, unreadable = filecmp.cmpfiles(directory / "whole", directory / "out", names, shallow=False)
    assert not different and not unreadable, (different, unreadable)


def main() -> None:
    [options] = parse(sys.argv[1:], "benchmarks/scale.py", __doc__.splitlines()[0], ScaleBenchmark)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        conversations = make_dump(directory / "dump.json", options.megabytes)
        if options.what == "memory":
            measure_memory(directory / "dump.json", directory / "out", options.workers, conversations)
        else:
            kill_and_finish(directory / "dump.json", directory, options.workers, options.times)


if __name__ == "__main__":
    sys.exit(run(main))
