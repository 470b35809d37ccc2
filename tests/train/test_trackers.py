"""Trackers show one run after an interruption, are one clear line without their package, and never end a run."""

import json
import shutil
import sys

import pytest
from helpers import training as runs
from helpers.bugs import bug

from fastft.train.report import trackers as trackers_module
from fastft.train.report.trackers import Trackers, _TensorBoard, tracker_names


def interrupted(ground, out, tracker: str) -> str:
    """Train with a tracker to step 4, lose what came after step 2, train on; return the run's id."""
    more = ["--trackers", tracker, "--checkpoint.every", "2", "--max_steps", "4"]
    for _ in range(2):
        done = runs.train_here(ground, out, *more)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(out / "model")
        shutil.rmtree(out / "checkpoints" / "step-00000004")
    return json.loads((out / "run.json").read_text())["id"]


def test_names_are_a_list_and_none_stands_for_none():
    assert tracker_names("tensorboard, tensorboard") == ["tensorboard"] and tracker_names("none") == []


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_package_that_is_missing_is_one_clear_line_before_any_work(ground, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    done = runs.train_here(ground, tmp_path / "out", "--trackers", f"none,{name}")
    runs.fails(done, f"trackers: {name} is not installed (pip install {name}); leave it out, or give --trackers none")
    assert "data:" not in done.stderr


def test_without_trackers_there_is_metrics_jsonl_only(ground, tmp_path):
    done = runs.train_here(ground, tmp_path / "out", "--trackers", "none", "--max_steps", "1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "metrics.jsonl").exists() and not (tmp_path / "out" / "tensorboard").exists()


def test_a_tracker_that_does_not_start_is_one_clear_line(ground, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tensorboard").write_text("a file in the way")
    runs.fails(runs.train_here(ground, tmp_path / "out"), "trackers: tensorboard did not start (")


def test_a_tracker_that_fails_is_dropped_with_a_warning(tmp_path, caplog):
    trackers = Trackers(["tensorboard"], tmp_path, "id", 0, {})
    trackers.open["tensorboard"].close()

    def add_scalar(*_):
        raise RuntimeError("whatever it is that breaks in the library")

    trackers.open["tensorboard"].writer.add_scalar = add_scalar
    trackers.log({"step": 1, "loss": 1.0})
    trackers.log({"step": 2, "loss": 1.0})
    trackers.close()
    (said,) = caplog.messages
    assert said.startswith("trackers: tensorboard failed (") and not trackers.open


@pytest.mark.parametrize("method", ["__init__", "log", "close"])
def test_a_bug_of_ours_is_no_fault_of_a_tracker(tmp_path, monkeypatch, method):
    monkeypatch.setattr(_TensorBoard, method, bug(trackers_module, "None.injected"))
    with pytest.raises(AttributeError, match="injected"):
        trackers = Trackers(["tensorboard"], tmp_path, "id", 0, {})
        trackers.log({"step": 1, "loss": 1.0})
        trackers.close()


def test_tensorboard_shows_the_rows(ground, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    interrupted(ground, out, "tensorboard")
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert {"loss", "lr", "memory_gib"} <= set(events.Tags()["scalars"])
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in shown] == [1, 2, 3, 4]  # what was done again is there once
    assert [value for _, value in shown] == pytest.approx([loss for _, loss, _ in runs.losses(out)])


def test_wandb_goes_on_as_the_same_run(ground, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_id = interrupted(ground, tmp_path / "out", "wandb")
    kept = sorted(path.name for path in (tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert len(kept) == 2 and all(name.endswith(f"-{run_id}") for name in kept)


def test_trackio_goes_on_as_the_same_run(ground, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run_id = interrupted(ground, tmp_path / "out", "trackio")
    assert list(SQLiteStorage.get_runs("fastft")) == [f"out-{run_id}"]
