"""Measure on one GPU, in ten minutes, all that docs/log/2026-11.md reports: speed, MFU, float8, TRL, kernels and memory.

    python benchmarks/gpu.py [--trl DIR] [--minutes 10] [--out gpu.txt]
    python benchmarks/gpu.py --dry_run     # the same commands on a small model, on a CPU too, to see that each of them runs

It runs benchmarks/train.py, benchmarks/memory.py and the GPU's tests one after the other, the most telling first, each with a
time limit. What was cut off, or did not fit into the time, is named and makes the exit code 1. Weights are random and made once
for each shape; they take 16 GB of disk. It is meant for an H200: Llama-2-7B takes 119 GiB by `fastft estimate`, and is left out,
with a line that says so, on a GPU with less. The goals there: Llama-2-7B at 2,048 tokens 11,000 tokens/s and 50 % MFU, and with
float8 16,000 tokens/s; Llama-3.2-1B 50,000 tokens/s; 1.5 times TRL.

For a machine that has only torch 2.11, transformers 5.17 and Python 3.12, and no package index, download these wheels elsewhere
and copy them. The first four are the trainer's, torchao is for float8 (0.17 and later are built for torch 2.11 and later), and
the rest is TRL's; add what else the machine lacks of lxml, pandas, psutil, pyarrow, pytest, rich, tensorboard and xxhash.

    WHEELS="docstring-parser jsonargparse orjson zstandard torchao==0.18.0 trl==1.16.0 accelerate datasets dill multiprocess"
    pip download --dest wheels --no-deps --only-binary :all: --python-version 3.12 --platform manylinux2014_x86_64 \\
        --platform manylinux_2_28_x86_64 $WHEELS
    pip install --target site --no-deps --no-index --find-links wheels $WHEELS
    PYTHONPATH=.:site python benchmarks/gpu.py --trl site
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fastft.common.command_line import parse, run

HERE = Path(__file__).parent
TRAIN = [HERE / "train.py", "--gradient_checkpointing", "selective"]
LARGE_GIB = 120  # 7B, selective, 8,192 tokens at a time: 118.75 GiB by fastft.cost.memory


@dataclass
class GpuBenchmark:
    """Options of this benchmark."""

    trl: Path | None = None
    """Where TRL is installed, to measure it, too."""
    minutes: float = 10.0
    """Time for everything together."""
    out: Path = Path("gpu.txt")
    """A file for what is printed."""
    dry_run: bool = False
    """Run the same commands on a small model, to see that each of them runs."""


def commands(dry_run: bool, models: Path, trl: Path | None, on_gpu: bool) -> list[tuple[int, list]]:
    """Return (time limit in seconds, command of Python) of everything to run, the most telling first."""
    large, small = ("small", "small") if dry_run else ("llama-7b", "llama-1b")
    usual, long, steps = ("256", "512", "4") if dry_run else ("2048", "8192", "12")
    ours, float8 = ["--only", "fastft"], ["--only", "fastft float8"] if on_gpu else []
    others = ["--trl", trl, "--only", "trl packing", "--only", "trl"] if trl else ["--only", "padded"]

    def train(shape: str, seq_len: str, rows: str, micro: str, *contestants) -> list:
        sizes = ["--shape", shape, "--seq_len", seq_len, "--rows", rows, "--micro", micro, "--steps", steps]
        return [*TRAIN, "--model", models / shape, *sizes, *contestants]

    memory = ["--seq_len", "256"] if dry_run else ["--shape", "llama-7b", "--shape", "llama-1b", "--layers", "4"]
    return [
        (280, train(large, usual, "8", "4", *ours, "--profile", *float8, *others)),
        (120, train(small, usual, "8", "4", *ours, "--profile", *others)),
        (90, ["-m", "pytest", "-q", "-rs", HERE.parent / "tests/model/test_gpu.py"]),
        (100, train(large, long, "2", "1", *ours)),
        (60, train(small, long, "4", "1", *ours)),
        (60, [HERE / "memory.py", *memory]),
    ]


def run_for(command: list, limit: float) -> tuple[str, int]:
    """Run a command; return its output and exit code. Its process group ends with it: an orphan would hold GPU memory."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, wrong = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, wrong = process.communicate()
        return f"{said}{wrong[-2000:]}\ncut off after {limit:.0f} s", 1
    return said + wrong[-2000:] * bool(process.returncode), process.returncode


def gpu_gib() -> float:
    """Return the memory of the first GPU, or 0 without one. A process of its own asks, because it would stay on the GPU."""
    code = "import torch; print(torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout or 0) / 2**30


def main() -> int:
    [options] = parse(sys.argv[1:], "benchmarks/gpu.py", __doc__.splitlines()[0], GpuBenchmark)
    ends, failed, room = time.monotonic() + 60 * options.minutes - 15, 0, gpu_gib()
    patience = 2 if options.dry_run else 1  # a CPU is slower
    with options.out.open("w") as out, tempfile.TemporaryDirectory() as models:
        for limit, command in commands(options.dry_run, Path(models), options.trl, room > 0):
            left = ends - time.monotonic()
            if "llama-7b" in command and TRAIN[0] in command and room < LARGE_GIB:
                text, code = f"left out: llama-7b takes {LARGE_GIB} GiB, this GPU has {room:.0f}", 1
            elif left < 10:
                text, code = "left out: no time", 1
            else:
                text, code = run_for(command, min(patience * limit, left))
            failed += bool(code)
            said = " ".join(map(str, command)).replace(f"{HERE.parent}/", "").replace(models, "MODELS")
            for stream in (out, sys.stdout):
                print(f"$ python {said}\n{text.strip()}\n", file=stream, flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(run(main))
