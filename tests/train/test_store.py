"""A run's place in storage: on a real S3 server whose connections break, and on a disk."""

import errno
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from types import FunctionType

import fsspec
import pytest
import torch.distributed as dist
from helpers import storage, training

from fastft.common import logs, storage_faults
from fastft.common import object_store as storing
from fastft.common.distributed import join_ranks
from fastft.common.object_store import Store, check_address
from fastft.common.storage_faults import StorageError
from fastft.config import parse_config
from fastft.errors import UserError
from fastft.train.checkpoint import lease as lease_module
from fastft.train.checkpoint import manifest
from fastft.train.checkpoint.lease import Lease
from fastft.train.checkpoint.remote import COMMITTED, Uploader, checkpoints, download, trained_model, upload_model


@pytest.fixture(scope="module")
def line():
    with storage.s3() as line:
        yield line


@pytest.fixture
def faulty(line):
    """The line to storage, whose faults end with the test."""
    yield line
    line.heal()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(storing, "DELAYS_S", (0.05, 0.1, 0.2, 0.4))
    monkeypatch.setattr(storing, "PATIENCE_S", 1.5)


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
    store.put(source, "step-00000004-aaaaaaaa/shard")
    assert store.directories() == ["step-00000004-aaaaaaaa"] and checkpoints(store).found == []
    commit(store, "step-00000004-aaaaaaaa", 4, {"shard": manifest.entry(source)})
    [(name, meta)] = checkpoints(store).found
    assert meta["step"] == 4
    (tmp_path / "back").mkdir()
    assert download(store, name, meta["files"], tmp_path / "back") is None
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
        store.put(source, "step-00000004-aaaaaaaa/shard")
    commit(store, "step-00000004-aaaaaaaa", 4, {"shard": entry})
    (tmp_path / "back").mkdir()
    assert "shard" in download(store, "step-00000004-aaaaaaaa", {"shard": entry}, tmp_path / "back")


def test_connections_that_break_are_tried_again(line, tmp_path):
    store = Store("s3://runs/breaking")
    source = tmp_path / "shard"
    source.write_bytes(os.urandom(100_000))
    line.cut_every, before = 2, line.cuts
    try:
        for i in range(6):
            store.put(source, f"step-0000000{i}-aaaaaaaa/shard")
            commit(store, f"step-0000000{i}-aaaaaaaa", i, {"shard": manifest.entry(source)})
        assert [meta["step"] for _, meta in checkpoints(store).found] == [5, 4, 3, 2, 1, 0]
    finally:
        line.cut_every = 0
    assert line.cuts > before, "no connection was cut"


def test_a_damaged_manifest_is_passed_over_and_one_of_a_newer_format_is_an_error(store):
    commit(store, "step-00000004-aaaaaaaa", 4, {})
    store.write(f"step-00000008-bbbbbbbb/{COMMITTED}", '{"format": 1, "step"')
    listing = checkpoints(store)
    assert [meta["step"] for _, meta in listing.found] == [4]
    [line] = listing.passed_over
    assert line == f"{store.url}/step-00000008-bbbbbbbb: passed over: meta.json is damaged"
    store.write(f"step-00000012-cccccccc/{COMMITTED}", json.dumps({"format": manifest.FORMAT + 1}))
    with pytest.raises(UserError, match="step-00000012-cccccccc: was written by a newer fastft"):
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
    uploader._next = iter([(2, "abababab"), (3, "abababab"), None]).__next__
    uploader.goes.set()
    assert uploader.finish(60) and uploader.committed == 3
    assert "upload: step 2 is on the disk only (a newer one took its place)" in said()


def test_a_checkpoint_is_not_called_uploaded_when_another_machine_was_lost_before_it_was(uploader, tmp_path, said):
    def gone(step, name):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")

    uploader._upload = gone
    uploader.goes.set()
    offer(uploader, tmp_path, 1)
    assert uploader.finish(60) is False and checkpoints(uploader.store).found == []
    assert "upload: ended ([gloo/transport/tcp/pair.cc:538] Connection closed by peer)" in said()


