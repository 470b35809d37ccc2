"""What a run reports: work honestly counted, one curve whatever the interruptions."""

import json
import time

import pytest

from fastft.metrics import Reporter, peak_flops, progress_line, read_metrics, training_flops
from fastft.trackers import Trackers


def test_flops_are_those_of_the_matrix_products():
    """One layer by hand: 2 FLOPs per multiply-add, forward once and backward twice, half of the attention square."""
    width, mlp, words, length, trained = 8, 20, 50, 10, 6
    projections = 4 * width * width + 3 * width * mlp
    attention = 2 * width * length * length / 2  # scores and values, causal
    by_hand = 3 * 2 * (projections * length + attention + width * words * trained)
    counted = training_flops(length, trained, length * length, projections, width * words, 1, width)
    assert counted == pytest.approx(by_hand)


def test_the_peak_is_that_of_the_device():
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("some device") is None


def test_rows_behind_the_checkpoint_are_cut_and_a_torn_last_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1.0} for step in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "lo')
    assert read_metrics(path) == rows
    report(tmp_path, 4, ROW)
    assert [without_time(row) for row in read_metrics(path)] == [*rows[:4], ROW]
    report(tmp_path, 0, ROW)
    assert [without_time(row) for row in read_metrics(path)] == [ROW]


ROW = {"step": 5, "epoch": 0.5, "loss": 0.5, "grad_norm": 1.0, "lr": 0.1, "tokens_per_s": 1.0, "mfu": None}


def report(directory, start_step: int, *rows: dict, **options) -> None:
    trackers = Trackers([], directory, "id", start_step, {})
    reporter = Reporter(directory, start_step, 10, trackers, **options)
    for row in rows:
        reporter.step(row)
    reporter.close()


def without_time(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "elapsed_s"}


def test_time_and_money_count_over_all_starts_lost_steps_too(tmp_path):
    report(tmp_path, 0, ROW, ROW | {"step": 6}, price_per_hour=12.0, started=time.time() - 3600)
    first = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert first["elapsed_s"] == pytest.approx(3600, abs=60) and first["cost"] == pytest.approx(12, abs=0.2)
    report(tmp_path, 0, ROW, price_per_hour=12.0, started=time.time() - 1800)  # killed before its first checkpoint
    (again,) = read_metrics(tmp_path / "metrics.jsonl")
    assert again["elapsed_s"] == pytest.approx(5400, abs=60) and again["cost"] == pytest.approx(18, abs=0.3)
    report(tmp_path, 5, ROW | {"step": 6})
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["elapsed_s"] >= again["elapsed_s"] and "cost" not in last


def test_the_line_says_what_is_known():
    row = {"step": 7, "loss": 1.25, "tokens_per_s": 80_000.0, "tokens": 98, "padding_tokens": 2, "mfu": 0.412}
    row |= {"processes": 8, "memory_gib": 71.26, "cost": 1234.5}
    assert progress_line(row, 100, 3725) == (
        "step 7/100  loss 1.2500  10,000 tokens/s per GPU  MFU 41.2%  98.0% full  71.3 GiB  ETA 1:02:05  $1,234.50"
    )
    assert progress_line(ROW, 10, 5) == "step 5/10  loss 0.5000  1 tokens/s  ETA 0:05"
