"""What a judge said about one answer, or about two in one order: the contract between asking judges and computing figures.

A run of `fastft judge` writes one `Judgment` a line to judgments.jsonl; figures and reports are made from that file alone.
"""

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from fastft.common.files import write_whole
from fastft.common.records import repair_text
from fastft.errors import UserError
from fastft.judge.rows import (
    Values,
    is_count,
    is_flag,
    is_number,
    is_string,
    is_text,
    or_null,
    read_objects,
    require_values,
)

Mode = Literal["pairwise", "single"]
Verdict = Literal["a", "b", "tie"]
"""Which of two answers is better: the one shown first, the other, or neither."""
Reading = tuple[float, ...] | Verdict
"""What was read from a judge's words: a score for each answer, or a verdict."""
VOTE_SCORES = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": (0.5, 0.5), "both_bad": (0.0, 0.0)}
"""Scores of model A and model B by a person's vote. "Both bad" is a tie for ratings; a flag distinguishes the two."""
NO_REPLY = "[no reply: "


@dataclass(frozen=True)
class Judgment:
    """What one judge said about one answer (mode "single"), or about two in one order (mode "pairwise").

    `model_a` was shown first, as Assistant 1. Scores are on the judge's own scale, 1 to 10 unless its prompt says otherwise.
    A judge that was asked which answer is better gives a `verdict` and no scores. `parsed` is false if neither could be read:
    they are None then, and every table counts the judgment as unparsed.
    `fastft.judge.tables.FLAGS` says what each of the `flags` means.
    """

    question_id: str
    category: str
    mode: Mode
    judge: str
    model_a: str
    model_b: str | None
    score_a: float | None
    score_b: float | None
    parsed: bool
    text: str  # the judge's whole reply; if it is flagged as failed, with `no_reply` at the end
    turn: int = 1
    referenced: bool = False  # whether the judge was shown a reference answer
    flags: tuple[str, ...] = field(default=())
    usd: float | None = None
    verdict: Verdict | None = None

    @property
    def failure(self) -> str:
        """The reason, in the endpoint's words, for which there was no reply; "" if there was one."""
        said = self.text.rpartition(NO_REPLY)[2] if "failed" in self.flags and NO_REPLY in self.text else ""
        return said.removesuffix("]")

    @property
    def winner(self) -> str | None:
        """The better model's name, "tie", or None if nothing could be read or there is only one model."""
        if self.model_b is None or not self.parsed:
            return None
        verdict = self.verdict or better((self.score_a, self.score_b))
        return {"a": self.model_a, "b": self.model_b, "tie": "tie"}[verdict]

    @property
    def marks(self) -> tuple[str, str]:
        """What each answer got, for a reader: its score, or "won", "tied" or "lost"."""
        if not self.parsed:
            return "unparsed", "unparsed"
        if self.verdict:
            return {"a": ("won", "lost"), "b": ("lost", "won"), "tie": ("tied", "tied")}[self.verdict]
        return str(self.score_a), str(self.score_b)


def better(scores: tuple[float, ...]) -> Verdict:
    """The verdict that two scores amount to."""
    return "tie" if scores[0] == scores[1] else "a" if scores[0] > scores[1] else "b"


def held(reading: Reading | None) -> dict[str, Any]:
    """The keys of a judgment that hold what was read."""
    scores = reading if isinstance(reading, tuple) else ()
    return {
        "score_a": scores[0] if scores else None,
        "score_b": scores[1] if len(scores) == 2 else None,
        "parsed": reading is not None,
        "verdict": reading if isinstance(reading, str) else None,
    }


def no_reply(reason: str) -> str:
    """What stands in the text of a judgment in place of a reply."""
    return f"{NO_REPLY}{reason}]"


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write dataclasses as JSON, one a line."""
    write_whole(path, repair_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)))


VALUES: Values = {
    **dict.fromkeys(("question_id", "judge", "model_a"), (is_text, "a text")),
    **dict.fromkeys(("category", "text"), (is_string, "a text")),
    **dict.fromkeys(("score_a", "score_b", "usd"), (or_null(is_number), "a number or null")),
    **dict.fromkeys(("parsed", "referenced"), (is_flag, "true or false")),
    "model_b": (or_null(is_text), "a text or null"),
    "mode": (lambda value: value in get_args(Mode), '"pairwise" or "single"'),
    "verdict": (or_null(lambda value: value in get_args(Verdict)), '"a", "b", "tie" or null'),
    "turn": (is_count, "a whole number"),
    "flags": (lambda value: isinstance(value, list) and all(map(is_text, value)), "a list of texts"),
}
"""What a line of judgments.jsonl may hold under each key."""


def read_judgments(path: Path) -> list[Judgment]:
    """Return the judgments of a file. Raises UserError if there is none, and for a line that is no judgment."""
    found = [judgment_of(record.value, f"{record.where}: is not a judgment") for record in read_objects(path)]
    if not found:
        raise UserError(f"{path}: holds no judgments")
    return found


def judgment_of(row: dict[str, Any], wrong: str) -> Judgment:
    """Return the judgment in a line. Raises UserError, whose message begins with `wrong`, if it is none."""
    needed = [each.name for each in fields(Judgment) if each.default is MISSING]
    if missing := [name for name in needed if name not in row]:
        raise UserError(f"{wrong}: it has no {missing[0]}")
    if unknown := [key for key in row if key not in VALUES]:
        raise UserError(f"{wrong}: it has an unknown key {unknown[0]!r}")
    require_values(row, VALUES, wrong)
    judgment = Judgment(**{**row, "flags": tuple(row.get("flags", ()))})
    pairwise = judgment.mode == "pairwise"
    if pairwise and judgment.model_b is None:
        raise UserError(f"{wrong}: model_b must name the other model, because mode is pairwise")
    scores = [judgment.score_a, judgment.score_b][: 1 + pairwise]
    if judgment.verdict and (not pairwise or any(score is not None for score in scores)):
        raise UserError(f"{wrong}: verdict is for two answers without scores")
    if judgment.parsed and not judgment.verdict and None in scores:
        raise UserError(f"{wrong}: a score is null although parsed is true")
    return judgment
