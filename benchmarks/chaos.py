"""Preempt a run again and again until it finishes, and compare the result with that of an uninterrupted run.

    python benchmarks/chaos.py                                # 20 preemptions, always 2 processes: bit-identical
    python benchmarks/chaos.py --processes 2,1,4              # other numbers of processes: equal up to rounding
    python benchmarks/chaos.py --trace FILE --seed 3          # lives with the relative lengths of a recorded trace

The run is a real training on 2 processes (torchrun, gloo, a tiny Llama), which uploads its checkpoints to a real S3 server on
loopback through a proxy that cuts every ninth connection. Each of its lives ends in one of these ways:

    notice   SIGTERM to torchrun, as SkyPilot sends it: the run has 30 s to save and leave, then SIGKILL
    hurried  SIGTERM, and SIGKILL 0.2 s later
    kill     SIGKILL to all its processes at once
    save     SIGKILL while a checkpoint is being written
    upload   SIGKILL while a checkpoint is being uploaded, which is slow then
    lost     SIGKILL, and the machine's disk is lost: only storage is left
    outage   as lost, and while the next start fetches its checkpoint, storage is gone for 10 s
    expired  storage refuses the token, another process writes a new one 3 s later, and after an upload with it comes SIGKILL
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from helpers import models, storage  # noqa: E402

from fastft.common.object_store import Store  # noqa: E402
from fastft.cost.spot.traces import read_trace  # noqa: E402
from fastft.train.checkpoint import manifest  # noqa: E402
from fastft.train.checkpoint.remote import checkpoints  # noqa: E402
from fastft.train.report.metrics import read_metrics  # noqa: E402

WAYS = ("notice", "hurried", "kill", "save", "upload", "lost", "outage", "expired")
OUTAGE_S, RENEWAL_S = 10, 3
EVERY = 3  # steps between two checkpoints
PATIENCE_S = 180
NOTICE_S = {"notice": 30.0, "hurried": 0.2}  # between SIGTERM and SIGKILL; the other ways have no SIGTERM


@dataclass
class Life:
    """One start of the run, and how it ended."""

    way: str
    processes: int
    resumed: int
    reached: int
    held: int  # the newest step of a checkpoint that survived
    first_step_s: float | None
    code: int | None


@dataclass
class Run:
    """A training run's directory, storage and command."""

    ground: Path
    out: Path
    remote: str
    steps: int

    def command(self, processes: int) -> list[str]:
        port = str(29600 + random.randrange(300))
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
        return [sys.executable, *(torchrun if processes > 1 else []), "-m", "fastft.train", *self.flags()]

    def flags(self) -> list[str]:
        return [
            "--model", str(self.ground / "model"), "--data", str(self.ground / "data.jsonl"),
            "--output_dir", str(self.out), "--seq_len", "160", "--global_batch_size", "4", "--optimizer.lr", "1e-3",
            "--epochs", "1000", "--max_steps", str(self.steps), "--trackers", "none",
            "--checkpoint.every", str(EVERY), "--checkpoint.remote", self.remote,
        ]  # fmt: skip

    def start(self, processes: int) -> subprocess.Popen:
        self.out.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(self.command(processes), stderr=self.log_file.open("a"), start_new_session=True)

    def step(self) -> int:
        path = self.out / "metrics.jsonl"
        return max((row["step"] for row in read_metrics(path)), default=0) if path.exists() else 0

    def on_disk(self) -> int:
        steps = [manifest.read(path)["step"] for path in (self.out / "checkpoints").glob("step-????????")]
        return max(steps, default=0)

    def in_storage(self) -> int:
        return max((meta["step"] for _, meta in checkpoints(Store(self.remote)).found), default=0)

    @property
    def log_file(self) -> Path:
        return self.out.parent / f"{self.out.name}.log"

    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""


def drop_while_it_fetches(run: Run, line: storage.Line) -> None:
    """Take storage away for OUTAGE_S once the run's next start fetches a checkpoint, from a thread."""
    said = len(run.log())

    def watch() -> None:
        until = time.monotonic() + PATIENCE_S
        while "of its files," not in run.log()[said:] and time.monotonic() < until:
            time.sleep(0.01)
        line.drop()
        time.sleep(OUTAGE_S)
        line.restore()

    threading.Thread(target=watch, daemon=True).start()