@pytest.mark.parametrize("step", ["_put", "_commit", "_agree", "_renew"])
def test_a_bug_in_a_thread_is_kept_for_the_run(uploader, tmp_path, monkeypatch, step):
    """A fault of storage is logged and tried again with the next checkpoint; a bug is raised by the run."""

    def bug(*given):
        raise TypeError("planted")

    owner = uploader.lease if step == "_renew" else uploader
    monkeypatch.setattr(owner, "is_mine" if step == "_renew" else step, bug)
    uploader.goes.set()
    offer(uploader, tmp_path, 1)
    if step == "_renew":
        uploader.lease.thread.join(10)
    assert uploader.finish(60) is (step == "_agree")  # which had been called already, and fails after the upload
    assert isinstance(uploader.bug, TypeError) and "bug" in [
        frame.name for frame in traceback.extract_tb(uploader.bug.__traceback__)
    ]
    monkeypatch.undo()  # before the lease is given back


def test_a_fault_of_storage_is_no_bug(uploader, tmp_path, monkeypatch):
    def refused(*given):
        raise StorageError("s3://b", storage_faults.FORBIDDEN, "AccessDenied")

    monkeypatch.setattr(uploader, "_put", refused)
    offer(uploader, tmp_path, 1)
    assert uploader.finish(60) is False and uploader.bug is None


@pytest.mark.parametrize(
    "error", [KeyError("planted"), TypeError("planted"), ValueError("planted"), RuntimeError("planted")]
)
def test_a_bug_is_no_fault_of_storage(tmp_path, monkeypatch, error):
    """ValueError and RuntimeError are what some libraries raise, so that only those that our own code raises are bugs."""
    store = Store(f"file://{tmp_path}/bucket/run")

    def bug(*given):
        raise error

    bug = FunctionType(bug.__code__, bug.__globals__ | {"__name__": "fastft.planted"}, None, None, bug.__closure__)
    monkeypatch.setattr(store.fs, "cat_file", bug)
    with pytest.raises(type(error), match="planted"):
        store.read("x")


def test_a_file_of_this_machine_that_is_missing_is_not_called_an_object(tmp_path):
    with pytest.raises(FileNotFoundError, match="no/shard"):
        Store(f"file://{tmp_path}/bucket/run").put(tmp_path / "no/shard", "x")


def test_what_a_start_has_passed_over_is_not_kept_in_storage(uploader, tmp_path):
    for step in (10, 20, 30):  # the bytes of the last two are wrong
        commit(uploader.store, f"step-{step:08d}-aaaaaaaa", step, {})
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
    ("my-chats", "'my-chats' is no address of storage; did you mean s3://my-chats?"),
    ("s3:/bucket/x", "did you mean s3://bucket/x?"),
    ("s3:bucket/x", "did you mean s3://bucket/x?"),
    ("s3//bucket/x", "did you mean s3://bucket/x?"),
    ("GS:/bucket/x", "did you mean gs://bucket/x?"),
    ("/mnt/bucket/run", "a directory is file:///mnt/bucket/run"),
    ("/vicuna", "a directory is file:///vicuna"),  # $BUCKET/$RUN_NAME without a BUCKET
    ("", "'' is no address of storage; an address is s3://bucket/run"),
    ("s3://", "'s3://' names no bucket"),
    ("s3:///run", "names no bucket"),
    ("s3://my bucket/run", "names no bucket"),
    ("files:///bucket/run", "'files' is no kind of storage; did you mean file:///bucket/run?"),
    ("s3n://bucket/run", "'s3n' is no kind of storage; did you mean s3://bucket/run?"),
    ("S3://bucket/run", "did you mean s3://bucket/run?"),
    ("nonsense://bucket/run", "'nonsense' is no kind of storage; an address is s3://bucket/run"),
    ("https://bucket.s3.amazonaws.com/run", "'https' is no kind of storage"),
    ("memory://run", "'memory' is no kind of storage"),
    ("ftp://127.0.0.1:9/x", "'ftp' is no kind of storage"),
    ("ftp://x/y", "'ftp' is no kind of storage"),
    ("sftp://127.0.0.1:9/x", "'sftp' is no kind of storage"),
    ("github://owner:name@main/x", "'github' is no kind of storage"),
    ("file://bucket/run", "the full path of a directory"),
    ("file:///", "the full path of a directory"),
])  # fmt: skip
def test_an_address_is_an_address(url, says):
    """What has no scheme would be a directory on the machine that is torn down with it."""
    for open_it in (check_address, Store):
        with pytest.raises(UserError) as error:
            open_it(url)
        assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["s3://b/run", "gs://b", "gcs://b/x", "az://c/run", "hf://buckets/o/n", "file:///a b/c", "abfs://c@a/run"]
)
def test_addresses_of_every_kind_are_accepted(url):
    check_address(url)


