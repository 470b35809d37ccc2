"""Preempt a run again and again until it finishes, and compare the result with that of an uninterrupted run.

    python benchmarks/chaos.py                                # 20 preemptions, always 2 processes: bit-identical
    python benchmarks/chaos.py --processes 2,1,4              # other numbers of processes: equal up to rounding
    python benchmarks/chaos.py --trace FILE --seed 3          # lives with the relative lengths of a recorded trace
    python benchmarks/chaos.py --model DIR --lora_r 16 --preemptions 12 --steps 60     # adapters of a model of your own

The run is a real training on 2 processes (torchrun, gloo, a tiny Llama), which uploads its checkpoints to a real S3 server on
loopback through a proxy that cuts every ninth connection. Each of its lives ends in one of these ways:

    notice   SIGTERM to torchrun, as SkyPilot sends it: the run has 30 s to save and leave, then SIGKILL
    hurried  SIGTERM, and SIGKILL 0.2 s later
    kill     SIGKILL to all its processes at once
    save     SIGKILL while a checkpoint is being written
    upload   SIGKILL while a checkpoint is being uploaded, which is slow then
    lost     SIGKILL, and the machine's disk is lost: only storage is left
    outage   as lost, and while the next start fetches its checkpoint, storage is gone for 10 s
    full     as lost, and the next start has a disk with room for half of the checkpoint, which it has to refuse in one line
    expired  storage refuses the token, another process writes a new one 3 s later, and after an upload with it comes SIGKILL
    clock    the clock jumps a year ahead, storage refuses its requests; six steps later SIGKILL, and the clock is right again
    agent    SIGKILL to one process under torchrun --max-restarts, whose agent starts all of them again
    double   the same command is started twice at once, one of them is refused in one line; the other ends by SIGKILL

At the end a table says of each way how many steps were done twice, whether losses, norms and weights were those of the
uninterrupted run, bit for bit, and how many seconds passed from the end of a life to the next new step.
"""

import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from helpers import clock, models, storage  # noqa: E402
from helpers.ports import free_port  # noqa: E402

from fastft.common.command_line import option, parse, run  # noqa: E402
from fastft.common.object_store import Store  # noqa: E402
from fastft.cost.spot.traces import read_trace  # noqa: E402
from fastft.errors import UserError  # noqa: E402
from fastft.train.checkpoint import manifest  # noqa: E402
from fastft.train.checkpoint.remote import checkpoints  # noqa: E402
from fastft.train.report.metrics import read_metrics  # noqa: E402

WAYS = (
    "notice", "hurried", "kill", "save", "upload", "lost", "outage", "full", "expired", "clock", "agent", "double",
)  # fmt: skip
FINISH = "finish"  # of the last life, which nothing ends
LOSES_DISK = ("lost", "outage", "full")
NOTICE_S = {"notice": 30.0, "hurried": 0.2}  # between SIGTERM and SIGKILL; the other ways have no SIGTERM
OUTAGE_S, RENEWAL_S = 10, 3
PATIENCE_S = 900
IN_A_SMALL_DISK = 'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'  # in a namespace that ends with the command


@dataclass
class Life:
    """One start of the run, and how it ended."""

    way: str
    processes: int
    resumed: int
    reached: int
    held: int  # the newest step of a checkpoint that survived
    began_at: float  # on the monotonic clock, as the first step and the end
    first_at: float
    ended_at: float
    struck: bool  # False if it ended by itself
    code: int | None  # None while the agent lives
    rows: list[tuple] = field(repr=False)  # step, loss and norm of all steps up to the end
    refused: str = ""  # what a start said that had to be refused


