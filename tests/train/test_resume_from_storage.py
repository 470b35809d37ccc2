"""A run whose disk is lost comes back from storage, on a real S3 server that fails while its checkpoint is fetched.

A fault says nothing about a checkpoint: only one that disagrees with its manifest is passed over.
"""

import contextlib
import re
import shutil
import threading
import time
from collections.abc import Callable

import pytest
from helpers import disks, storage
from helpers import training as runs

from fastft.common import object_store as storing
from fastft.common.object_store import Store
from fastft.train.checkpoint.remote import COMMITTED, Uploader, checkpoints

STEPS = ["--max_steps", "6", "--checkpoint.every", "2", "--checkpoint.keep", "2", "--trackers", "none"]
AGAIN = "then start the same command again"


@pytest.fixture(scope="module")
def line():
    with storage.s3() as line:
        yield line


@pytest.fixture(scope="module")
def whole(line, ground, tmp_path_factory):
    """The output of an uninterrupted run, whose checkpoints of steps 2, 4 and 6 are in s3://runs/whole."""
    out = tmp_path_factory.mktemp("whole") / "run"
    flags = [*STEPS[:5], "3", *STEPS[6:], "--checkpoint.remote", "s3://runs/whole"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Uploader, "offer", offer_and_wait)
        done = runs.train_here(ground, out, *flags)
    assert done.returncode == 0, done.stderr
    return out


OFFER = Uploader.offer


def offer_and_wait(self: Uploader, step: int, *rest) -> None:
    """Upload every checkpoint: on a busy machine the run is faster, and the next one takes the place of one that waits."""
    OFFER(self, step, *rest)
    while step in self.in_use():
        time.sleep(0.01)


@pytest.fixture
def lost(line, whole, tmp_path, request, monkeypatch):
    """The address of a run whose disk is lost after step 4: storage has steps 2 and 4."""
    monkeypatch.setattr(storing, "DELAYS_S", (0.1, 0.2, 0.4))
    monkeypatch.setattr(storing, "PATIENCE_S", 2)
    source, target = Store("s3://runs/whole"), Store(f"s3://runs/{abs(hash(request.node.name))}")
    copied = {meta["step"]: name for name, meta in checkpoints(source).found}
    assert set(copied) == {2, 4, 6}
    for step in (2, 4):
        source.fs.copy(f"{source.root}/{copied[step]}", f"{target.root}/{copied[step]}", recursive=True)
    yield target.url
    line.heal()


def start(ground, out, remote: str, *more: str):
    return runs.train_here(ground, out, *STEPS, "--checkpoint.remote", remote, *more)


def resumes_at_4(ground, out, remote: str, whole) -> str:
    """Start the same command again, and compare the run with the uninterrupted one. Returns what it said."""
    done = start(ground, out, remote)
    assert done.returncode == 0 and "resumed: step 4" in done.stderr and "passed over" not in done.stderr, done.stderr
    assert runs.losses(out) == runs.losses(whole)
    weights, expected = runs.weights(out), runs.weights(whole)
    assert all((weights[name] == expected[name]).all() for name in expected)
    return done.stderr


def newest(remote: str) -> tuple[str, dict]:
    return checkpoints(Store(remote)).found[0]


@contextlib.contextmanager
def while_it_fetches(line: storage.Line, fault, until: Callable[[], bool] | None = None):
    """Let `fault(line)` happen at the first request for a shard, and heal it as soon as `until()` is true."""
    seen = storage.Refusal(503, "SlowDown", method="GET", path=".distcp")
    before, line.refusal, over = line.refused, seen, threading.Event()

    def watch() -> None:
        while line.refused == before and not over.wait(0.01):
            pass
        line.refusal = None
        fault(line)
        if until:
            while not until() and not over.wait(0.05):
                pass
            line.heal()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_an_outage_while_it_fetches_is_waited_for(line, lost, ground, whole, tmp_path, monkeypatch, caplog):
    """As long as it takes, up to five minutes: here until it is said, which the library's own retries may delay."""
    monkeypatch.setattr(storing, "PATIENCE_S", 60)
    monkeypatch.setattr(storing, "SAID_AFTER_S", 0.5)
    with while_it_fetches(line, storage.Line.drop, lambda: "giving up after another" in caplog.text):
        said = resumes_at_4(ground, tmp_path / "out", lost, whole)
    assert "cannot be reached (" in said and "giving up after another" in said and f"{lost}: answers again" in said


REFUSALS = {
    "expired": (storage.EXPIRED, "the credentials have expired"),
    "forbidden": (storage.FORBIDDEN, "access is refused"),
    "busy": (storage.BUSY, "is overloaded or failing"),
    "skewed": (storage.SKEWED, "the clock of this machine is wrong"),
}


