"""Compute the identity of a run: the values, by name, that must be equal for a checkpoint to belong to it.

The identity is saved with every checkpoint. Everything else may change between two starts: the number of processes, the
micro-batches, paths. A difference is an error that names the old and the new value, unless --allow_change says that it is
intended.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from fastft.common.files import short_name
from fastft.config import TrainConfig, stages_of
from fastft.data.step_plan import Curriculum

SAME = (  # keys of the configuration
    "seq_len",
    "overlong",
    "extend",
    "resize_embeddings",
    "lora",
    "global_batch_size",
    "seed",
    "max_grad_norm",
    "z_loss",
    "float8",
    "optimizer",
)


def run_identity(config: TrainConfig, curriculum: Curriculum, model: str) -> dict[str, Any]:
    """The identity of a run on a model whose fingerprint is `model`.

    Data files are compared by their contents, not their paths.
    """
    values = asdict(config)
    identity = {key: values[key] for key in SAME}
    identity["optimizer"]["betas"] = list(identity["optimizer"]["betas"])
    del identity["optimizer"]["lr"]  # each stage has its own
    identity["stages"] = [
        {
            "data": [
                {"file": short_name(s.path), "contents": s.contents, "weight": s.weight, "epochs": s.epochs}
                for s in plan.data.sources
            ],
            "epochs": stage.epochs,
            "max_steps": stage.max_steps,
            "lr": stage.optimizer.lr,
            "schedule": asdict(stage.schedule),
        }
        for stage, plan in zip(stages_of(config), curriculum.stages)
    ]
    return {**identity, **curriculum.stages[0].data.digests, "model": model}


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe each value that differs in one line, such as "stages.0.lr was 1e-05 and is 2e-05"."""
    return list(_differences("", earlier, now))


def _differences(where: str, earlier: Any, now: Any) -> Iterator[str]:
    """The differences below the key `where`.

    An entry of a list is named by its number, unless it is the only one. A file whose contents are the same may have another
    name.
    """
    if isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
        if len(now) == 1:
            yield from _differences(where, earlier[0], now[0])
            return
        earlier, now = dict(enumerate(earlier)), dict(enumerate(now))
    if isinstance(earlier, dict) and isinstance(now, dict):
        if "contents" in now and earlier["contents"] != now["contents"]:
            yield f"{where}: the contents of {now['file']} are not those that {earlier['file']} had"
        for key in (key for key in now if key not in ("file", "contents")):
            yield from _differences(f"{where}.{key}" if where else str(key), earlier.get(key), now[key])
    elif earlier != now:
        yield f"{where} was {earlier!r} and is {now!r}"
