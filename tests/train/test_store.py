"""A run's place in storage: on a real S3 server whose connections break, and on a disk."""

import json
import logging
import os
import re
import socket
import subprocess
import threading
import time

import pytest
import torch.distributed as dist
from helpers import storage

from fastft.common import object_store as storing
from fastft.common.distributed import join_ranks
from fastft.common.object_store import Store
from fastft.errors import UserError
from fastft.train.checkpoint import lease as lease_module
from fastft.train.checkpoint import manifest
from fastft.train.checkpoint.lease import Lease
from fastft.train.checkpoint.remote import COMMITTED, Uploader, checkpoints, fetch, trained_model, upload_model


@pytest.fixture(scope="module")
def line():
    with storage.s3() as line:
        yield line


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(storing, "DELAYS_S", (0.05, 0.1, 0.2, 0.4, 0.8))


@pytest.fixture
def said(caplog):
    """The messages of fastft."""
    caplog.set_level(logging.INFO, logger="fastft")
    return lambda: caplog.messages


@pytest.fixture(params=["s3", "file"])
def store(request, tmp_path):
    if request.param == "file":
        return Store(f"file://{tmp_path}/bucket/run")
    request.getfixturevalue("line")
    return Store(f"s3://runs/{re.sub(r'[^a-z]+', '-', request.node.name)}")


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setattr(lease_module, "LEASE_S", 1.5)
    monkeypatch.setattr(lease_module, "RENEW_S", 0.2)


def commit(store: Store, name: str, step: int, files: dict[str, dict]) -> None:
    meta = {"step": step, "world_size": 1, "machines": 1, "identity": {}, "files": files}
    store.write(f"{name}/{COMMITTED}", manifest.dumps(meta))


def test_what_is_put_comes_back_and_what_is_removed_is_gone(store, tmp_path):
    source = tmp_path / "shard"
    source.write_bytes(os.urandom(300_000))
    store.put(source, "step-00000004-aa/shard")
    assert store.directories() == ["step-00000004-aa"] and checkpoints(store).found == []
    commit(store, "step-00000004-aa", 4, {"shard": manifest.entry(source)})
    [(name, meta)] = checkpoints(store).found
    assert meta["step"] == 4
    (tmp_path / "back").mkdir()
    fetch(store, name, meta["files"], tmp_path / "back")
    assert (tmp_path / "back" / "shard").read_bytes() == source.read_bytes()
    store.remove(name)
    assert store.directories() == [] and store.read(f"{name}/{COMMITTED}") is None


@pytest.mark.parametrize("harm", ["missing", "torn", "flipped"])
def test_what_is_not_what_was_written_is_never_taken(store, tmp_path, harm):
    source = tmp_path / "shard"
    source.write_bytes(b"0123456789" * 1000)
    entry = manifest.entry(source)
    content = bytearray(source.read_bytes())
    if harm == "torn":
        del content[-1:]
    elif harm == "flipped":
        content[5000] ^= 1
    if harm != "missing":
        source.write_bytes(content)
        store.put(source, "step-00000004-aa/shard")
    commit(store, "step-00000004-aa", 4, {"shard": entry})
    (tmp_path / "back").mkdir()
    with pytest.raises(UserError, match="shard"):
        fetch(store, "step-00000004-aa", {"shard": entry}, tmp_path / "back")


def test_connections_that_break_are_tried_again(line, tmp_path):
    store = Store("s3://runs/breaking")
    source = tmp_path / "shard"
    source.write_bytes(os.urandom(100_000))
    line.cut_every, before = 2, line.cuts
    try:
        for i in range(6):
            store.put(source, f"step-0000000{i}-aa/shard")
            commit(store, f"step-0000000{i}-aa", i, {"shard": manifest.entry(source)})
        assert [meta["step"] for _, meta in checkpoints(store).found] == [5, 4, 3, 2, 1, 0]
    finally:
        line.cut_every = 0
    assert line.cuts > before, "no connection was cut"