@pytest.mark.parametrize("kind", ["outage", *REFUSALS])
@pytest.mark.slow
def test_a_fault_that_stays_ends_the_start_and_harms_nothing(line, lost, ground, whole, tmp_path, kind):
    out, before = tmp_path / "out", checkpoints(Store(lost)).found
    refusal, says = REFUSALS.get(kind, (None, "cannot be reached"))

    def fault(line: storage.Line) -> None:
        line.refusal = refusal
        if refusal is None:
            line.drop()

    with while_it_fetches(line, fault):
        done = start(ground, out, lost)
    runs.fails(done, lost, says, AGAIN)
    assert "passed over" not in done.stderr and "remove" not in done.stderr.split("error: ")[1].replace(
        "and remove objects", ""
    )
    assert not list(out.glob("checkpoints/*.fetch.tmp")) and not (out / "metrics.jsonl").exists()
    line.heal()
    assert checkpoints(Store(lost)).found == before
    Store(lost).remove("lease.json")  # the start that ended could not, as its storage did not answer
    resumes_at_4(ground, out, lost, whole)
    assert [meta["step"] for _, meta in checkpoints(Store(lost)).found] == [6, 4]


@pytest.mark.parametrize("kind", ["outage", "expired"])
def test_storage_that_cannot_be_listed_is_not_empty(line, lost, ground, tmp_path, kind):
    line.refusal = storage.EXPIRED if kind == "expired" else None
    if kind == "outage":
        line.drop()
    done = start(ground, tmp_path / "out", lost)
    runs.fails(done, lost, AGAIN)
    assert not (tmp_path / "out" / "metrics.jsonl").exists() and "step 1/" not in done.stderr


def test_a_full_disk_while_it_fetches(line, lost, ground, whole, tmp_path):
    """A file system with room for half of the checkpoint."""
    size = sum(entry["bytes"] for entry in newest(lost)[1]["files"].values())
    with disks.small_disk(tmp_path / "disk", size // 2) as disk:
        done = start(ground, disk / "run", lost)
        runs.fails(
            done,
            f"{disk}/run/checkpoints: no room for the checkpoint in storage: No space left on device: ",
            " free",
            AGAIN,
        )
        needed, free = re.findall(r"([\d.]+) KiB", done.stderr.split("device: ")[1])
        assert float(needed) >= size / 2**10 > float(free)
        assert "passed over" not in done.stderr
        disks.grow(disk)
        resumes_at_4(ground, disk / "run", lost, whole)


def test_a_disk_that_gets_full_while_it_fetches(line, lost, ground, whole, tmp_path):
    """There was room for the checkpoint when the fetch began, and then another program wrote."""
    size = sum(entry["bytes"] for entry in newest(lost)[1]["files"].values())
    with disks.small_disk(tmp_path / "disk", 2 * size) as disk:

        def fill(line: storage.Line) -> None:
            with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        with while_it_fetches(line, fill):
            done = start(ground, disk / "run", lost)
        runs.fails(
            done, f"{disk}/run/checkpoints: no room for the checkpoint in storage: No space left on device: ", AGAIN
        )
        assert "passed over" not in done.stderr and not list((disk / "run").glob("checkpoints/*.fetch.tmp"))
        (disk / "filler").unlink()
        disks.grow(disk)
        resumes_at_4(ground, disk / "run", lost, whole)


@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_what_disagrees_with_its_manifest_is_passed_over(line, lost, ground, whole, tmp_path, harm):
    store, (name, meta) = Store(lost), newest(lost)
    file = next(file for file in meta["files"] if file.endswith(".distcp"))
    if harm == "missing":
        store.remove(f"{name}/{file}")
    else:
        (tmp_path / "shard").write_bytes(bytes(meta["files"][file]["bytes"]))
        store.put(tmp_path / "shard", f"{name}/{file}")
    done = start(ground, tmp_path / "out", lost)
    assert done.returncode == 0 and "resumed: step 2" in done.stderr, done.stderr
    assert f"passed over: {lost}/{name}" in done.stderr
    assert runs.losses(tmp_path / "out") == runs.losses(whole)


def test_files_without_any_manifest_are_spoken_of_before_it_starts_at_step_1(line, lost, ground, tmp_path):
    store = Store(lost)
    for name, _ in checkpoints(store).found:
        store.remove(f"{name}/{COMMITTED}")
    done = start(ground, tmp_path / "out", lost)
    said = f"warning: {lost}: holds files of 2 checkpoints"
    assert done.returncode == 0 and said in done.stderr, done.stderr
    assert "no manifest (COMMITTED)" in done.stderr and done.stderr.index(said) < done.stderr.index("step 1/")


def test_published_directories_on_the_disk_without_a_manifest_are_an_error(ground, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    for path in (tmp_path / "out/checkpoints").glob("step-*/meta.json"):
        path.unlink()
    shutil.rmtree(tmp_path / "out/model")
    done = runs.train_here(ground, tmp_path / "out", *STEPS)
    runs.fails(done, "passed over: meta.json is missing", "Put its manifest back, or move it away")
