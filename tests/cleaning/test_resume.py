"""An interrupted cleaning run goes on with the same command, and its result is byte for byte that of a run in one go."""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.cleaning_runs import contents, dump
from hypothesis import given
from hypothesis import strategies as st

import cleaning.first_pass
import cleaning.pipeline
import cleaning.run.workdir
import cleaning.run.workers
import cleaning.second_pass
from cleaning.pipeline import clean
from cleaning.run.workdir import Log
from cleaning.settings import FilterSettings

OPTIONS = {"holdout": 0.1, "workers": 1}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(cleaning.first_pass, "SHARD_BYTES", 2_000)


class Interrupted(BaseException):
    """In place of SIGKILL, at a place that can be chosen."""


# After any call of these the process may be gone: (where it is, its name, calls of it at least).
STEPS = {
    "a shard is logged": (cleaning.run.workdir.Log, "append", 3),
    "progress is written": (cleaning.second_pass, "write_whole", 3),
    "the report is written": (cleaning.pipeline, "write_whole", 1),
    "an output is renamed": (cleaning.run.workdir.os, "replace", 3),
    "an output is written to": (cleaning.second_pass, "_write", 3),
    "an output is made durable": (cleaning.run.workdir, "sync", 3),
}


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("step", STEPS)
def test_interrupted_anywhere_it_goes_on(tmp_path, monkeypatch, small_shards, step, before):
    source = dump(tmp_path / "d.json")
    clean([source], tmp_path / "whole", **OPTIONS)
    whole = contents(tmp_path / "whole")
    assert len(whole) == 5
    owner, name, calls_at_least = STEPS[step]
    original = getattr(owner, name)
    for stop in range(1, 1_000):
        calls = 0

        def interrupted(*arguments, stop=stop, **keywords):
            nonlocal calls
            calls += 1
            if before and calls == stop:
                raise Interrupted
            result = original(*arguments, **keywords)
            if not before and calls == stop:
                raise Interrupted
            return result

        out = tmp_path / f"out{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            try:
                clean([source], out, **OPTIONS)
                break  # there is no such call any more
            except Interrupted:
                pass
        clean([source], out, **OPTIONS)
        assert contents(out) == whole
    assert stop > calls_at_least


def test_what_was_done_is_not_done_again(tmp_path, monkeypatch, small_shards, caplog):
    source, appended = dump(tmp_path / "d.json"), []

    def append(log, payload):
        if len(appended) == 5:
            appended.append(None)
            raise Interrupted
        appended.append(len(payload))
        return original(log, payload)

    original = Log.append
    monkeypatch.setattr(Log, "append", append)
    with pytest.raises(Interrupted):
        clean([source], tmp_path / "out", **OPTIONS)
    assert len(appended) == 6
    with caplog.at_level(logging.INFO, "cleaning"):
        clean([source], tmp_path / "out", **OPTIONS)
    first_run, second_run = appended[:5], appended[6:]
    monkeypatch.setattr(Log, "append", original)
    clean([source], tmp_path / "whole", **OPTIONS)
    assert "going on with an interrupted run" in caplog.text
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(second_run) > 3 and first_run


@pytest.mark.parametrize("change", ["setting", "input", "filter"])
def test_another_command_begins_anew_and_says_why(tmp_path, monkeypatch, small_shards, caplog, change):
    source, own = dump(tmp_path / "d.json"), tmp_path / "own.py"
    own.write_text("def f(c):\n    return None\n")
    settings = FilterSettings(own_filters=(f"{own}:f",))

    def stop(*_):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(cleaning.pipeline, "find_duplicates", stop)
        with pytest.raises(Interrupted):
            clean([source], tmp_path / "out", settings=settings, **OPTIONS)
    assert (tmp_path / "out/.partial/outcomes").stat().st_size
    options = {**OPTIONS, "near": 0.5} if change == "setting" else OPTIONS
    if change == "input":
        dump(source, 61)
    if change == "filter":
        own.write_text("def f(c):\n    return None  # but differently\n")
    with caplog.at_level(logging.INFO, "cleaning"):
        clean([source], tmp_path / "out", settings=settings, **options)
    named = {"setting": "settings", "input": "inputs", "filter": "files"}[change]
    assert f"an interrupted run with other {named} was there; begun anew" in caplog.text
    clean([source], tmp_path / "whole", settings=settings, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@given(st.lists(st.binary(max_size=40), max_size=5), st.integers(0, 400), st.integers(0, 255))
def test_a_damaged_log_keeps_what_stands_before_the_damage(tmp_path_factory, payloads, at, byte):
    path = tmp_path_factory.mktemp("log") / "log"
    with Log(path) as log:
        for payload in payloads:
            log.append(payload)
    data = path.read_bytes()
    for damaged in (data[:at], data[:at] + bytes([byte]) + data[at + 1 :]):
        path.write_bytes(damaged)
        with Log(path) as log:
            kept = list(log.recover())
            assert kept == payloads[: len(kept)]
            log.append(b"next")
            assert list(log.frames()) == [*kept, b"next"]


@pytest.mark.slow
def test_killed_at_random_moments_by_the_system(tmp_path):
    """SIGKILL, real processes, workers; benchmarks/scale.py does it twenty times on a larger dump."""
    source = dump(tmp_path / "d.json", 6_000)
    command = [sys.executable, "-m", "cleaning", str(source), "--workers", "2", "--holdout", "0.1", "-o"]
    options = {"cwd": Path(__file__).parents[2], "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, **options)
    took, moments = time.monotonic() - began, random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([*command, str(tmp_path / "out")], **options)
        time.sleep(moments.uniform(0.3, 0.9) * took)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(tmp_path / "out")], check=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
