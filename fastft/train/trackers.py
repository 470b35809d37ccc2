"""Where a run's numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio, each imported when it is named.

    --trackers tensorboard,wandb

A run that goes on after an interruption goes on as the same run there: its id is kept in OUTPUT_DIR/run.json. Project and
account are the libraries' own affair (WANDB_PROJECT, WANDB_MODE, WANDB_API_KEY, TRACKIO_PROJECT, …): no key is ever read or
shown here. A tracker that fails while training goes on is given up with a line; metrics.jsonl has all the numbers.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fastft.errors import UserError


class Tracker(Protocol):
    def log(self, row: dict[str, Any]) -> None:
        """Numbers by name, with their "step"."""

    def close(self) -> None: ...


def tracker_names(trackers: str) -> list[str]:
    """The names in a list with commas; none stands for none. Raises UserError where a package is missing."""
    names = [name for name in dict.fromkeys(each.strip() for each in trackers.split(",")) if name != "none"]
    for name in names:
        if importlib.util.find_spec(name) is None:  # each is its package's name
            raise UserError(
                f"trackers: {name} is not installed (pip install {name}); leave it out, or say --trackers none"
            )
    return names


class Trackers:
    """All of a run's trackers. `start_step` is the step of the checkpoint from which the run goes on."""

    def __init__(self, names: list[str], output_dir: Path, run_id: str, start_step: int, settings: dict[str, Any]):
        """Raises UserError where a tracker does not start, because nobody is logged in, say."""
        kinds = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
        self.open: dict[str, Tracker] = {}
        for name in names:
            try:
                self.open[name] = kinds[name](output_dir, run_id, start_step, settings)
            except Exception as error:  # the libraries' own kinds
                raise UserError(f"trackers: {name} did not start ({first_line(error)})") from None

    def log(self, row: dict[str, Any]) -> None:
        numbers = {name: value for name, value in row.items() if value is not None}
        self._each(lambda tracker: tracker.log(numbers))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                call(tracker)
            except Exception as error:  # a full disk, a server that is away: no reason to end a run
                print(
                    f"trackers: {name} failed ({first_line(error)}); the run goes on without it",
                    file=sys.stderr,
                    flush=True,
                )
                del self.open[name]


class _TensorBoard:
    def __init__(self, output_dir: Path, run_id: str, start_step: int, settings: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start_step + 1)

    def log(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, output_dir: Path, run_id: str, start_step: int, settings: dict[str, Any]):
        import wandb

        project = os.environ.get("WANDB_PROJECT", "fastft")
        self.run = wandb.init(
            project=project,
            name=output_dir.resolve().name,
            id=run_id,
            resume="allow",
            dir=str(output_dir),
            config=settings,
            allow_val_change=True,
        )
        self.run.define_metric("*", step_metric="step")  # its own count of steps would refuse steps that are done again

    def log(self, row: dict[str, Any]) -> None:
        self.run.log(row)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, output_dir: Path, run_id: str, start_step: int, settings: dict[str, Any]):
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", "fastft")
        name = f"{output_dir.resolve().name}-{run_id}"  # trackio knows a run by its name
        self.run = trackio.init(project=project, name=name, resume="allow", config=settings)

    def log(self, row: dict[str, Any]) -> None:
        self.run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        self.run.finish()


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
