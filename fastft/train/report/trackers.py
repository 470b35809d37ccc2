"""Send a run's numbers to TensorBoard, Weights & Biases and trackio, besides writing them to metrics.jsonl.

    --trackers tensorboard,wandb

A library is imported only if it is named. A run that continues after an interruption is the same run in its trackers,
because its id is kept in OUTPUT_DIR/run.json. The libraries read project and account themselves (WANDB_PROJECT, WANDB_MODE,
WANDB_API_KEY, TRACKIO_PROJECT, …); no key is ever read or shown here. A tracker that fails during the training is dropped
with a warning, because metrics.jsonl has all the numbers.
"""

import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fastft.errors import UserError, first_line, is_ours

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """The interface of a tracker."""

    def log(self, row: dict[str, Any]) -> None:
        """Take a row of numbers by name, among them "step"."""

    def close(self) -> None:
        """Write out everything that was logged."""


def tracker_names(trackers: str) -> list[str]:
    """The names in a comma-separated list, without "none". Raises UserError if the package of one is not installed."""
    names = [name for name in dict.fromkeys(each.strip() for each in trackers.split(",")) if name != "none"]
    for name in names:
        if importlib.util.find_spec(name) is None:  # a tracker is named after its package
            raise UserError(
                f"trackers: {name} is not installed (pip install {name}); leave it out, or give --trackers none"
            )
    return names


class Trackers:
    """All of a run's trackers. `start_step` is the step of the checkpoint from which the run continues."""

    def __init__(self, names: list[str], output_dir: Path, run_id: str, start_step: int, settings: dict[str, Any]):
        """Start the trackers. Raises UserError if one does not start, for example because the user is not logged in."""
        kinds = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
        self.open: dict[str, Tracker] = {}
        for name in names:
            try:
                self.open[name] = kinds[name](output_dir, run_id, start_step, settings)
            except Exception as error:  # each library has errors of its own
                if is_ours(error):
                    raise
                raise UserError(f"trackers: {name} did not start ({first_line(error)})") from None

    def log(self, row: dict[str, Any]) -> None:
        """Send a row to all trackers, without the values that are None."""
        numbers = {name: value for name, value in row.items() if value is not None}
        self._each(lambda tracker: tracker.log(numbers))

    def close(self) -> None:
        """Close all trackers."""
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                call(tracker)
            except Exception as error:  # a full disk, a server that does not answer: no reason to end a run
                if is_ours(error):
                    raise
                logger.warning("trackers: %s failed (%s); the run continues without it", name, first_line(error))
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
        self.run.define_metric("*", step_metric="step")  # with its own count, it would refuse steps that are done again

    def log(self, row: dict[str, Any]) -> None:
        self.run.log(row)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, output_dir: Path, run_id: str, start_step: int, settings: dict[str, Any]):
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", "fastft")
        name = f"{output_dir.resolve().name}-{run_id}"  # trackio identifies a run by its name
        self.run = trackio.init(project=project, name=name, resume="allow", config=settings)

    def log(self, row: dict[str, Any]) -> None:
        self.run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        self.run.finish()
