"""Runs of the trainer for tests: their flags, processes, losses and weights."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import torch
from helpers import forks
from safetensors.torch import load_file

from fastft.data.dataset import tokenized
from fastft.data.step_plan import StepPlan
from fastft.data.template.chat_template import load_template
from fastft.train.report.metrics import read_metrics

HERE = Path(__file__).parent


def flags(ground: Path, out: Path, *more: str) -> list[str]:
    return [
        "--model", str(ground / "model"), "--data", str(ground / "data.jsonl"), "--output_dir", str(out),
        "--seq_len", "160", "--global_batch_size", "4", "--optimizer.lr", "1e-2", *more,
    ]  # fmt: skip


def command(processes: int, target: list[str]) -> list[str]:
    ranks = [str(HERE / "ranks.py"), str(processes)] if processes > 1 else []
    return [sys.executable, *ranks, *target]


def run(arguments: list[str], **options) -> subprocess.CompletedProcess:
    """A command of Python to its end, in a process of its own."""
    assert arguments[0] == sys.executable
    return forks.run(arguments[1:], **options)


def torchrun(*more: str) -> list[str]:
    """torchrun with two processes on this machine, before a script or `-m MODULE`."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *more]


def train(ground: Path, out: Path, *more: str, processes: int = 1) -> subprocess.CompletedProcess:
    return run(command(processes, ["-m", "fastft.train", *flags(ground, out, *more)]))


def losses(out: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(out / "metrics.jsonl") if "loss" in r]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def assert_gradients_agree(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal to 1e-5 of each gradient's largest entry, in fp32."""
    assert a.keys() == b.keys()
    for name in a:
        scale = a[name].abs().max()
        assert scale > 0, name
        assert (a[name] - b[name]).abs().max() <= 1e-5 * scale, name


def plain_gradients(model_dir: Path, data_file: Path, seq_len: int, z_loss: float = 0.0) -> dict[str, torch.Tensor]:
    """transformers' own unpacked forward and backward in fp64, one conversation at a time, over the same first step.

    "loss" is the cross entropy alone, gradients are those of cross entropy and z-loss.
    """
    from transformers import AutoModelForCausalLM

    data = tokenized(str(data_file), load_template(str(model_dir)))
    rows = StepPlan(data, seq_len, 0, 1, 4, None).step(1).rows
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, attn_implementation="eager")
    conversations = [c for row in rows for c in row]
    trained = sum(int(data.trained_counts[c]) for c in conversations)
    total = 0.0
    for c in conversations:
        ids = torch.tensor(data.ids[c], dtype=torch.int64)[None]
        logits = model(input_ids=ids).logits[0, :-1]
        wanted = torch.from_numpy(data.trained[c][1:].copy())
        loss = torch.nn.functional.cross_entropy(logits[wanted], ids[0, 1:][wanted], reduction="sum") / trained
        (loss + z_loss * logits[wanted].logsumexp(-1).square().sum() / trained).backward()
        total += loss.item()
    named = {f"causal_lm.{name}": p.grad for name, p in model.named_parameters()}
    return {"loss": torch.tensor(total), **named}


def plain_loss(model, ground: Path) -> float:
    """Mean loss of a transformers (or peft) model per trained token, one conversation at a time, nothing packed."""
    data = tokenized(str(ground / "data.jsonl"), load_template(str(ground / "model")))
    total = 0.0
    with torch.no_grad():
        for ids, trained in zip(data.ids, data.trained):
            ids, wanted = torch.tensor(ids, dtype=torch.int64), torch.from_numpy(trained[1:].copy())
            logits = model.eval()(input_ids=ids[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits[wanted], ids[1:][wanted], reduction="sum"))
    return total / int(data.trained_counts.sum())


def fails(done: subprocess.CompletedProcess, *says: str) -> None:
    """Assert that the process ended with one line that says what, where and what to do, and with exit code 1."""
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr
    for text in says:
        assert text in lines[0]


def train_here(ground: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    """`fastft train` in this process, as the command would end: ten starts of Python would take a minute."""
    return here(["train", *flags(ground, out, *more)])


def here(argv: list[str]) -> subprocess.CompletedProcess:
    """A verb of `fastft` in this process: its exit code and what it said on stderr."""
    from fastft.cli import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(argv)
    return subprocess.CompletedProcess(argv, code, "", said.getvalue())
