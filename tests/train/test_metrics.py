"""What a run reports: the work done, and one curve whatever the interruptions."""

import json
import time

import numpy as np
import pytest
import torch
from helpers import models
from helpers.training import train_here
from transformers import AutoConfig

from fastft.cost.flops import attended_squares, attention_windows, training_flops
from fastft.cost.gpus import peak_flops
from fastft.train import loop
from fastft.train.report.metrics import Reporter, progress_line, read_metrics
from fastft.train.report.run_dir import write_facts
from fastft.train.report.trackers import Trackers


def test_flops_are_those_of_the_matrix_products():
    """One layer by hand: 2 FLOPs per multiply-add, forward once and backward twice, half of the attention square."""
    width, mlp, words, length, trained = 8, 20, 50, 10, 6
    projections = 4 * width * width + 3 * width * mlp
    attention = 2 * width * length * length / 2  # scores and values, causal
    by_hand = 3 * 2 * (projections * length + attention + width * words * trained)
    counted = training_flops(length, trained, length * length, 6 * projections, 6 * width * words, 1, width)
    assert counted == pytest.approx(by_hand)


def test_frozen_weights_and_unused_experts_cost_less(tmp_path):
    """A frozen weight has no gradient: 4 FLOPs per entry and token instead of 6. Each token uses two of three experts."""
    from fastft.config import LoraConfig
    from fastft.cost.flops import matrix_flops
    from fastft.model.build import TrainedModel, build_model
    from fastft.model.lora import add_adapters
    from fastft.model.pretrained import load_config

    def model(family: str, **options) -> TrainedModel:
        path = models.make_model(tmp_path / family, family, num_hidden_layers=1, **options)
        return TrainedModel(build_model(load_config(str(path)), "eager", family))

    size = lambda parameters: sum(p.numel() for p in parameters)  # noqa: E731
    llama = model("llama")
    whole, head = size(llama.blocks.parameters()), llama.causal_lm.lm_head.weight.numel()
    assert matrix_flops(llama) == (6 * whole, 6 * head)
    pytest.importorskip("peft", reason='peft is not installed: pip install "fastft[lora]"')
    add_adapters(llama.causal_lm, llama.blocks, LoraConfig(r=4), "llama", torch.float32)
    adapters = size(p for p in llama.blocks.parameters() if p.requires_grad)
    assert matrix_flops(llama) == (4 * whole + 6 * adapters, 4 * head) and 0 < adapters < whole

    mixtral = model("mixtral", num_local_experts=3, num_experts_per_tok=2)
    experts = size(p for name, p in mixtral.blocks.named_parameters() if ".experts." in name)
    assert experts == 3 * 3 * 32 * 64
    assert matrix_flops(mixtral)[0] == pytest.approx(6 * (size(mixtral.blocks.parameters()) - experts / 3))


def test_sliding_windows_are_counted_as_what_they_see():
    lengths = np.array([3, 10, 50])
    pairs = lambda window: sum(min(i, window) - 0.5 for n in lengths for i in range(1, n + 1))  # noqa: E731
    assert attended_squares(lengths, [None]) == 2 * pairs(99) == 9 + 100 + 2500
    assert attended_squares(lengths, [10]) == 9 + 100 + 2500 - 40**2 == pytest.approx(2 * pairs(10), rel=0.06)
    assert (
        attended_squares(lengths, [10, None])
        == (attended_squares(lengths, [10]) + attended_squares(lengths, [None])) / 2
    )
    mistral, gemma = (AutoConfig.for_model(name, sliding_window=24) for name in ("mistral", "gemma3_text"))
    assert attention_windows(mistral) == [24] and attention_windows(AutoConfig.for_model("llama")) == [None]
    assert (
        attention_windows(gemma)[:6] == [24] * 5 + [None] and len(attention_windows(gemma)) == gemma.num_hidden_layers
    )
    assert set(attention_windows(AutoConfig.for_model("qwen2"))) == {None}  # its 4,096 are not in use


def test_the_peak_is_that_of_the_device():
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GH200 480GB") == 989e12 and peak_flops("NVIDIA A10G") == 70e12
    assert peak_flops("some device") is peak_flops("NVIDIA RTX A1000") is peak_flops("NVIDIA L400") is None


def test_rows_after_the_checkpoint_are_removed_and_a_torn_last_line_too(tmp_path):
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
    _, earlier_s = write_facts(directory, {})
    reporter = Reporter(directory, start_step, 10, trackers, earlier_s=earlier_s, **options)
    for row in rows:
        reporter.step(row)
    reporter.close()


def without_time(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "elapsed_s"}


def test_time_and_money_count_over_all_starts_lost_steps_too(tmp_path):
    report(tmp_path, 0, ROW, ROW | {"step": 6}, price_per_hour=12.0, started=time.monotonic() - 3600)
    first = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert first["elapsed_s"] == pytest.approx(3600, abs=60) and first["cost"] == pytest.approx(12, abs=0.2)
    report(tmp_path, 0, ROW, price_per_hour=12.0, started=time.monotonic() - 1800)  # killed before its first checkpoint
    (again,) = read_metrics(tmp_path / "metrics.jsonl")
    assert again["elapsed_s"] == pytest.approx(5400, abs=60) and again["cost"] == pytest.approx(18, abs=0.3)
    report(tmp_path, 0)  # killed before its first step: its rows are gone, what was spent is not
    report(tmp_path, 5, ROW | {"step": 6})
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["elapsed_s"] >= again["elapsed_s"] and "cost" not in last


def test_a_clock_that_jumps_changes_neither_time_nor_money(ground, tmp_path, monkeypatch):
    """By a year, as machines do whose clock is set after they have started: $876,000 stood on a model card."""
    out, begun, now, train_step = tmp_path / "out", time.monotonic(), time.time, loop.train_step

    def jump(*given):
        monkeypatch.setattr(time, "time", lambda: now() + 365 * 86400)
        return train_step(*given)

    monkeypatch.setattr(loop, "train_step", jump)
    done = train_here(ground, out, "--max_steps", "4", "--price_per_hour", "100", "--trackers", "none")
    seconds = time.monotonic() - begun
    assert done.returncode == 0 and time.time() > now() + 364 * 86400, done.stderr
    rows = read_metrics(out / "metrics.jsonl")
    assert 0 < rows[-1]["elapsed_s"] < seconds and rows[-1]["cost"] == pytest.approx(100 * rows[-1]["elapsed_s"] / 3600)
    cost = f"| cost | ${rows[-1]['cost']:,.2f} |"
    assert cost in (out / "model/README.md").read_text()
    assert all("ETA 0:" in line for line in done.stderr.splitlines() if line.startswith("step "))


def test_the_line_says_what_is_known():
    row = {"step": 7, "loss": 1.25, "tokens_per_s": 80_000.0, "tokens": 98, "padding_tokens": 2, "mfu": 0.412}
    row |= {"processes": 8, "memory_gib": 71.26, "cost": 1234.5}
    assert progress_line(row, 100, 3725) == (
        "step 7/100  loss 1.2500  10,000 tokens/s per GPU  MFU 41.2%  98.0% full  71.3 GiB  ETA 1:02:05  $1,234.50"
    )
    assert progress_line(ROW, 10, 5) == "step 5/10  loss 0.5000  1 tokens/s  ETA 0:05"