@dataclass
class Run:
    """A training run's directory, storage and command."""

    ground: Path
    out: Path
    remote: str | None
    steps: int
    every: int = 3  # steps between two checkpoints
    model: Path | None = None  # else the one that lies in `ground`
    lora_r: int = 0  # of adapters; 0 trains all weights
    environment: dict[str, str] | None = None

    def command(self, processes: int, restarts: int = 0) -> list[str]:
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
            "--master-port",
            str(free_port()),
        ]
        torchrun += ["--max-restarts", str(restarts)]
        return [sys.executable, *(torchrun if processes > 1 or restarts else []), "-m", "fastft.train", *self.flags()]

    def flags(self) -> list[str]:
        return [
            "--model", str(self.model or self.ground / "model"), "--data", str(self.ground / "data.jsonl"),
            "--output_dir", str(self.out), "--seq_len", "160", "--global_batch_size", "4", "--optimizer.lr", "1e-4",
            "--epochs", "1000", "--max_steps", str(self.steps), "--trackers", "none", "--checkpoint.every", str(self.every),
            "--lora.r", str(self.lora_r), *(["--checkpoint.remote", self.remote] if self.remote else []),
        ]  # fmt: skip

    def start(self, processes: int, restarts: int = 0, disk: int | None = None) -> subprocess.Popen:
        """Start the command; with `disk`, in a file system that has room for so many bytes."""
        self.out.mkdir(parents=True, exist_ok=True)
        command = self.command(processes, restarts)
        if disk is not None:
            command = [*_namespace(), "sh", "-c", IN_A_SMALL_DISK.format(size=disk), str(self.out), *command]
        return subprocess.Popen(
            command,
            stderr=self.log_file.open("a"),
            start_new_session=True,
            env=self.environment,
            stdout=subprocess.DEVNULL,
        )

    def step(self) -> int:
        return max((step for step, _, _ in self.curve()), default=0)

    def curve(self) -> list[tuple]:
        path = self.out / "metrics.jsonl"
        return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(path)] if path.exists() else []

    def on_disk(self) -> int:
        steps = [manifest.read(path)["step"] for path in (self.out / "checkpoints").glob("step-????????")]
        return max(steps, default=0)

    def in_storage(self) -> int:
        return max((meta["step"] for _, meta in checkpoints(Store(self.remote)).found), default=0)

    @property
    def jumped(self) -> Path:
        """While this file exists, the clock is a year ahead."""
        return self.ground / "jumped"

    @property
    def log_file(self) -> Path:
        return self.out.parent / f"{self.out.name}.log"

    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""


def _namespace() -> list[str]:
    return ["unshare", "--map-root-user", "--mount"]


def impossible(ground: Path) -> dict[str, str]:
    """Ways that cannot be tried on this machine, and why."""
    (ground / "small").mkdir()
    small = [*_namespace(), "sh", "-c", IN_A_SMALL_DISK.format(size=4096), str(ground / "small"), "true"]
    found = {}
    if shutil.which("unshare") is None or subprocess.run(small, capture_output=True).returncode:
        found["full"] = "no file system can be mounted here"
    if shutil.which("cc") is None:
        found["clock"] = "there is no C compiler"
    return found


# How a life ends -----------------------------------------------------------------------------------------------------------


def moment(run: Run, way: str, line: storage.Line) -> Iterator[None]:
    """Bring about what ends a life in this way, and yield until its moment has come."""
    if way == "save":
        while not list((run.out / "checkpoints").glob("step-*.tmp")):
            yield
    elif way == "upload":
        line.bytes_per_s = 200_000
        while run.on_disk() <= run.in_storage():
            yield
    elif way in ("outage", "full"):  # else there is nothing to fetch
        while run.in_storage() == 0:
            yield
    elif way == "expired":
        refused, held = line.refused, run.in_storage()
        expire(line)
        while line.refused == refused or run.in_storage() <= held:
            yield
    elif way == "clock":
        refused, reached = line.refused, run.step()
        run.jumped.touch()
        line.refusal = storage.SKEWED
        while line.refused == refused or run.step() < reached + 2 * run.every:
            yield


def expire(line: storage.Line) -> None:
    """Let storage refuse the token that is used now, and write another one RENEWAL_S later."""
    path = Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"])
    key = path.read_text().split("aws_access_key_id = ")[1].split()[0]
    line.refusal = storage.Refusal(403, "ExpiredToken", "The provided token has expired.", key=key)
    threading.Timer(RENEWAL_S, storage.write_credentials, (path, f"{key}X")).start()


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


