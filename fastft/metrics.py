"""What a run reports: `metrics.jsonl`, TensorBoard, and one live line; and the arithmetic of work done.

Only rank 0 writes. After a resume, rows behind the checkpoint are cut off, so that the file is always one curve.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

# Dense bf16 peak in FLOP/s by a part of the device's name, from the vendors' data sheets; the first match counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    return next((flops for part, flops in PEAK_FLOPS.items() if part in device_name), None)


def training_flops(
    tokens: int, trained: int, squared_lengths: int, body: int, head: int, layers: int, width: int
) -> float:
    """FLOPs that a step needs, nothing credited for padding, recomputation or untrained positions' logits.

    Forward and backward: 6 per parameter and token in the blocks, 6 per head parameter and trained token, and causal
    attention within each conversation, 6 x layers x width x length^2 (half of the full square), `width` being heads x
    head size.
    """
    return 6.0 * body * tokens + 6.0 * head * trained + 6.0 * layers * width * squared_lengths


class Reporter:
    """Writes a run's rows. `start_step` is the step of the checkpoint from which the run goes on (0 for a new run)."""

    def __init__(self, output_dir: Path, start_step: int, total_steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.total, self.began, self.start_step = (
            output_dir / "metrics.jsonl",
            total_steps,
            time.time(),
            start_step,
        )
        _cut_after(self.path, start_step)
        self.file = self.path.open("a")
        self.tensorboard = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start_step + 1)
        self.live = sys.stderr.isatty()

    def step(self, row: dict[str, Any]) -> None:
        """One optimiser step's row."""
        self._write(row)
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            self.say(f"step {row['step']}: left out: loss {row['loss']}, norm of the gradient {row['grad_norm']}")
        if self.live or row["step"] % max(1, self.total // 20) == 0 or row["step"] == self.total:
            elapsed, done = time.time() - self.began, row["step"] - self.start_step
            remaining = elapsed / done * (self.total - row["step"])
            line = (
                f"step {row['step']}/{self.total}  epoch {row['epoch']:.2f}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
                f"{row['tokens_per_s']:,.0f} tokens/s  ETA {_clock(remaining)}"
            )
            print(f"\r{line}\x1b[K" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def evaluation(self, row: dict[str, Any]) -> None:
        """A held-out loss."""
        self._write(row)
        self.say(f"step {row['step']}/{self.total}  held-out loss {row['eval_loss']:.4f}")

    def say(self, line: str) -> None:
        print(f"\r{line}\x1b[K" if self.live else line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Durable up to here: called before a checkpoint of the same step is published."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.live:
            print(file=sys.stderr)
        self.flush()
        self.file.close()
        self.tensorboard.close()

    def _write(self, row: dict[str, Any]) -> None:
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.file.write(json.dumps(numbers) + "\n")  # JSON knows no NaN
        for name, value in row.items():
            if name != "step" and value is not None:
                self.tensorboard.add_scalar(name, value, row["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _cut_after(path: Path, step: int) -> None:
    if path.exists():
        rows = [row for row in read_metrics(path) if row["step"] <= step]
        partial = path.with_name(path.name + ".tmp")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(partial, path)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