def test_a_damaged_manifest_is_passed_over_and_one_of_a_newer_format_is_an_error(store):
    commit(store, "step-00000004-aa", 4, {})
    store.write(f"step-00000008-bb/{COMMITTED}", '{"format": 1, "step"')
    listing = checkpoints(store)
    assert [meta["step"] for _, meta in listing.found] == [4]
    [line] = listing.passed_over
    assert line == f"{store.url}/step-00000008-bb: passed over: meta.json is damaged"
    store.write(f"step-00000012-cc/{COMMITTED}", json.dumps({"format": manifest.FORMAT + 1}))
    with pytest.raises(UserError, match="step-00000012-cc: was written by a newer fastft"):
        checkpoints(store)


def test_the_model_counts_when_it_is_whole(store, tmp_path):
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "deep" / "weights").write_bytes(b"1" * 100)
    assert trained_model(store) is None
    upload_model(store, tmp_path / "model", {"step": 9, "world_size": 1, "machines": 1, "identity": {"a": 1}})
    assert trained_model(store)["identity"] == {"a": 1}
    assert set(trained_model(store)["files"]) == {"config.json", "deep/weights"}


# The uploader ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def uploader(tmp_path, short_lease):
    """The uploader of one process, whose storage takes nothing until `uploader.goes` is set."""
    join_ranks()
    lease = Lease(Store(f"file://{tmp_path}/bucket/run"))
    uploader = Uploader(lease.store, lease, [0], keep=2, keep_every=0)
    put, uploader.goes = uploader._put, threading.Event()
    uploader._put = lambda *given: uploader.goes.wait(60) and put(*given)
    yield uploader
    uploader.goes.set()
    uploader.finish(60)
    lease.release()
    dist.destroy_process_group()


def offer(uploader: Uploader, tmp_path, step: int) -> None:
    path = tmp_path / f"step-{step:08d}"
    path.mkdir()
    (path / "shard").write_bytes(b"1" * 100)
    files = {"shard": manifest.entry(path / "shard")}
    meta = {"step": step, "world_size": 1, "machines": 1, "identity": {}, "files": files}
    uploader.offer(step, path, meta, ["shard"])


def test_only_the_newest_checkpoint_waits_for_an_upload(uploader, tmp_path):
    offer(uploader, tmp_path, 1)
    while uploader.current < 1:
        time.sleep(0.01)
    for step in range(2, 30):
        offer(uploader, tmp_path, step)
        assert uploader.in_use() == {1, step}
    uploader.goes.set()
    assert uploader.finish(60) and uploader.committed == 29
    assert [meta["step"] for _, meta in checkpoints(uploader.store).found] == [29, 1]


def test_a_machine_that_no_longer_has_what_was_chosen_says_so(uploader, tmp_path, said):
    """A newer checkpoint took its place before that machine heard of the choice."""
    for step in (1, 2, 3):
        while step == 2 and uploader.current < 1:
            time.sleep(0.01)
        offer(uploader, tmp_path, step)
    uploader._next = iter([(2, "ab"), (3, "ab"), None]).__next__
    uploader.goes.set()
    assert uploader.finish(60) and uploader.committed == 3
    assert "upload: step 2 is on the disk only (a newer one took its place)" in said()


def test_a_checkpoint_is_not_called_uploaded_when_another_machine_was_lost_before_it_was(uploader, tmp_path, said):
    def gone(step, name):
        raise RuntimeError("Connection closed by peer")

    uploader._upload = gone
    uploader.goes.set()
    offer(uploader, tmp_path, 1)
    assert uploader.finish(60) is False and checkpoints(uploader.store).found == []
    assert "upload: ended (Connection closed by peer)" in said()


def test_what_a_start_has_passed_over_is_not_kept_in_storage(uploader, tmp_path):
    for step in (10, 20, 30):  # the bytes of the last two are wrong
        commit(uploader.store, f"step-{step:08d}-aa", step, {})
    uploader.goes.set()
    offer(uploader, tmp_path, 15)
    assert uploader.finish(60)
    assert [meta["step"] for _, meta in checkpoints(uploader.store).found] == [15, 10]


# The lease -------------------------------------------------------------------------------------------------------------------


def foreign(store: Store, **changes) -> None:
    """Let a run on another machine hold the lease."""
    held = {"token": "other", "host": "elsewhere", "boot": "b", "pid": 1, "job": "", "beat": "1"}
    store.write("lease.json", json.dumps({**held, **changes}))


