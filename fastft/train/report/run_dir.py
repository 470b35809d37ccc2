"""Read a run's directory, and write its run.json.

    config.yaml      the settings
    run.json         facts that only the trainer knows: data, versions, devices, and the run's id in its trackers
    metrics.jsonl    a row for every step and every held-out loss
    samples.jsonl    answers to fixed prompts, if there are prompts
    checkpoints/     step-00000100/, …
    model/           the trained model, once the run is finished

The trainer writes these files; `fastft export` and `fastft report` read them. run.json, and everything that is made from it,
names files and models by their last name and never tells where they are.
"""

import json
import secrets
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastft
from fastft.common.files import short_name, write_whole
from fastft.config import TrainConfig, read_config
from fastft.errors import UserError
from fastft.train.report.metrics import read_metrics

if TYPE_CHECKING:
    import torch

    from fastft.data.dataset import TokenizedData
    from fastft.data.step_plan import Curriculum
    from fastft.data.template.chat_template import ChatTemplate


@dataclass
class Run:
    """A run as its directory describes it."""

    name: str
    config: TrainConfig
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    def until(self, step: int) -> "Run":
        """The run as it was after `step`."""
        metrics, samples = ([row for row in rows if row["step"] <= step] for rows in (self.metrics, self.samples))
        return Run(self.name, self.config, self.facts, metrics, samples)


def read_run(directory: Path) -> Run:
    """Read a run's directory. Raises UserError if it is not that of a run, or if run.json is damaged."""
    missing = [name for name in ("config.yaml", "run.json") if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory}: is no run of fastft train ({' and '.join(missing)} not found there)")
    config = read_config(directory / "config.yaml")
    try:
        facts = json.loads((directory / "run.json").read_text())
    except ValueError:  # JSONDecodeError, or text that is not UTF-8
        facts = None
    if not _is_whole(facts):
        raise UserError(
            f"{directory / 'run.json'}: is damaged; start the same training command again, which writes a new one"
        )
    metrics, samples = (
        read_metrics(path) if path.exists() else []
        for path in (directory / "metrics.jsonl", directory / "samples.jsonl")
    )
    return Run(directory.resolve().name, config, facts, metrics, samples)


_FACTS = {
    **dict.fromkeys(("id", "model", "template", "end_of_turn", "devices"), str),
    "steps": int,
    **dict.fromkeys(("steps_of_stages", "data", "eval_data"), list),
    "versions": dict,
}
_FACTS_OF_FILE = {
    "file": str,
    **dict.fromkeys(("conversations", "tokens", "trained_tokens"), int),
    "weight": (int, float),
    "epochs": (int, type(None)),
}


def _is_whole(facts: Any) -> bool:
    """Whether what run.json holds has all that `describe` puts into it, of the right types."""

    def has(values: Any, types: dict[str, Any]) -> bool:
        return isinstance(values, dict) and all(
            key in values and isinstance(values[key], kind) for key, kind in types.items()
        )

    if not has(facts, _FACTS) or not all(isinstance(files, list) for files in facts["data"]):
        return False
    return all(has(file, _FACTS_OF_FILE) for files in (*facts["data"], facts["eval_data"]) for file in files)


def write_facts(directory: Path, facts: dict[str, Any]) -> tuple[str, float]:
    """Write run.json. Returns the run's id, which all its starts share, and the seconds that its earlier starts took.

    These seconds are also kept in run.json, as `earlier_s`, because the rows of metrics.jsonl from which they are read may be
    removed before there are new ones.
    """
    path = directory / "run.json"
    try:
        earlier = json.loads(path.read_text())
        run_id, seconds = earlier["id"], float(earlier.get("earlier_s", 0.0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        run_id, seconds = secrets.token_hex(4), 0.0
    metrics = directory / "metrics.jsonl"
    seconds = max(
        [seconds, *(row.get("elapsed_s", 0.0) for row in (read_metrics(metrics) if metrics.exists() else []))]
    )
    write_whole(path, json.dumps({"id": run_id, **facts, "earlier_s": seconds}, indent=1) + "\n")
    return run_id, seconds


def describe(
    config: TrainConfig,
    template: "ChatTemplate",
    curriculum: "Curriculum",
    eval_data: "TokenizedData | None",
    device: "torch.device",
    processes: int,
) -> dict[str, Any]:
    """The facts for run.json."""
    import torch

    devices = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "model": short_name(config.model),
        "template": short_name(config.template) if config.template else "the tokenizer's own",
        "end_of_turn": template.end_of_turn,
        "steps": curriculum.total,
        "steps_of_stages": [stage.total for stage in curriculum.stages],
        "data": [_data(stage.data) for stage in curriculum.stages],
        "eval_data": _data(eval_data) if eval_data else [],
        "devices": f"{processes} x {devices}",
        "versions": {"fastft": fastft.__version__, **{name: version(name) for name in ("torch", "transformers")}},
    }


def _data(data: "TokenizedData") -> list[dict[str, Any]]:
    """The files of a stage, with the number of their conversations and tokens."""
    lengths, trained, first, found = data.lengths, data.trained_counts, 0, []
    for source in data.sources:
        part = slice(first, first + source.count)
        first += source.count
        found.append(
            {
                "file": short_name(source.path),
                "conversations": source.count,
                "tokens": int(lengths[part].sum()),
                "trained_tokens": int(trained[part].sum()),
                "weight": source.weight,
                "epochs": source.epochs,
            }
        )
    return found