@pytest.mark.parametrize("scheme", sorted({*fsspec.available_protocols()} - {"file", "local"}))
def test_whatever_fsspec_knows_opens_or_is_one_line(scheme):
    """Some need a package, some arguments that an address does not hold."""
    try:
        Store(f"{scheme}://container/run")
    except UserError as error:
        assert scheme in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "error",
    [ConnectionRefusedError(111, "Connection refused"), TypeError("missing argument"), ValueError("no account")],
)
def test_a_library_that_cannot_open_an_address_is_one_line(monkeypatch, error):
    def url_to_fs(*_, **__):
        raise error

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    with pytest.raises(StorageError, match="s3://bucket/run"):
        Store("s3://bucket/run")


def test_the_trainer_refuses_a_bucket_without_a_scheme_before_it_reads_anything():
    with pytest.raises(UserError, match=r"checkpoint\.remote: 'my-chats' is no address of storage"):
        parse_config(["--model", "no", "--data", "none", "--output_dir", "nowhere", "--checkpoint.remote", "my-chats"])


# What storage does not do, and why ---------------------------------------------------------------------------------------------


def ends_with(store: Store, says: str) -> str:
    """Assert that the storage does not take a lease, which one line says."""
    with pytest.raises(StorageError, match=says) as error:
        Lease(store)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_bucket_that_is_not_there_is_named(line):
    store = Store("s3://no-such-bucket/run")
    for look in (store.directories, lambda: store.read("lease.json"), lambda: checkpoints(store)):
        with pytest.raises(StorageError, match=r"s3://no-such-bucket/run.*: there is no such bucket.*check its name"):
            look()
    ends_with(store, "no such bucket")


def test_a_place_where_nothing_can_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    ends_with(Store(f"file://{tmp_path}/file/run"), "nothing can be written there .*check the address")