def expire(line: storage.Line) -> None:
    """Let storage refuse the token that is used now, and write another one RENEWAL_S later."""
    path = Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"])
    key = path.read_text().split("aws_access_key_id = ")[1].split()[0]
    line.refusal = storage.Refusal(403, "ExpiredToken", "The provided token has expired.", key=key)
    threading.Timer(RENEWAL_S, storage.write_credentials, (path, f"{key}X")).start()


def live(run: Run, way: str, processes: int, steps: int, line: storage.Line) -> Life:
    """Start the run, let it take about `steps` steps, and end it in the given way."""
    before, start, first = len(run.log()), None, None
    refused, expired_at = line.refused, None
    began, process = time.monotonic(), run.start(processes)
    while process.poll() is None and time.monotonic() - began < PATIENCE_S:
        time.sleep(0.01)
        words = run.log()[before:]
        if first is None and "first step after" in words:  # until then the files are an earlier life's
            start = int(words.split("resumed: step ")[1].split()[0]) if "resumed: step " in words else 0
            first = time.monotonic() - began
        if first is not None and run.step() >= start + steps:
            if way == "expired" and expired_at is None:
                expired_at = run.in_storage()
                expire(line)
            elif way == "expired":
                if line.refused > refused and run.in_storage() > expired_at:
                    break
            elif _moment(run, way, line):
                break
    reached = run.step()
    if process.poll() is None:
        end(run, process, NOTICE_S.get(way))
    code = process.wait(PATIENCE_S)
    line.bytes_per_s = 0
    reached = max(reached, run.step())
    if way in ("lost", "outage"):
        shutil.rmtree(run.out)
    held = run.in_storage() if way in ("lost", "outage") else run.on_disk()
    if way == "outage" and held:
        drop_while_it_fetches(run, line)
    return Life(way, processes, start or 0, reached, held, first, code)


def end(run: Run, process: subprocess.Popen, notice_s: float | None) -> None:
    """Send SIGTERM to torchrun and the script that started it and wait for `notice_s`, unless that is None; then SIGKILL all.

    torchrun's workers are in sessions of their own, so they are found by their command line.
    """
    if notice_s is not None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(notice_s)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(["pkill", "-KILL", "-f", "--", f"--output_dir {run.out} "], check=False)
        time.sleep(0.1)


def _moment(run: Run, way: str, line: storage.Line) -> bool:
    """Whether the moment has come at which a life ends in this way."""
    if way == "save":
        return bool(list((run.out / "checkpoints").glob("step-*.tmp")))
    if way == "upload":
        line.bytes_per_s = 200_000
        return run.on_disk() > run.in_storage()
    if way == "outage":
        return run.in_storage() > 0  # else there is nothing to fetch
    return True


def uninterrupted(run: Run, processes: int) -> None:
    subprocess.run(run.command(processes), check=True, capture_output=True)


def chaos(
    ground: Path,
    line: storage.Line,
    lives: list[tuple[str, int, int]],
    processes: int,
    steps: int,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Run, Run, list[Life]]:
    """An uninterrupted run, and one that is ended as in `lives` (way, steps, processes) and then left to finish."""
    whole, torn = (Run(ground, ground / name, f"s3://runs/{name}", steps) for name in ("whole", "torn"))
    uninterrupted(whole, processes)
    line.cut_every = 9
    found = []
    for way, length, number in lives:
        found.append(live(torn, way, number, length, line))
        progress(f"{len(found)}: {found[-1]}")
    done = torn.start(processes)
    if done.wait(PATIENCE_S * 2):
        raise RuntimeError(torn.log()[-3000:])
    line.cut_every = 0
    return whole, torn, found


def curve(run: Run) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run.out / "metrics.jsonl")]


