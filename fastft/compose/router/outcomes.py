"""Outcomes: what models scored on queries, the one input of a router (JSON Lines, also as .gz or .zst).

    {"id": "q1", "query": "What is …?", "tags": ["science"], "rewards": {"small": 0.2, "large": 0.9},
     "correct": {"small": 0, "large": 1}, "usd": {"small": 0.0001, "large": 0.002}}

`rewards` are the scores of a reward model or a judge, on any scale; `correct`, if known, is between 0 and 1; `usd` is what the
answer cost. A score that is missing, null or NaN is NaN in the arrays, is counted by `missing`, and is never read as 0.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from fastft.common.records import read_records, repair_text
from fastft.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcomes:
    """N queries and what M models scored on them."""

    ids: list[str]
    queries: list[str]
    tags: list[list[str]]
    models: list[str]
    rewards: np.ndarray
    """float64 [N, M]; NaN where a score is missing."""
    correct: np.ndarray | None = None
    """The same shape, between 0 and 1."""
    usd: np.ndarray | None = None
    """The same shape: dollars of one answer."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def digest(self) -> str:
        """A hash of everything, to tell whether a router was trained on these outcomes."""
        known = hashlib.sha256(orjson.dumps([self.ids, self.queries, self.tags, self.models]))
        for table in (self.rewards, self.correct, self.usd):
            known.update(b"none" if table is None else np.ascontiguousarray(table).tobytes())
        return known.hexdigest()

    @property
    def measure(self) -> np.ndarray:
        """What a choice is judged by: `correct` where the file has it, else the rewards."""
        return self.rewards if self.correct is None else self.correct

    def select(self, indices: Sequence[int] | np.ndarray) -> "Outcomes":
        """Return the queries at `indices`, in their order, with the same models."""
        indices = np.asarray(indices, dtype=int)
        tables = {
            name: None if table is None else table[indices]
            for name, table in (("rewards", self.rewards), ("correct", self.correct), ("usd", self.usd))
        }
        texts = {name: [getattr(self, name)[i] for i in indices] for name in ("ids", "queries", "tags")}
        return replace(self, **texts, **tables)

    def missing(self, name: str = "rewards") -> dict[str, int]:
        """How many scores each model lacks, for those that lack any. `name`: rewards, correct or usd."""
        lacking = np.isnan(getattr(self, name)).sum(0)
        return {model: int(count) for model, count in zip(self.models, lacking) if count}


def read_outcomes(paths: Sequence[str | Path]) -> Outcomes:
    """Read files of outcomes as one. Models are in the order in which they first appear.

    Warns about missing scores. Raises UserError, with file and line, for what is not an outcome.
    """
    rows = [_checked(record) for path in paths for record in read_records(path)]
    if not rows:
        raise UserError(f"{', '.join(map(str, paths))}: no outcomes" if paths else "name at least one file of outcomes")
    models = list(dict.fromkeys(model for row in rows for model in row["rewards"]))
    outcomes = Outcomes(
        ids=[row["id"] for row in rows],
        queries=[row["query"] for row in rows],
        tags=[row["tags"] for row in rows],
        models=models,
        rewards=_table(rows, "rewards", models),
        correct=_table(rows, "correct", models) if any(row["correct"] for row in rows) else None,
        usd=_table(rows, "usd", models) if any(row["usd"] for row in rows) else None,
    )
    _check_whole(outcomes)
    return outcomes


def _check_whole(outcomes: Outcomes) -> None:
    """Warn about missing scores, and about `correct` or `usd` that only some queries have."""
    for name in ("rewards", "correct", "usd"):
        if getattr(outcomes, name) is None or not (missing := outcomes.missing(name)):
            continue
        named = ", ".join(f"{model} {count:,}" for model, count in missing.items())
        logger.warning(
            "outcomes: %s of %s %s are missing (%s): left out, not read as 0",
            f"{sum(missing.values()):,}",
            f"{getattr(outcomes, name).size:,}",
            name,
            named,
        )


def _checked(record: Any) -> dict[str, Any]:
    """Return a row with every key and numbers as floats, NaN for missing ones."""
    row, where = record.value, record.where
    if record.error:
        raise UserError(f"{where}: {record.error}")
    if not isinstance(row, dict) or not isinstance(row.get("query"), str):
        raise UserError(
            f'{where}: an outcome is {{"id", "query", "tags", "rewards": {{model: score}}}}; "query" is a text'
        )
    if not isinstance(row.get("rewards"), dict) or not row["rewards"]:
        raise UserError(f'{where}: "rewards" must be {{model: score}} with at least one model')
    tags = row.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise UserError(f'{where}: "tags" must be a list of texts')
    scores = {name: _numbers(row.get(name), name, where) for name in ("rewards", "correct", "usd")}
    if unknown := [model for name in ("correct", "usd") for model in scores[name] if model not in scores["rewards"]]:
        raise UserError(f'{where}: {unknown[0]!r} is not among the models of "rewards"')
    query = repair_text(row["query"])
    return {"id": str(row.get("id") or where), "query": query, "tags": list(dict.fromkeys(tags)), **scores}


def _numbers(scores: Any, name: str, where: str) -> dict[str, float]:
    if scores is None:
        return {}
    if not isinstance(scores, dict):
        raise UserError(f'{where}: "{name}" must be {{model: number}}')
    numbers = {}
    for model, score in scores.items():
        if score is not None and not isinstance(score, (int, float)):
            raise UserError(
                f'{where}: "{name}" of {model!r} is {score!r}; it must be a number, or null if there is none'
            )
        numbers[model] = math.nan if score is None else float(score)
        if math.isinf(numbers[model]):
            raise UserError(f'{where}: "{name}" of {model!r} is infinite')
        if (numbers[model] < 0 and name != "rewards") or (numbers[model] > 1 and name == "correct"):
            right = "between 0 and 1" if name == "correct" else "at least 0"
            raise UserError(f'{where}: "{name}" of {model!r} is {score}; it must be {right}')
    return numbers


def _table(rows: list[dict[str, Any]], name: str, models: list[str]) -> np.ndarray:
    return np.array([[row[name].get(model, math.nan) for model in models] for row in rows], dtype=float)