def test_two_runs_never_write_to_the_same_place(store, short_lease):
    with_lease = Lease(store)
    with pytest.raises(UserError, match=r"another run writes there .*give this one another --checkpoint.remote"):
        Lease(store)
    with_lease.release()
    assert not with_lease.is_mine(), "who has released it writes no more"
    Lease(store).release()


def test_a_holder_elsewhere_is_watched_until_its_lease_ends(store, short_lease, said):
    foreign(store)
    lease = Lease(store)  # the foreign one never changes
    assert "elsewhere may still be writing" in said()[0]
    lease.release()
    foreign(store)
    alive = threading.Event()

    def beat() -> None:
        for i in range(100):
            if alive.wait(0.1):
                return
            foreign(store, beat=str(i))

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="another run writes there"):
        Lease(store)
    alive.set()
    thread.join()


def test_the_same_managed_job_and_a_dead_process_need_not_wait(store, monkeypatch):
    """LEASE_S is two minutes here, so that waiting would be noticed."""
    monkeypatch.setenv("SKYPILOT_MANAGED_JOB_ID", "7")
    monkeypatch.setenv("SKYPILOT_TASK_ID", "sky-managed-2026-11-28-04-05-06-123456_vicuna_7-0")
    foreign(store, job="7/sky-managed-2026-11-28-04-05-06-123456_vicuna_7-0")
    Lease(store).release()
    dead = subprocess.Popen(["true"])
    dead.wait()
    foreign(store, host=socket.gethostname(), boot=lease_module._boot(), pid=dead.pid)
    Lease(store).release()


def test_the_same_number_of_job_on_another_server_is_another_job(store, short_lease, monkeypatch):
    monkeypatch.setenv("SKYPILOT_MANAGED_JOB_ID", "7")
    monkeypatch.setenv("SKYPILOT_TASK_ID", "sky-managed-2026-11-28-04-05-06-123456_vicuna_7-0")
    with_lease = Lease(store)
    monkeypatch.setenv("SKYPILOT_TASK_ID", "sky-managed-2026-11-28-07-08-09-123456_vicuna_7-0")
    with pytest.raises(UserError, match="another run writes there"):
        Lease(store)
    with_lease.release()


def test_a_number_of_process_that_another_one_has_now_does_not_hold_the_lease(store, short_lease):
    foreign(store, host=socket.gethostname(), boot=lease_module._boot(), pid=os.getpid())
    Lease(store).release()


def test_who_finds_the_lease_gone_has_lost_it(store, short_lease):
    """While this run was stalled for minutes, another one has taken the lease, finished, and released it."""
    lease = Lease(store)
    lease._ended.set()  # its thread is stalled, too
    lease.thread.join()
    lease._ended.clear()
    store.remove("lease.json")
    assert not lease.is_mine() and lease.lost
    lease.release()


def test_an_object_is_never_seen_half_written(tmp_path):
    store = Store(f"file://{tmp_path}/run")
    store.write("lease.json", "the first")
    with open(tmp_path / "run" / "lease.json") as reader:
        store.write("lease.json", "the second")
        assert reader.read() == "the first"
    assert store.read("lease.json") == b"the second"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lease.json"]


def test_who_lost_the_lease_knows_it_and_leaves_it_to_the_other(store, short_lease):
    lease = Lease(store)
    foreign(store)
    assert not lease.is_mine()
    lease.release()
    assert json.loads(store.read("lease.json"))["token"] == "other"


# The user's mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url, says", [
    ("s3://no-such-bucket/run", "no-such-bucket.*check the bucket's name"),
    ("nonsense://bucket/run", "nonsense"),
])  # fmt: skip
def test_a_place_that_is_none_is_one_clear_line(line, url, says):
    with pytest.raises(UserError, match=says) as error:
        Lease(Store(url))
    assert "\n" not in str(error.value)


def test_a_place_where_nothing_can_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="check the bucket's name, its permissions"):
        Lease(Store(f"file://{tmp_path}/file/run"))


def test_without_credentials_it_is_one_clear_line_and_soon(line, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match=r"s3://runs/x.*credentials"):
        Lease(Store("s3://runs/x"))


def test_storage_that_never_answers_is_one_clear_line(line):
    line.cut_every = 1
    try:
        with pytest.raises(UserError, match=r"s3://runs/x/lease\.json"):
            Lease(Store("s3://runs/x"))
    finally:
        line.cut_every = 0