def test_without_credentials_it_is_one_clear_line_and_soon(line, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    ends_with(Store("s3://runs/x"), r"s3://runs/x.*: there are no credentials")


def test_storage_that_never_answers_is_one_clear_line(faulty):
    faulty.cut_every = 1
    ends_with(Store("s3://runs/x"), r"s3://runs/x/lease\.json: cannot be reached .*check the network")


def test_storage_that_cannot_be_reached_says_so(faulty):
    faulty.drop()
    ends_with(Store("s3://runs/x"), r"s3://runs/x/lease\.json: cannot be reached .*; check the network")


@pytest.mark.parametrize("refusal, says, tries", [
    (storage.EXPIRED, "the credentials have expired .The provided token has expired", "minutes"),
    (storage.SKEWED, "the clock of this machine is wrong .The difference between", "few"),
    (storage.FORBIDDEN, "access is refused .Access Denied.*; allow these credentials to list, read, write", "few"),
    (storage.BUSY, "is overloaded or failing .Please reduce your request rate", "minutes"),
    (storage.Refusal(403, "InvalidAccessKeyId"), "the credentials are refused", "few"),
    (storage.Refusal(403, "SignatureDoesNotMatch"), "the credentials are refused", "few"),
    (storage.Refusal(500, "InternalError"), "is overloaded or failing", "minutes"),
    (storage.Refusal(502, ""), "is overloaded or failing", "minutes"),
    (storage.Refusal(404, "NoSuchBucket", "The specified bucket does not exist"), "there is no such bucket", "none"),
])  # fmt: skip
def test_the_last_line_names_the_cause_that_fits(faulty, refusal, says, tries):
    store = Store("s3://runs/x")
    faulty.refusal, before = refusal, faulty.refused
    ends_with(store, says)
    assert {"none": 1, "few": 3}.get(tries, faulty.refused - before) == faulty.refused - before


class Refreshing(Exception):
    """Stands for google.auth's RefreshError, azure's HttpResponseError and gcsfs' HttpError: their packages are optional."""

    def __init__(self, message: str, **attributes):
        super().__init__(message)
        self.__dict__.update(attributes)


@pytest.mark.parametrize("error, fault", [
    (type("RefreshError", (Refreshing,), {})("invalid_grant: Bad Request"), storage_faults.EXPIRED),
    (type("RefreshError", (Refreshing,), {})("Token must be a short-lived token (60 minutes)"), storage_faults.CLOCK),
    (type("DefaultCredentialsError", (Refreshing,), {})("not found"), storage_faults.NO_CREDENTIALS),
    (type("HttpError", (Refreshing,), {})("Invalid Credentials, 401", code=401), storage_faults.EXPIRED),
    (type("HttpError", (Refreshing,), {})("Forbidden", code=403), storage_faults.FORBIDDEN),
    (OSError("Forbidden: https://storage.googleapis.com/b/o/run%2Fx\n"), storage_faults.FORBIDDEN),  # gcsfs 2026.10 of 403
    (type("HttpError", (Refreshing,), {})("Backend Error", code=503), storage_faults.BUSY),
    (type("HttpError", (Refreshing,), {})("The specified bucket does not exist", code=404), storage_faults.NO_BUCKET),
    (type("ResourceNotFoundError", (Refreshing,), {})("no", error_code="ContainerNotFound"), storage_faults.NO_BUCKET),
    (type("HttpResponseError", (Refreshing,), {})("no", error_code="AuthenticationFailed"), storage_faults.KEY),
    (type("HttpResponseError", (Refreshing,), {})("Request date header too old"), storage_faults.CLOCK),
    (type("ServiceRequestError", (Refreshing,), {})("Cannot connect"), storage_faults.NETWORK),
    (OSError(errno.ENOSPC, "No space left on device"), storage_faults.DISK_FULL),
    (OSError("something new"), storage_faults.OTHER),
])  # fmt: skip
def test_the_causes_of_other_clouds(error, fault):
    assert storage_faults.diagnose(error) is fault


def test_storage_that_does_not_answer_is_said_with_how_long_it_goes_on(faulty, monkeypatch, said):
    monkeypatch.setattr(storing, "SAID_AFTER_S", 0.1)
    monkeypatch.setattr(storing, "PATIENCE_S", 60)
    store = Store("s3://runs/x")
    faulty.drop()
    threading.Timer(1, faulty.restore).start()
    assert store.read("nothing") is None
    [waiting, over] = said()
    assert re.fullmatch(
        r"s3://runs/x/nothing: cannot be reached \(.*\); tried for \d s, giving up after another \d+ s",
        waiting,
    )
    assert over == "s3://runs/x: answers again"


def test_a_connection_that_breaks_prints_no_traceback(faulty, tmp_path):
    """The parts of a large file leave tasks behind, each of which asyncio would report in ten lines."""
    store = Store("s3://runs/x")
    (tmp_path / "large").write_bytes(bytes(120 * 2**20))
    faulty.bytes_per_s = 20_000_000
    code = (
        "import sys, threading\nfrom pathlib import Path\nfrom fastft.common import object_store\n"
        "object_store.PATIENCE_S = 3\n"
        "object_store.Store('s3://runs/x').put(Path(sys.argv[1]), 'large')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "large")], stderr=subprocess.PIPE, text=True)
    busy = faulty.connections
    while faulty.connections < busy + 3:
        time.sleep(0.01)
    faulty.drop()
    _, stderr = process.communicate(timeout=60)
    assert "never retrieved" not in stderr and "ClientConnectionResetError" not in stderr, stderr
    assert "cannot be reached" in stderr
    faulty.heal()
    assert store.directories() == []


@pytest.fixture
def temporary_credentials(tmp_path, monkeypatch):
    """Temporary credentials in a file, which another process may rewrite; returns its path."""
    path = tmp_path / "credentials"
    storage.write_credentials(path, "FIRST")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    return path


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId", "AccessDenied", "InvalidToken"])
def test_credentials_that_another_process_rewrites_are_read_anew(faulty, temporary_credentials, tmp_path, code):
    store, source = Store("s3://runs/renewed"), tmp_path / "shard"
    source.write_bytes(b"1" * 1000)
    store.put(source, "before")
    faulty.refusal = storage.Refusal(403, code, key="FIRST")
    with pytest.raises(StorageError):
        store.read("before")
    storage.write_credentials(temporary_credentials, "SECOND")
    store.put(source, "after")
    assert store.read("before") == store.read("after") == b"1" * 1000


def test_credentials_that_are_renewed_while_storage_refuses_the_old_ones(faulty, temporary_credentials, monkeypatch):
    monkeypatch.setattr(storing, "PATIENCE_S", 60)
    store = Store("s3://runs/renewed")
    faulty.refusal = storage.Refusal(403, "ExpiredToken", key="FIRST")
    threading.Timer(1.5, storage.write_credentials, (temporary_credentials, "SECOND")).start()
    store.write("after", "renewed")
    assert store.read("after") == b"renewed"


# Retention and uploads that fail ----------------------------------------------------------------------------------------------


def test_retention_removes_only_what_an_uploader_wrote(uploader, tmp_path):
    store = uploader.store
    others = [
        "step-bestever",
        "step-best-so-far",
        "step-00000002",
        "step-00000002-mine",
        "results.tmp",
        "step-1-aaaaaaaa",
    ]
    for name in others:
        store.write(f"{name}/weights", "precious")
        store.write(f"{name}/{COMMITTED}", store.url)
    store.write("step-00000001-abcdef01/half", "an upload that was not finished")
    commit(store, "step-00000003-abcdef01", 3, {})
    commit(store, "step-00000004-abcdef01", 4, {})
    assert [meta["step"] for _, meta in checkpoints(store).found] == [4, 3]
    uploader.goes.set()
    offer(uploader, tmp_path, 5)
    assert uploader.finish(60)
    left = store.directories()
    assert set(others) <= set(left) and [meta["step"] for _, meta in checkpoints(store).found] == [5, 4]
    assert len(left) == len(others) + 2


def test_uploads_that_fail_again_and_again_are_said_loudly(uploader, tmp_path, caplog, said):
    put, works = uploader.store.put, True

    def putting(*given):
        if not works:
            raise StorageError("s3://runs/x", storage_faults.EXPIRED, "The provided token has expired")
        put(*given)

    uploader.store.put = putting
    uploader.goes.set()
    for step in range(1, 6):
        works = step in (1, 5)
        offer(uploader, tmp_path, step)
        while uploader.tried < step:
            time.sleep(0.01)
        time.sleep(0.05)
        assert (logs._notice or "") == {
            3: "STORAGE HAS step 1, 2 uploads failed",
            4: "STORAGE HAS step 1, 3 uploads failed",
        }.get(step, "")
    cause = "s3://runs/x: the credentials have expired (The provided token has expired)"
    assert said() == [
        f"upload: step 2 is on the disk only ({cause})",
        *(
            f"upload: {count} in a row have failed, the last one of step {step} ({cause}). Storage has step 1: a machine that "
            "is lost now takes all later work with it"
            for count, step in ((2, 3), (3, 4))
        ),
        "upload: step 5 is in storage, after 3 uploads that failed",
    ]
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR", "ERROR", "INFO"]


BUG_OF_UPLOAD = """
import sys
from fastft.common import logs
from fastft.common.command_line import leave, run
from fastft.train import loop
from fastft.train.checkpoint import remote
put, bad = remote._put_all, int(sys.argv.pop(1))
def planted(store, directory, name, files):
    if name.startswith("step-") and int(name[5:13]) >= bad:
        raise TypeError("planted")
    put(store, directory, name, files)
remote._put_all = planted
logs.show()
leave(run(loop.main))
"""


@pytest.mark.parametrize("bad, last", [(1, 3), (4, 4)])
def test_a_bug_of_an_upload_ends_the_run_and_leaves_what_is_on_the_disk(ground, tmp_path, bad, last):
    """In the middle of the run once the next checkpoint is on the disk, in the last upload once the model is written, too."""
    (tmp_path / "script.py").write_text(BUG_OF_UPLOAD)
    options = ["--max_steps", "4", "--checkpoint.every", "1", "--checkpoint.remote", f"file://{tmp_path}/bucket/run"]
    done = training.run(
        [sys.executable, str(tmp_path / "script.py"), str(bad), *training.flags(ground, tmp_path / "out", *options)]
    )
    assert done.returncode == 1 and "done: 4 steps" not in done.stderr, done.stderr
    assert "TypeError: planted" in done.stderr and "Traceback" in done.stderr and "please report it" in done.stderr
    steps = sorted(path.name for path in (tmp_path / "out" / "checkpoints").glob("step-*"))
    assert steps and int(steps[-1][5:]) <= last and (tmp_path / "out" / "model").exists() == (last == 4)
