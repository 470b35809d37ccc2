"""What a run reports: work honestly counted, one curve whatever the interruptions."""

import json

import pytest

from fastft.metrics import Reporter, peak_flops, read_metrics, training_flops


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
    reporter = Reporter(tmp_path, 4, 10)
    row = {"step": 5, "epoch": 0.5, "loss": 0.5, "grad_norm": 1.0, "lr": 0.1, "tokens_per_s": 1.0, "mfu": None}
    reporter.step(row)
    reporter.close()
    assert read_metrics(path) == [*rows[:4], row]
