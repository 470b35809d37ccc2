"""Report what a run does: rows of numbers in `metrics.jsonl` and in its trackers, and one live line in the terminal.

Only rank 0 writes. When a run continues from a checkpoint, the rows after the checkpoint's step are removed, so that the file
is always one curve.
"""

import json
import logging
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.common import logs
from fastft.common.files import room_for, write_whole
from fastft.cost.flops import training_flops
from fastft.cost.gpus import peak_flops
from fastft.train.report.trackers import Trackers

if TYPE_CHECKING:
    import torch

    from fastft.model.build import TrainedModel

logger = logging.getLogger(__name__)


def peak_memory_gib(device: "torch.device") -> float:
    """The peak memory of this process so far in GiB: that of its tensors on a GPU, otherwise its resident set."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def step_rows(
    pending: list[dict], seconds: float, model: "TrainedModel", matrices: tuple[float, float], device: "torch.device"
) -> list[dict[str, Any]]:
    """Make the rows of metrics.jsonl for the `pending` steps since the last report, which took `seconds` together.

    `matrices` is the result of fastft.cost.flops.matrix_flops. The host waits for the device here, once for all steps.
    """
    import torch
    import torch.distributed as dist

    measured = torch.stack([p["measured"] for p in pending]).tolist()
    config, processes = model.causal_lm.config, dist.get_world_size()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    step_time = seconds / len(pending)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    memory = peak_memory_gib(device)
    rows = []
    for p, (loss, z_loss, norm) in zip(pending, measured):
        flops = training_flops(
            p["tokens"], p["trained_tokens"], p["squared_lengths"], *matrices, config.num_hidden_layers, width
        )
        rows.append(
            {
                "step": p["number"],
                **({"stage": p["stage"]} if "stage" in p else {}),
                "epoch": p["epoch"],
                "loss": loss,
                **({"z_loss": z_loss} if model.z_loss else {}),
                "lr": p["lr"],
                "grad_norm": norm,
                "tokens": p["tokens"],
                "trained_tokens": p["trained_tokens"],
                "padding_tokens": p["padding_tokens"],
                "tokens_per_s": p["tokens"] / step_time,
                "step_time_s": step_time,
                "mfu": flops / step_time / (peak * processes) if peak else None,
                "memory_gib": memory,
                "processes": processes,
            }
        )
    return rows


class Reporter:
    """Writes a run's rows.

    `start_step` is the step of the checkpoint from which the run continues, 0 for a new run. `started` is the
    time.monotonic() at which this start of the run began (the time of day may jump), and `earlier_s` the seconds that its
    earlier starts took. Each row says in `elapsed_s` how long the run has taken over all its starts, including the work that
    interruptions lost. With `price_per_hour`, it says in `cost` what that time has cost.
    """

    def __init__(
        self,
        output_dir: Path,
        start_step: int,
        total_steps: int,
        trackers: Trackers,
        price_per_hour: float | None = None,
        started: float | None = None,
        earlier_s: float = 0.0,
    ):
        self.path, self.total, self.start_step = output_dir / "metrics.jsonl", total_steps, start_step
        self.trackers, self.price, self.began = trackers, price_per_hour, time.monotonic()
        # The time at which the run would have begun if there had been no pauses between its starts.
        self.counted_from = (self.began if started is None else started) - earlier_s
        cut_after(self.path, start_step)
        self.file = self.path.open("a", buffering=1)  # line by line, so that others can follow the run

    def step(self, row: dict[str, Any]) -> None:
        """Write the row of an optimizer step."""
        row = row | self._spent()
        self._write(row)
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            logger.warning(f"step {row['step']}: skipped: loss {row['loss']}, gradient norm {row['grad_norm']}")
        elapsed, done = time.monotonic() - self.began, row["step"] - self.start_step
        line = progress_line(row, self.total, elapsed / done * (self.total - row["step"]))
        if sys.stderr.isatty():
            logs.show_live(line)
        elif row["step"] % max(1, self.total // 20) == 0 or row["step"] == self.total:
            logger.info(line)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Write the row of a held-out loss."""
        self._write(row | self._spent())
        logger.info(f"step {row['step']}/{self.total}  held-out loss {row['eval_loss']:.4f}")

    def flush(self) -> None:
        """Make all rows so far durable, which is done before the checkpoint of the same step is published."""
        with room_for(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """End the live line, the file and the trackers."""
        logs.show_live(None)
        self.flush()
        self.file.close()
        self.trackers.close()

    def _spent(self) -> dict[str, float]:
        elapsed = time.monotonic() - self.counted_from
        return {"elapsed_s": elapsed, **({} if self.price is None else {"cost": self.price * elapsed / 3600})}

    def _write(self, row: dict[str, Any]) -> None:
        # JSON has no NaN and no infinity.
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = json.dumps(numbers) + "\n"
        with room_for(self.path, len(line)):
            self.file.write(line)
        self.trackers.log(row)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl or samples.jsonl. A last line that was cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def cut_after(path: Path, step: int) -> None:
    """Remove the rows after `step` from a file of rows; after step 0 all rows are removed, those of step 0 included."""
    if path.exists():
        rows = [row for row in read_metrics(path) if step and row["step"] <= step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def progress_line(row: dict[str, Any], total: int, remaining: float) -> str:
    """Describe a step in one line for people, leaving out unknown values. `remaining` is in seconds."""
    processes = row.get("processes", 1)
    known = row.get("mfu") is not None
    each = " per GPU" if known else " per process" if processes > 1 else ""
    places = row.get("tokens", 0) + row.get("padding_tokens", 0)
    parts = [
        f"step {row['step']}/{total}",
        f"loss {row['loss']:.4f}",
        f"{row['tokens_per_s'] / processes:,.0f} tokens/s{each}",
        f"MFU {row['mfu']:.1%}" if known else "",
        f"{row['tokens'] / places:.1%} full" if places else "",
        f"{row['memory_gib']:.1f} GiB" if "memory_gib" in row else "",
        f"ETA {_clock(remaining)}",
        f"${row['cost']:,.2f}" if "cost" in row else "",
    ]
    return "  ".join(filter(None, parts))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
