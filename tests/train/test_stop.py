"""Leaving when asked, and resuming: real processes, real signals, storage that outlives the machine's disk."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import forks
from helpers.ports import free_port
from helpers.training import HERE

from fastft.common.object_store import Store
from fastft.train.checkpoint import lease as lease_module
from fastft.train.checkpoint import manifest
from fastft.train.checkpoint.lease import Lease
from fastft.train.checkpoint.remote import checkpoints
from fastft.train.preemption import stop as stopping
from fastft.train.report.metrics import read_metrics

PATIENCE_S = 300.0
STEPS = 40


class Run:
    """One run's directory and storage, and its starts."""

    def __init__(self, ground: Path, home: Path):
        self.out, self.remote = home / "out", f"file://{home}/bucket/run"
        self.log = home / "log"
        self.arguments = [
            "--model", str(ground / "model"), "--data", str(ground / "data.jsonl"), "--output_dir", str(self.out),
            "--seq_len", "160", "--global_batch_size", "4", "--optimizer.lr", "1e-2", "--trackers", "none",
            "--epochs", "1000", "--max_steps", str(STEPS), "--checkpoint.remote", self.remote,
        ]  # fmt: skip

    def start(self, *more: str, target: tuple[str, ...] = ("-m", "fastft.train"), **environment) -> forks.Process:
        self.log.write_text("")
        environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
        with self.log.open("a") as log:
            return forks.Process([*target, *self.arguments, *more], stderr=log, env=environment)

    def finish(self, *more: str) -> tuple[int, str]:
        return self.start(*more).wait(PATIENCE_S), self.log.read_text()

    def wait_for(self, words: str, process: forks.Process) -> None:
        end = time.monotonic() + PATIENCE_S
        while words not in self.log.read_text():
            assert process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.01)

    def steps(self) -> list[int]:
        return [row["step"] for row in read_metrics(self.out / "metrics.jsonl")]


SLOW_STEPS = """
import sys, time
from datetime import timedelta
from fastft.common import logs
from fastft.common.command_line import leave, run
from fastft.common.distributed import first_to_fail
from fastft.train import loop
step, taken, slow_after = loop.train_step, 0, int(sys.argv.pop(1))
loop.STEP_LIMIT = timedelta(seconds=3)
def slow(*given):
    global taken
    taken += 1
    if taken > slow_after:
        time.sleep(0.1)
    return step(*given)
loop.train_step = slow
logs.show()
leave(run(loop.main, first_to_fail))
"""


