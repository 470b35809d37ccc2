"""Everything that docs/log/2026-11.md wants from one GPU, in ten minutes: speed, MFU, float8 and its losses, TRL, kernels, memory.

    python benchmarks/gpu.py [--trl DIR] [--minutes 10] [--out gpu.txt]
    python benchmarks/gpu.py --dry_run_steps          the same commands on a small model, CPU too: does each of them run?

Runs benchmarks/train.py and benchmarks/memory.py one after the other and the GPU's test, the most telling first, each with a
limit of its own; what was cut off, or did not fit into the time, is named and makes the exit code 1. Weights are random, made
once a shape: 16 GB of disk. An H200 is meant: Llama-2-7B takes 119 GiB by `fastft estimate`, and is left out by name where the
GPU has less. Goals there: Llama-2-7B at 2,048 11,000 tokens/s and 50 % MFU, with float8 16,000; Llama-3.2-1B 50,000; 1.5 times
TRL.

On a machine with only torch 2.11 and transformers 5.17, Python 3.12, and no package index: fetch these wheels elsewhere and
carry them there. The first four are the trainer's, torchao is for float8 (0.17 and later are made for torch 2.11 and later),
the rest is TRL's; add what else it lacks of lxml, pandas, psutil, pyarrow, pytest, rich, tensorboard and xxhash.

    WHEELS="docstring-parser jsonargparse orjson zstandard torchao==0.18.0 trl==1.16.0 accelerate datasets dill multiprocess"
    pip download --dest wheels --no-deps --only-binary :all: --python-version 3.12 --platform manylinux2014_x86_64 \\
        --platform manylinux_2_28_x86_64 $WHEELS
    pip install --target site --no-deps --no-index --find-links wheels $WHEELS
    PYTHONPATH=.:site python benchmarks/gpu.py --trl site
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
TRAIN = [HERE / "train.py", "--gradient_checkpointing", "selective"]
LARGE_GIB = 120  # 7B, selective, 8,192 tokens at a time: 118.75 GiB by fastft.cost.memory


def commands(dry_run_steps: bool, models: Path, trl: Path | None, on_gpu: bool) -> list[tuple[int, list]]:
    """(limit in seconds, what to run), the most telling first."""
    large, small = ("small", "small") if dry_run_steps else ("llama-7b", "llama-1b")
    window, long, steps = ("256", "512", "4") if dry_run_steps else ("2048", "8192", "12")
    ours, float8 = ["--only", "fastft"], ["--only", "fastft float8"] if on_gpu else []
    others = ["--trl", trl, "--only", "trl packing", "--only", "trl"] if trl else ["--only", "padded"]

    def train(shape: str, window: str, rows: str, micro: str, *contestants) -> list:
        sizes = ["--shape", shape, "--seq_len", window, "--rows", rows, "--micro", micro, "--steps", steps]
        return [*TRAIN, "--model", models / shape, *sizes, *contestants]

    memory = ["--seq_len", "256"] if dry_run_steps else ["--shape", "llama-7b", "--shape", "llama-1b", "--layers", "4"]
    return [
        (280, train(large, window, "8", "4", *ours, "--profile", *float8, *others)),
        (120, train(small, window, "8", "4", *ours, "--profile", *others)),
        (90, ["-m", "pytest", "-q", "-rs", HERE.parent / "tests/model/test_gpu.py"]),
        (100, train(large, long, "2", "1", *ours)),
        (60, train(small, long, "4", "1", *ours)),
        (60, [HERE / "memory.py", *memory]),
    ]


def run(command: list, limit: float) -> tuple[str, int]:
    """(what it said, exit code), whatever it started ended with it: an orphan would keep the GPU's memory."""
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
    """Memory of the first GPU, 0 without one; asked in a process that does not stay on it."""
    code = "import torch; print(torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout or 0) / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=Path("gpu.txt"))
    parser.add_argument("--dry_run_steps", action="store_true")
    options = parser.parse_args()
    ends, failed, room = time.monotonic() + 60 * options.minutes - 15, 0, gpu_gib()
    patience = 2 if options.dry_run_steps else 1  # with a CPU
    with options.out.open("w") as out, tempfile.TemporaryDirectory() as models:
        for limit, command in commands(options.dry_run_steps, Path(models), options.trl, room > 0):
            left = ends - time.monotonic()
            if "llama-7b" in command and TRAIN[0] in command and room < LARGE_GIB:
                text, code = f"left out: llama-7b takes {LARGE_GIB} GiB, this GPU has {room:.0f}", 1
            elif left < 10:
                text, code = "left out: no time", 1
            else:
                text, code = run(command, min(patience * limit, left))
            failed += bool(code)
            said = " ".join(map(str, command)).replace(f"{HERE.parent}/", "").replace(models, "MODELS")
            for stream in (out, sys.stdout):
                print(f"$ python {said}\n{text.strip()}\n", file=stream, flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
