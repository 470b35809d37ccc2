"""Golden runs: losses and gradient norms of 20 steps, written down, so that no change moves them without being seen.

Tiny models of four families, made from a seed, trained by the trainer itself in fp32 on one thread; compared to 1e-6
relative, which other processors keep: without AVX they differ by up to 2e-7, under torch 2.11 not at all. When a change is
meant to move them, write them anew, and say in the commit why they moved:

    python tests/model/test_golden.py
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import models

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("llama", "qwen3", "mistral", "gemma")


def losses_and_norms(family: str, work: Path) -> list[list[float]]:
    """[loss, norm of the gradient] of each of 20 steps."""
    from fastft.cli import main
    from fastft.train.report.metrics import read_metrics

    models.make_model(work / "model", family)
    models.make_data(work / "data.jsonl", conversations=40, seed=1)
    arguments = [
        "train", "--model", work / "model", "--data", work / "data.jsonl", "--output_dir", work / "out", "--max_steps", 20,
        "--seq_len", 160, "--global_batch_size", 4, "--epochs", 9, "--optimizer.lr", 1e-3, "--optimizer.weight_decay", 0.1,
        "--checkpoint.every", 0,
    ]  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        torch.set_num_threads(threads)
    return [[row["loss"], row["grad_norm"]] for row in read_metrics(work / "out" / "metrics.jsonl")]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_norms_are_the_golden_ones(family, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFT_CACHE", str(tmp_path / "cache"))
    golden = json.loads((GOLDEN / f"{family}.json").read_text())
    found = losses_and_norms(family, tmp_path)
    assert len(golden) == len(found) == 20
    for step, (wanted, got) in enumerate(zip(golden, found), 1):
        assert got == pytest.approx(wanted, rel=1e-6), f"step {step}"
    assert found[-1][0] < found[0][0]


def test_a_model_learns_four_conversations_by_heart(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFT_CACHE", str(tmp_path / "cache"))
    models.make_model(tmp_path / "model")
    models.make_data(tmp_path / "data.jsonl", conversations=4)
    from fastft.cli import main
    from fastft.train.report.metrics import read_metrics

    arguments = [
        "train", "--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--output_dir", tmp_path / "out",
        "--seq_len", 160, "--global_batch_size", 1, "--epochs", 60, "--optimizer.lr", 1e-2, "--checkpoint.every", 0,
    ]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["loss"] < 0.05


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as work, contextlib.redirect_stderr(io.StringIO()):
            os.environ["FASTFT_CACHE"] = f"{work}/cache"
            rows = losses_and_norms(name, Path(work))
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        (GOLDEN / f"{name}.json").write_text(f"[\n{lines}\n]\n")
        print(f"{name}: loss {rows[0][0]:.4f} -> {rows[-1][0]:.4f}", file=sys.stdout)