@pytest.mark.slow
def test_asked_to_leave_it_saves_uploads_and_goes_on_from_storage_alone(ground, tmp_path):
    """One story: a notice, a lost disk, a damaged copy, an end, and a start after the end."""
    run = Run(ground, tmp_path)
    process = run.start(target=("-c", SLOW_STEPS, "10"))
    run.wait_for("first step after", process)
    while not run.out.joinpath("metrics.jsonl").exists() or not run.steps():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == stopping.EXIT_CODE
    step = run.steps()[-1]
    said = f"asked to leave (SIGTERM): step {step} is saved and uploaded"
    assert said in run.log.read_text() and said in (run.out / stopping.NOTE_FILE).read_text()
    assert step < STEPS and not (run.out / "model").exists()
    store = Store(run.remote)
    [(name, meta)] = checkpoints(store).found
    assert meta["step"] == step

    # A bit flips on the disk: the newest copy that is whole is the one in storage.
    local = run.out / "checkpoints" / f"step-{step:08d}"
    shard = max((local / file for file in manifest.read(local)["files"]), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, log = run.finish()
    assert code == 0, log
    assert f"{local}: {shard.name} does not hold what was written; fetching it from storage" in log, log
    assert f"resumed: step {step} from" in log and "fetching 1 of its files," in log
    assert run.steps() == list(range(1, STEPS + 1))
    assert not (run.out / stopping.NOTE_FILE).exists()

    # The machine is gone, the run is over: nothing is done again, though only the model was kept and another run has the lease.
    shutil.rmtree(run.out)
    kept = tmp_path / "kept"
    kept.mkdir()
    for name, _ in checkpoints(store).found:
        (tmp_path / "bucket/run" / name).rename(kept / name)
    lease = Lease(store)
    code, log = run.finish()
    lease.release()
    assert code == 0 and f"finished: step {STEPS} of {STEPS} is done; the model is in {run.remote}/model" in log, log
    assert "resumed" not in log and "first step" not in log

    # With other settings it is another run, and the model not its own.
    shutil.rmtree(run.out)
    code, log = run.finish("--seed", "1")
    assert code == 1 and f"{run.remote}/model: is the model of another run" in log and "first step" not in log, log

    # Nothing left but checkpoints in storage that are all damaged: never a silent start from step 0.
    store.remove("model")
    for path in kept.iterdir():
        path.rename(tmp_path / "bucket/run" / path.name)
    for name, meta in checkpoints(store).found:
        for file in meta["files"]:
            (tmp_path / "bucket/run" / name / file).write_bytes(b"")
    shutil.rmtree(run.out, ignore_errors=True)
    code, log = run.finish()
    assert code == 1 and "none of its checkpoints can be read" in log and "Traceback" not in log, log


def test_two_runs_in_the_same_place_the_second_refuses(ground, tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_S", 0.2)
    run = Run(ground, tmp_path)
    lease = Lease(Store(run.remote))
    try:
        code, log = run.finish()
    finally:
        lease.release()
    [line] = [line for line in log.splitlines() if line.startswith("error: ")]
    assert code == 1 and run.remote in line and not (run.out / "model").exists()


def test_a_peer_that_stops_answering_ends_the_run(ground, tmp_path):
    """After SIGSTOP no connection is closed, as when a machine is gone. The limit is 3 s here, and 110 s otherwise."""
    run = Run(ground, tmp_path)
    port = free_port()
    address = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = []
    for rank in (0, 1):
        environment = {**address, "RANK": rank, "LOCAL_RANK": rank}
        both.append(run.start("--max_steps", "4000", target=("-c", SLOW_STEPS, "0"), **environment))
    try:
        run.wait_for("first step after", both[0])
        time.sleep(0.5)
        both[1].send_signal(signal.SIGSTOP)
        assert both[0].wait(60) not in (0, stopping.EXIT_CODE)
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert not (run.out / "model").exists() and not (run.out / stopping.NOTE_FILE).exists()


RANK_1_IS_GONE = """
import os, signal, sys
from datetime import timedelta
from fastft.common import distributed
from fastft.common.command_line import leave, run
from fastft.common.distributed import first_to_fail
from fastft.model import huggingface
from fastft.train import loop
from fastft.train.checkpoint import local
from fastft.train.preemption import stop as stopping
step_limit, silence_limit, moment = sys.argv[1:4]
del sys.argv[1:4]
loop.STEP_LIMIT, distributed.SILENCE_LIMIT = (timedelta(seconds=int(limit)) for limit in (step_limit, silence_limit))
distributed.BEAT_S, stopping.NOTICE_S = 0.2, 0.0
owner, name = {
    "write": (local.dcp, "save"), "leave": (loop, "leave_early"), "export": (huggingface, "export")
}[moment]
original, step = getattr(owner, name), loop.train_step
def gone(*given, **more):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    return original(*given, **more)
def warned(*given):
    if moment == "leave" and os.environ["RANK"] == "0":
        signal.raise_signal(signal.SIGTERM)
    return step(*given)
setattr(owner, name, gone)
loop.train_step = warned
leave(run(loop.main, first_to_fail))
"""


@pytest.mark.parametrize(
    ("step_limit", "silence_limit", "moment"),
    [
        (3, 1000, "write"),
        pytest.param(1000, 3, "write", marks=pytest.mark.slow),
        pytest.param(1000, 3, "leave", marks=pytest.mark.slow),
        pytest.param(1000, 3, "export", marks=pytest.mark.slow),
    ],
)
def test_a_peer_that_is_gone_ends_the_run_whatever_the_others_wait_for(
    ground, tmp_path, step_limit, silence_limit, moment
):
    """Waits that have no limit of their own, or one of hours: for a checkpoint's writing, an upload, the export."""
    run = Run(ground, tmp_path)
    (tmp_path / "script.py").write_text(RANK_1_IS_GONE)
    target = (str(HERE / "ranks.py"), "2", str(tmp_path / "script.py"), str(step_limit), str(silence_limit), moment)
    process = run.start("--max_steps", "4", "--checkpoint.every", "1" if moment == "write" else "0", target=target)
    try:
        assert process.wait(PATIENCE_S) == 1, run.log.read_text()
    finally:
        process.kill()
    assert ("a process of the run is gone" in run.log.read_text()) == (silence_limit == 3), run.log.read_text()
    assert not (run.out / "model").exists()


# While the last checkpoint is saved SIGTERM comes, and storage answers no more. What torchrun grants is over at once.
ASKED_AT_THE_END = """
import os, signal, sys, time
from fastft.common.command_line import leave, run
from fastft.common.object_store import Store
from fastft.train import loop
from fastft.train.checkpoint import lease, local
os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"], lease.RELEASE_S = "0", 0.5
save = local.Writer.save
def asked(self, step, *given):
    save(self, step, *given)
    if step == int(sys.argv[-1]):
        Store._try = lambda *given: time.sleep(1000)
        signal.raise_signal(signal.SIGTERM)
local.Writer.save = asked
leave(run(loop.main))
"""


def test_asked_after_the_last_step_by_a_machine_whose_storage_answers_no_more(ground, tmp_path):
    run = Run(ground, tmp_path)
    process = run.start("--checkpoint.every", "2", "--max_steps", "4", target=("-c", ASKED_AT_THE_END))
    try:
        assert process.wait(PATIENCE_S) == stopping.EXIT_CODE, run.log.read_text()
    finally:
        process.kill()
    assert "step 4 is saved, on this disk only" in (run.out / stopping.NOTE_FILE).read_text()
    assert (run.out / "checkpoints/step-00000004").is_dir() and not (run.out / "model").exists()


def test_advice_that_comes_while_the_ranks_agree_is_heard_the_next_time(monkeypatch):
    stop = stopping.StopFlag()
    stop.restore_signals()
    stop.group = None
    monkeypatch.setattr(stopping.dist, "all_reduce", lambda *given, **more: setattr(stop, "save_soon", True))
    stop.agreed(1, False)
    assert stop.save_soon


TWO_SIGNALS = """
import os, signal, sys, time
from pathlib import Path
from fastft.common.distributed import join_ranks
from fastft.train.preemption.stop import StopFlag
join_ranks()
stop = StopFlag(Path(sys.argv.pop(1)))
with stop.deferred(0):
    for gap in map(float, sys.argv[1:]):
        time.sleep(gap)
        os.kill(os.getpid(), signal.SIGTERM)
    stop.agreed(1, False) == (True, False) or sys.exit("not agreed")
    print("saved")
"""


@pytest.mark.parametrize(
    ("gaps", "code", "said"), [(["0"], 0, "saved\n"), (["0", "0.2"], 0, "saved\n"), (["0", "1.2"], 75, "")]
)
def test_a_second_signal_stops_at_once_but_one_that_comes_twice_is_one(tmp_path, gaps, code, said):
    mark = tmp_path / stopping.NOTE_FILE
    done = forks.run(["-c", TWO_SIGNALS, mark, *gaps], timeout=60)
    assert (done.returncode, done.stdout) == (code, said), done.stderr
    assert "SIGTERM" in mark.read_text()


HUNG_UP = TWO_SIGNALS.replace("SIGTERM", "SIGHUP").replace('sys.exit("not agreed")', 'print("goes on")')


@pytest.mark.parametrize(("before", "said"), [([], "saved\n"), (["nohup"], "goes on\nsaved\n")])
def test_sighup_asks_to_leave_unless_nohup_says_otherwise(tmp_path, before, said):
    mark = tmp_path / stopping.NOTE_FILE
    command = [*before, sys.executable, "-c", HUNG_UP, str(mark), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, said), done.stderr
    assert mark.exists() == (not before)


@pytest.mark.slow
def test_a_terminal_that_is_closed_is_a_stop_that_saves(ground, tmp_path):
    """Everything that the run writes to its terminal fails from then on."""
    run = Run(ground, tmp_path)
    child, terminal = pty.fork()
    if child == 0:
        command = [sys.executable, "-m", "fastft.train", *run.arguments, "--max_steps", "40000"]
        os.execve(sys.executable, command, {**os.environ, "OMP_NUM_THREADS": "1"})
    said = b""
    while b"step 5/" not in said:
        said += os.read(terminal, 4096)
    os.close(terminal)  # the kernel sends SIGHUP to the terminal's processes
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == stopping.EXIT_CODE
    assert "asked to leave (SIGHUP): step " in (run.out / stopping.NOTE_FILE).read_text()
    step = run.steps()[-1]
    assert (run.out / "checkpoints" / f"step-{step:08d}").is_dir()


def test_a_run_saves_at_the_automatic_interval(ground, tmp_path):
    run = Run(ground, tmp_path)
    code, log = run.finish("--checkpoint.every", "auto", "--checkpoint.preemption_hours", "1e-7")
    assert code == 0 and "checkpoints: every " in log and "assuming a preemption every 0.0 h" in log
    assert int(log.split("checkpoints: ")[-1].split(" saved")[0]) > 2


# Uploads take twelve days on rank 0, which does them all; rank 1 measures nothing.
SLOW_UPLOADS = """
from fastft.common import logs
from fastft.common.command_line import leave, run
from fastft.common.distributed import first_to_fail
from fastft.train import loop
from fastft.train.checkpoint import remote
class Slow(remote.Uploader):
    def __init__(self, *given):
        super().__init__(*given)
        self.seconds = 1e6 if self.is_first else 0.0
loop.Uploader = Slow
logs.show()
leave(run(loop.main, first_to_fail))
"""


def test_the_automatic_interval_is_never_below_the_upload_on_two_processes(ground, tmp_path):
    run = Run(ground, tmp_path)
    (tmp_path / "script.py").write_text(SLOW_UPLOADS)
    target = (str(HERE / "ranks.py"), "2", str(tmp_path / "script.py"))
    process = run.start("--checkpoint.every", "auto", "--checkpoint.preemption_hours", "1e-7", target=target)
    assert process.wait(PATIENCE_S) == 0, run.log.read_text()
    assert "checkpoints: 1 saved" in run.log.read_text(), run.log.read_text()
