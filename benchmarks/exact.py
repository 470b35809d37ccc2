"""How equal gradients and losses are across packing, ranks, accumulation, gradient checkpointing, and interruption.

    python benchmarks/exact.py

A tiny Llama on CPU in fp32. The first table holds the largest difference of any gradient entry, relative to the largest
entry of that gradient; the second compares an uninterrupted run with one that was killed (SIGKILL) after every published
checkpoint and started again.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from helpers import gradients, models  # noqa: E402
from helpers import training as runs  # noqa: E402

from fastft.common.command_line import parse, run  # noqa: E402
from fastft.data.step_plan import StepPlan  # noqa: E402


def main() -> None:
    parse(sys.argv[1:], "benchmarks/exact.py", __doc__.splitlines()[0])  # it has no options
    console = Console()
    with tempfile.TemporaryDirectory() as work:
        os.environ["FASTFT_CACHE"] = f"{work}/cache"
        ground = Path(work)
        models.make_model(ground / "model")
        models.make_data(ground / "data.jsonl")
        console.print(compare_gradients(ground))
        console.print(compare_interruptions(ground))


def compare_gradients(ground: Path) -> Table:
    flags = lambda *more: runs.flags(ground, ground / "out", *more)  # noqa: E731
    base = gradients.first_gradients(flags())
    table = Table(
        "against 1 process x 4 micro-batches, packed, gradient checkpointing on", "largest relative difference", "loss"
    )
    table.add_row("itself", "0", f"{base['loss']:.7f}")

    def row(name: str, other: dict[str, torch.Tensor]) -> None:
        worst = max(float((base[k] - other[k]).abs().max() / base[k].abs().max()) for k in base)
        table.add_row(name, f"{worst:.1e}", f"{other['loss']:.7f}")

    row("1 micro-batch of 4 rows", gradients.first_gradients(flags("--micro_batch_size", "4")))
    row("gradient checkpointing off", gradients.first_gradients(flags("--gradient_checkpointing", "false")))
    plain = runs.plain_gradients(ground / "model", ground / "data.jsonl", 160)
    row("transformers, unpacked, fp64", {k: v.float() for k, v in plain.items()})
    for processes in (2, 4):
        out = ground / f"{processes}.pt"
        target = [str(TESTS / "helpers" / "gradients.py"), str(out), *flags()]
        subprocess.run(runs.command(processes, target), check=True, capture_output=True, cwd=TESTS)
        row(f"{processes} processes x {4 // processes}", torch.load(out, weights_only=True))
    plan = StepPlan.plan
    StepPlan.plan = lambda self, epoch: [row[i : i + 1] for row in plan(self, epoch)[:4] for i in range(len(row))]
    row("one conversation a row", gradients.first_gradients(flags("--global_batch_size", "100")))
    StepPlan.plan = plan
    return table


def compare_interruptions(ground: Path) -> Table:
    arguments = ("--checkpoint.every", "4")
    whole, cut = ground / "whole", ground / "cut"
    runs.train(ground, whole, *arguments)
    kills = 0
    command = runs.command(1, ["-m", "fastft.train", *runs.flags(ground, cut, *arguments)])
    for target in (4, 8):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (cut / "checkpoints" / f"step-{target:08d}").exists():
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    runs.run(command)
    equal = all(torch.equal(t, runs.weights(cut)[name]) for name, t in runs.weights(whole).items())
    table = Table(f"killed {kills} times, then finished", "bit-identical")
    table.add_row("loss and gradient norm of every step", str(runs.losses(whole) == runs.losses(cut)))
    table.add_row("final weights", str(equal))
    return table


if __name__ == "__main__":
    sys.exit(run(main))
