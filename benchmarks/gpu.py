"""Everything that docs/LOG.md wants from one GPU, in ten minutes: speed, MFU, memory, float8, TRL, the formula for memory.

    python benchmarks/gpu.py [--trl DIR] [--minutes 10] [--out gpu.txt]
    python benchmarks/gpu.py --rehearse          the same commands on a small model, CPU too: does each of them run?

Runs benchmarks/train.py and benchmarks/memory.py one after the other and the GPU's test, the most telling first; what does not
fit into the time is named as left out. Weights are random. Goals on an H200: Llama-2-7B at 2,048 11,000 tokens/s and 50 %
MFU, with float8 16,000; Llama-3.2-1B 50,000; 1.5 times TRL.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
TRAIN = [HERE / "train.py", "--gradient_checkpointing", "selective"]


def commands(rehearse: bool, trl: Path | None) -> list[list]:
    large, small = ("small", "small") if rehearse else ("llama-7b", "llama-1b")
    steps, ours = ("4" if rehearse else "12"), ["--only", "fastft"]
    window, long = ("256", "512") if rehearse else ("2048", "8192")
    others = ["--trl", trl, "--only", "trl", "--only", "trl packing"] if trl else ["--only", "padded"]
    return [
        [*TRAIN, "--shape", small, "--window", window, "--rows", "8", "--micro", "4", "--steps", steps, *ours, *others],
        [*TRAIN, "--shape", large, "--window", window, "--rows", "8", "--micro", "4", "--steps", steps, *ours],
        [*TRAIN, "--shape", large, "--window", window, "--rows", "8", "--micro", "4", "--steps", steps, "--float8",
         "--only", "fastft float8"],
        ["-m", "pytest", "-q", "-rs", HERE.parent / "tests/test_gpu.py"],
        [*TRAIN, "--shape", small, "--window", long, "--rows", "4", "--micro", "1", "--steps", steps, *ours],
        [*TRAIN, "--shape", large, "--window", long, "--rows", "2", "--micro", "1", "--steps", steps, *ours],
        [HERE / "memory.py"],
        [*TRAIN, "--shape", large, "--window", window, "--rows", "8", "--micro", "2", "--steps", steps, *others],
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=Path("gpu.txt"))
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    ends, failed = time.monotonic() + 60 * options.minutes - 15, 0
    with options.out.open("w") as out:
        for command in commands(options.rehearse, options.trl):
            said = " ".join(str(part) for part in command).replace(f"{HERE.parent}/", "")
            left = ends - time.monotonic()
            try:
                done = subprocess.run(
                    [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=max(left, 0.1)
                )
                text, code = done.stdout + done.stderr[-2000:] * bool(done.returncode), done.returncode
            except subprocess.TimeoutExpired:
                text, code = "left out: no time", 0
            failed += bool(code)
            for stream in (out, sys.stdout):
                print(f"$ python {said}\n{text.strip()}\n", file=stream, flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