def kill_one(torchrun: subprocess.Popen) -> None:
    """SIGKILL to the last of its processes."""
    found = subprocess.run(
        ["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(found[-1]), signal.SIGKILL)


def start_twice(run: Run, processes: int, going: subprocess.Popen | None) -> tuple[subprocess.Popen, str]:
    """Start the command twice at once, or once beside the one that is going: the start that stays, and what the other says."""
    said, both = len(run.log()), [going or run.start(processes), run.start(processes)]
    _wait(lambda: any(each.poll() is not None for each in both))
    refused, stays = sorted(both, key=lambda each: each.poll() is None)
    return stays, _refusal(run.log()[said:], refused)


def start_on_small_disk(run: Run, processes: int) -> str:
    """Start the command where half of its checkpoint has room; what it says."""
    newest = checkpoints(Store(run.remote)).found[0][1]
    said, size = len(run.log()), sum(entry["bytes"] for entry in newest["files"].values())
    refused = run.start(processes, disk=size // 2)
    _wait(lambda: refused.poll() is not None)
    return _refusal(run.log()[said:], refused)


def _refusal(log: str, process: subprocess.Popen) -> str:
    """The one line of a start that was refused, or what is wrong with it."""
    lines = [line.removeprefix("error: ") for line in log.splitlines() if line.startswith("error: ")]
    if process.poll() != 1 or len(lines) != 1:
        return f"WRONG: exit code {process.poll()}, {len(lines)} lines: {log[-2000:]}"
    return lines[0]


def drop_while_it_fetches(run: Run, line: storage.Line) -> None:
    """Take storage away for OUTAGE_S once the run's next start fetches a checkpoint, from a thread."""
    said = len(run.log())

    def watch() -> None:
        _wait(lambda: "of its files," in run.log()[said:])
        line.drop()
        time.sleep(OUTAGE_S)
        line.restore()

    threading.Thread(target=watch, daemon=True).start()


def _wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)


# A run with many lives -----------------------------------------------------------------------------------------------------


def live(
    run: Run, way: str, steps: int, processes: int, line: storage.Line, going: subprocess.Popen | None = None
) -> tuple[Life, subprocess.Popen | None]:
    """Start the run, unless its agent is `going`, let it take about `steps` steps, and end it in the given way.

    Returns the agent, too, if it outlives this life.
    """
    said, began, refused = len(run.log()), time.monotonic(), ""
    if way == "double":
        process, refused = start_twice(run, processes, going)
    else:
        process = going or run.start(processes, restarts=3 if way == "agent" else 0)
    start, first_at, waiting = 0, 0.0, moment(run, way, line)
    while process.poll() is None and time.monotonic() - began < PATIENCE_S:
        time.sleep(0.01)
        words = run.log()[said:]
        if not first_at and "first step after" in words:  # until then the files are an earlier life's
            start = int(words.split("resumed: step ")[1].split()[0]) if "resumed: step " in words else 0
            first_at = time.monotonic()
        if way != FINISH and first_at and run.step() >= start + steps and next(waiting, "come") == "come":
            break
    reached, ended_at, struck = run.step(), time.monotonic(), process.poll() is None
    agent = process if way == "agent" and struck else None
    if agent:
        kill_one(agent)
    elif struck:
        end(run, process, NOTICE_S.get(way))
    code = None if agent else process.wait()
    line.bytes_per_s = 0
    if way == "clock":
        run.jumped.unlink(missing_ok=True)
        line.refusal = None
    rows = run.curve()
    if way in LOSES_DISK:
        shutil.rmtree(run.out)
    held = run.in_storage() if way in LOSES_DISK else run.on_disk()
    if way == "full" and held:
        refused = start_on_small_disk(run, processes)
    if way == "outage" and held:
        drop_while_it_fetches(run, line)
    reached = max([reached, *(step for step, _, _ in rows)])
    return Life(way, processes, start, reached, held, began, first_at, ended_at, struck, code, rows, refused), agent


def uninterrupted(run: Run, processes: int) -> None:
    done = subprocess.run(run.command(processes), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])


def chaos(
    whole: Run,
    torn: Run,
    line: storage.Line,
    lives: list[tuple[str, int, int]],
    processes: int,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Life]:
    """Let `whole` run without interruption; end `torn` as in `lives` (way, steps, processes), and then let it finish."""
    uninterrupted(whole, processes)
    line.cut_every = 9
    found, agent, number = [], None, processes
    for way, length, wanted in [*lives, (FINISH, 0, processes)]:
        number = number if agent else wanted  # an agent keeps its number of processes
        life, agent = live(torn, way, length, number, line, agent)
        found.append(life)
        progress(f"{len(found)}: {life}")
    if found[-1].code != 0:
        raise RuntimeError(torn.log()[-3000:])
    line.cut_every = 0
    return found


def furthest(one: list[tuple], other: list[tuple]) -> float:
    """The largest relative difference of the losses of two curves."""
    return max(abs(a[1] - b[1]) / a[1] for a, b in zip(one, other, strict=True))


def spread(run: Run, processes: list[int]) -> float:
    """How far apart uninterrupted runs on different numbers of processes are: rounding that has grown over the steps."""
    curves = []
    for number in sorted(set(processes)):
        other = Run(run.ground, run.ground / f"whole-{number}", None, run.steps, run.every, run.model, run.lora_r)
        uninterrupted(other, number)
        curves.append(other.curve())
    return max(furthest(curves[0], other) for other in curves)


def same_weights(one: Run, other: Run) -> bool:
    return (one.out / "model/model.safetensors").read_bytes() == (other.out / "model/model.safetensors").read_bytes()


def failures(whole: Run, torn: Run, lives: list[Life]) -> list[str]:
    """What did not go as promised, other than the numbers that training has computed."""
    found = [
        f"{life.way}: step {life.held} was published, and the next start went on at {later.resumed}"
        for life, later in zip(lives, lives[1:])
        if later.resumed < life.held
    ]
    found += [f"{life.way}: the run ended by itself, with {life.code}" for life in lives[:-1] if not life.struck]
    expected = {"full": "no room for the checkpoint in storage", "double": "another run is writing there"}
    found += [
        f"{life.way}: the refused start said: {life.refused}"
        for life in lives
        if expected.get(life.way, "") not in life.refused or life.refused.startswith("WRONG")
    ]
    counted, passed = read_metrics(torn.out / "metrics.jsonl")[-1]["elapsed_s"], lives[-1].ended_at - lives[0].began_at
    if not 0 < counted < passed:
        found.append(f"the model card counts {counted:.0f} s, and {passed:.0f} s have passed")
    return found


# The command ---------------------------------------------------------------------------------------------------------------


@dataclass
class Options:
    preemptions: int = 20
    processes: list[int] = option([2], repeated=True, separator=",")
    """Numbers of processes, in turn, separated by commas."""
    steps: int = 300
    every: int = 3
    """Steps between two checkpoints."""
    ways: list[str] = option(WAYS, repeated=True, separator=",")
    """Ways in which lives end, separated by commas; all by default."""
    model: str | None = None
    """A model's directory, instead of a tiny Llama."""
    lora_r: int = 0
    """Train adapters of this rank: the S3 server holds checkpoints in memory, and takes long for those of a whole model."""
    trace: str | None = None
    """A recorded trace, whose lives are replayed faster."""
    seed: int = 0


def main() -> int:
    [options] = parse(sys.argv[1:], "benchmarks/chaos.py", __doc__.splitlines()[0], Options)
    if unknown := set(options.ways) - {*WAYS}:
        raise UserError(f"ways: no {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    console = Console(soft_wrap=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as work, storage.s3() as line:
        ground = Path(work)
        os.environ["FASTFT_CACHE"] = f"{work}/cache"
        os.environ["AWS_SHARED_CREDENTIALS_FILE"] = f"{work}/credentials"
        storage.write_credentials(ground / "credentials", "TOKEN")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            del os.environ[name]
        model = Path(options.model) if options.model else models.make_model(ground / "model")
        models.make_data(ground / "data.jsonl")
        left_out = impossible(ground)
        lives = plan(options, [way for way in options.ways if way not in left_out])
        whole = Run(ground, ground / "whole", None, options.steps, 0, model, options.lora_r)  # saves nothing
        torn = Run(ground, ground / "torn", "s3://runs/torn", options.steps, options.every, model, options.lora_r)
        torn.environment = clock.that_jumps(ground, torn.jumped)
        found = chaos(whole, torn, line, lives, options.processes[0], console.print)
        return conclude(console, options, line, whole, torn, found, left_out)


def plan(options: Options, ways: list[str]) -> list[tuple[str, int, int]]:
    """(way, steps, processes) of each life. The lengths are, relatively, those of the trace or of a constant hazard."""
    source, count = random.Random(options.seed), options.preemptions
    if options.trace:
        recorded = read_trace(options.trace)
        falls = recorded.times[1:][recorded.counts[1:] < recorded.counts[:-1]]
        gaps = [float(gap) for gap in falls[1:] - falls[:-1]]
        times = (gaps * (count // len(gaps) + 1))[:count]
    else:
        times = [source.expovariate(1.0) for _ in range(count)]
    scale = 0.5 * options.steps / sum(times)
    ways = (ways * (count // len(ways) + 1))[:count]
    source.shuffle(ways)
    numbers = options.processes * count
    return [(way, max(1, round(time * scale)), number) for way, time, number in zip(ways, times, numbers)]


def conclude(
    console: Console,
    options: Options,
    line: storage.Line,
    whole: Run,
    torn: Run,
    lives: list[Life],
    left_out: dict[str, str],
) -> int:
    """Print what has happened and the table, and return the exit code."""
    expected, weights = whole.curve(), same_weights(whole, torn)
    wrong, worst, apart = failures(whole, torn, lives), furthest(expected, torn.curve()), 0.0
    console.print([line for line in torn.log().splitlines() if line.startswith("checkpoints:")][-1])
    console.print(f"{line.cuts} connections to storage were cut, {line.refused} requests refused")
    for life in lives:
        if life.refused:
            console.print(f"{life.way}: refused: {life.refused}")
    if len(set(options.processes)) > 1:
        apart = spread(whole, options.processes)
        console.print(
            f"losses differ by up to {worst:.1e}, those of uninterrupted runs on these processes by {apart:.1e}"
        )
    elif not weights or expected != torn.curve():
        wrong.append(f"not bit-identical: weights {weights}, losses differ by up to {worst:.1e}")
    if worst > 2 * apart:
        wrong.append(f"losses differ by up to {worst:.1e}")
    for way, why in left_out.items():
        console.print(f"{way}: left out, because {why}")
    console.print(report(lives, expected, weights))
    for each in wrong:
        console.print(f"WRONG: {each}")
    return 1 if wrong else 0


def report(lives: list[Life], expected: list[tuple], weights: bool) -> Table:
    """A row for each way: what follows a life that ended so, up to the next end, is counted as its consequence.

    The seconds are from the end to the next new step: their median, and the longest of them.
    """
    table = Table("way", "preemptions", "steps redone", "bit-identical", "seconds", "longest")
    pairs = list(zip(lives, lives[1:]))
    for way in [*WAYS, "all"]:
        chosen = [(life, after) for life, after in pairs if way in (life.way, "all")]
        if not chosen:
            continue
        redone = sum(life.reached - after.resumed for life, after in chosen)
        same = all(after.rows == expected[: len(after.rows)] for _, after in chosen) and (way != "all" or weights)
        seconds = [after.first_at - life.ended_at for life, after in chosen]
        figures = f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"
        table.add_row(way, str(len(chosen)), str(redone), "yes" if same else "NO", *figures)
    return table


if __name__ == "__main__":
    raise SystemExit(run(main))
