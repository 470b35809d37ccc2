"""The time, memory and error of four ways to compute the output head, the cross entropy and their gradients.

    python benchmarks/loss.py [--positions 2048] [--width 512] [--vocabulary 16384] [--dtype float32] [--chunk 256]

It runs on a GPU if there is one, and then measures its peak memory; else it measures the seconds of one CPU core. Errors are
those of the loss and of both gradients, compared with fp64: the norm of the difference, relative.
"""

import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastft.common.command_line import parse, run
from fastft.model.loss import summed_cross_entropy


def whole(hidden: Tensor, targets: Tensor, head: nn.Linear, chunk: int) -> Tensor:
    """All logits at once."""
    return F.cross_entropy(head(hidden).to(wide(hidden)), targets, reduction="sum")


def checkpointed(hidden: Tensor, targets: Tensor, head: nn.Linear, chunk: int) -> Tensor:
    """In chunks, whose logits are computed again in the backward pass."""
    pairs = zip(hidden.split(chunk), targets.split(chunk))
    return torch.stack([checkpoint(whole, h, t, head, chunk, use_reentrant=False) for h, t in pairs]).sum()


def pytorch(hidden: Tensor, targets: Tensor, head: nn.Linear, chunk: int) -> Tensor:
    """PyTorch's own operator (torch >= 2.13) with its default options."""
    return F.linear_cross_entropy(
        hidden, head.weight, targets, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
    )


def ours(hidden: Tensor, targets: Tensor, head: nn.Linear, chunk: int) -> Tensor:
    return summed_cross_entropy(hidden, targets, head, chunk=chunk)[0]


def wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass
class LossConfig:
    """Sizes to measure with."""

    positions: int = 2048
    width: int = 512
    vocabulary: int = 16384
    dtype: Literal["float32", "bfloat16"] = "float32"
    chunk: int = 256
    """Positions whose logits exist at a time, where a way has chunks."""


def main() -> None:
    [options] = parse(sys.argv[1:], "benchmarks/loss.py", __doc__.splitlines()[0], LossConfig)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.positions, options.width, device=device).to(dtype)
    head = nn.Linear(options.width, options.vocabulary, bias=False, device=device, dtype=dtype)
    targets = torch.randint(0, options.vocabulary, (options.positions,), device=device)
    exact_head = nn.Linear(options.width, options.vocabulary, bias=False, device=device, dtype=torch.float64)
    exact_head.weight.data = head.weight.data.double()
    exact, _, _ = measure(whole, hidden.double(), targets, exact_head, options.chunk)

    table = Table("way", "seconds", "peak MiB", "error: loss", "hidden", "weight")
    for way in (whole, checkpointed, *([pytorch] if hasattr(F, "linear_cross_entropy") else []), ours):
        runs = [measure(way, hidden, targets, head, options.chunk) for _ in range(3)]
        found, _, peak = runs[0]
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact)]
        seconds = min(run[1] for run in runs)
        table.add_row(way.__name__, f"{seconds:.3f}", f"{peak:,.0f}" if peak else "-", *(f"{e:.1e}" for e in errors))
    Console().print(table)


def measure(way, hidden: Tensor, targets: Tensor, head: nn.Linear, chunk: int) -> tuple[list[Tensor], float, float]:
    """([loss, gradients], seconds, peak of GPU memory in MiB above what was allocated before)."""
    hidden = hidden.detach().clone().requires_grad_()
    cuda = hidden.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    clock = time.perf_counter if cuda else time.process_time  # a CPU may be shared
    began = clock()
    loss = way(hidden, targets, head, chunk)
    gradients = torch.autograd.grad(loss, [hidden, head.weight])
    if cuda:
        torch.cuda.synchronize()
    seconds = clock() - began
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else 0.0
    return [loss.detach(), *gradients], seconds, peak


if __name__ == "__main__":
    raise SystemExit(run(main))
