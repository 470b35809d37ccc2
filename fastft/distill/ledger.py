"""The ledger of a distillation: how every query ended with every teacher, and what the page shows of it.

planned = kept + refused + cut + unverified + failed + over budget + duplicate, for each teacher and each collection; this is
asserted. rejected.jsonl has a row for every query that is not kept: {"id", "teacher", "status", "reason", "detail"}.
"""

import statistics
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fastft.distill.verify.checks import KEPT, STATUSES, AnswerVerdict

EXAMPLES = 3  # for each reason
SAMPLES = 6  # queries that the page shows with every teacher's answer
LONGEST = 4000  # characters of a text that the ledger keeps as an example


@dataclass
class TeacherLedger:
    """What became of the queries of one teacher."""

    name: str
    model: str
    planned: int = 0
    ended: Counter = field(default_factory=Counter)  # status -> queries
    reasons: dict[str, Counter] = field(default_factory=dict)  # status -> reason -> queries
    collections: dict[str, Counter] = field(default_factory=dict)  # collection -> status -> queries
    checked: Counter = field(default_factory=Counter)  # collection -> answers that were compared with a gold answer
    right: Counter = field(default_factory=Counter)
    lengths: dict[str, array] = field(default_factory=dict)  # message -> reply tokens of every answer
    tokens: list[int] = field(default_factory=lambda: [0, 0])  # of prompts and of replies, each request once
    answers: int = 0
    usd: float = 0.0
    versions: Counter = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # reason -> queries

    def add(self, row: dict[str, Any], answer: dict[str, Any] | None, verdict: AnswerVerdict) -> None:
        """Count how a query ended."""
        assert verdict.status in STATUSES, verdict
        self.planned += 1
        self.ended[verdict.status] += 1
        self.collections.setdefault(row["collection"], Counter())[verdict.status] += 1
        if verdict.checked:
            self.checked[row["collection"]] += 1
            self.right[row["collection"]] += verdict.status != "unverified"
        if answer:
            self.lengths.setdefault(row["message"], array("l")).append(answer["completion_tokens"])
            self.versions[answer["version"] or answer["model"]] += 1
        if verdict.status != KEPT:
            self.reasons.setdefault(verdict.status, Counter())[verdict.reason] += 1
            examples = self.examples.setdefault(f"{verdict.status}: {verdict.reason}", [])
            if len(examples) < EXAMPLES:
                examples.append(_example(row, answer) | {"detail": verdict.detail})

    def to_json(self) -> dict[str, Any]:
        """What ledger.json says of this teacher."""
        assert self.planned == sum(self.ended.values()) == sum(map(Counter.total, self.collections.values()))
        kept = self.ended[KEPT]
        return {
            "name": self.name,
            "model": self.model,
            "planned": self.planned,
            **{status.replace(" ", "_"): self.ended[status] for status in STATUSES},
            "reasons": {status: dict(counts.most_common()) for status, counts in self.reasons.items()},
            "collections": {
                name: {"planned": counts.total(), **{status: counts[status] for status in STATUSES if counts[status]}}
                | {"checked": self.checked[name], "right": self.right[name]}
                for name, counts in sorted(self.collections.items())
            },
            "answers": self.answers,
            "prompt_tokens": self.tokens[0],
            "completion_tokens": self.tokens[1],
            "usd": round(self.usd, 6),
            "usd_per_kept": round(self.usd / kept, 8) if kept else None,
            "versions": dict(self.versions.most_common()),
            "lengths": {name: _lengths(values) for name, values in sorted(self.lengths.items())},
            "examples": self.examples,
        }


def _lengths(values: array) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "answers": len(ordered),
        "mean": round(statistics.fmean(ordered), 1),
        "median": statistics.median(ordered),
        "p90": ordered[min(len(ordered) * 9 // 10, len(ordered) - 1)],
        "longest": ordered[-1],
    }


def _example(row: dict[str, Any], answer: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "id": row["id"],
        "message": row["message"],
        "system": row["system"][:LONGEST],
        "query": row["query"][:LONGEST],
        "gold": row["gold"][:LONGEST],
        "answer": answer["text"][:LONGEST] if answer else None,
    }


def sample(row: dict[str, Any], found: dict[str, tuple[dict[str, Any] | None, AnswerVerdict]]) -> dict[str, Any]:
    """A query with every teacher's answer, for the page."""
    shown = _example(row, None)
    shown["answers"] = [
        {"teacher": name, "text": answer["text"][:LONGEST], "tokens": answer["completion_tokens"]}
        | {"verdict": verdict.status if verdict.status == KEPT else f"{verdict.status}: {verdict.reason}"}
        for name, (answer, verdict) in found.items()
        if answer
    ]
    return shown