def furthest(one: list[tuple], other: list[tuple]) -> float:
    """The largest relative difference of the losses of two curves."""
    return max(abs(a[1] - b[1]) / a[1] for a, b in zip(one, other, strict=True))


def spread(ground: Path, steps: int, processes: list[int]) -> float:
    """How far apart uninterrupted runs on different numbers of processes are: rounding that has grown over the steps."""
    curves = []
    for number in sorted(set(processes)):
        run = Run(ground, ground / f"whole-{number}", f"s3://runs/whole-{number}", steps)
        uninterrupted(run, number)
        curves.append(curve(run))
    return max(furthest(curves[0], other) for other in curves)


def same_weights(one: Run, other: Run) -> bool:
    return (one.out / "model/model.safetensors").read_bytes() == (other.out / "model/model.safetensors").read_bytes()


def plan(
    preemptions: int, processes: list[int], steps: int, trace: str | None, seed: int
) -> list[tuple[str, int, int]]:
    """(way, steps, processes) of each life. The lengths are, relatively, those of the trace or of a constant hazard."""
    source = random.Random(seed)
    if trace:
        recorded = read_trace(trace)
        falls = recorded.times[1:][recorded.counts[1:] < recorded.counts[:-1]]
        gaps = [float(gap) for gap in falls[1:] - falls[:-1]]
        times = (gaps * (preemptions // len(gaps) + 1))[:preemptions]
    else:
        times = [source.expovariate(1.0) for _ in range(preemptions)]
    scale = 0.6 * steps / sum(times)
    ways = [*WAYS] * (preemptions // len(WAYS) + 1)
    source.shuffle(ways)
    return [
        (ways[i], max(1, round(time * scale)), processes[i % len(processes)])
        for i, time in enumerate(times[:preemptions])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preemptions", type=int, default=20)
    parser.add_argument("--processes", default="2", help="numbers of processes, in turn, separated by commas")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--trace", help="a recorded trace, whose lives are replayed faster")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    processes = [int(number) for number in arguments.processes.split(",")]
    console = Console()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as work, storage.s3() as line:
        ground = Path(work)
        os.environ["FASTFT_CACHE"] = f"{work}/cache"
        os.environ["AWS_SHARED_CREDENTIALS_FILE"] = f"{work}/credentials"
        storage.write_credentials(ground / "credentials", "TOKEN")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            del os.environ[name]
        models.make_model(ground / "model")
        models.make_data(ground / "data.jsonl")
        lives = plan(arguments.preemptions, processes, arguments.steps, arguments.trace, arguments.seed)
        whole, torn, found = chaos(ground, line, lives, processes[0], arguments.steps, console.print)
        console.print(report(found))
        expected, got = curve(whole), curve(torn)
        worst = furthest(expected, got)
        identical = expected == got and same_weights(whole, torn)
        console.print(f"{line.cuts} connections to storage were cut, {line.refused} requests refused")
        console.print([line for line in torn.log().splitlines() if line.startswith("checkpoints:")][-1])
        console.print(
            f"losses: largest relative difference {worst:.1e}; losses, norms and weights bit-identical: {identical}"
        )
        kept = all(later.resumed >= life.held for life, later in zip(found, found[1:]))
        console.print(f"no step was lost that a published checkpoint held: {kept}")
        apart = 0.0
        if len(set(processes)) > 1:
            apart = spread(ground, arguments.steps, processes)
            console.print(
                f"uninterrupted runs on {arguments.processes} processes differ from each other by {apart:.1e}"
            )
    return 0 if kept and (identical or worst <= 2 * apart) else 1


def report(lives: list[Life]) -> Table:
    table = Table(
        "", "way", "processes", "resumed at", "reached", "held by a checkpoint", "work lost", "first step after"
    )
    for number, life in enumerate(lives, 1):
        first = f"{life.first_step_s:.1f} s" if life.first_step_s else ""
        table.add_row(
            str(number), life.way, str(life.processes), str(life.resumed), str(life.reached), str(life.held),
            f"{life.reached - life.held} steps", first,
        )  # fmt: skip
    return table


if __name__ == "__main__":
    raise SystemExit(main())
