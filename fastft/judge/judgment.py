"""What one look of a judge gives: the contract between asking judges and computing figures.

A run of `fastft judge` appends one `Judgment` a line to judgments.jsonl; figures and reports are made of that file alone.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastft.common.files import write_whole
from fastft.common.records import repair_text
from fastft.errors import UserError

Mode = Literal["pairwise", "single"]


@dataclass(frozen=True)
class Judgment:
    """One judge's words about one answer (`single`) or about two in one order (`pairwise`).

    `model_a` is the one shown first, as Assistant 1. Scores are on the judge's own scale, 1-10 unless its prompt says
    otherwise. `parsed` is false where no score could be read; scores are then None and the judgment still counts in every
    table, as unparsed. `flags` name what a reader should know; `fastft.judge.report.FLAGS` says what each means.
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
    text: str  # the judge's words, whole
    turn: int = 1
    referenced: bool = False  # the judge was shown a reference answer
    flags: tuple[str, ...] = field(default=())
    usd: float | None = None

    @property
    def winner(self) -> str | None:
        """The name of the better model, "tie", or None where nothing was parsed or there is only one."""
        if self.model_b is None or self.score_a is None or self.score_b is None:
            return None
        if self.score_a == self.score_b:
            return "tie"
        return self.model_a if self.score_a > self.score_b else self.model_b


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Dataclasses, one a line of JSON."""
    write_whole(path, repair_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)))


def read_judgments(path: Path) -> list[Judgment]:
    """Raises UserError with the line that is no judgment."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):  # of bytes: no U+2028 ends a line
        try:
            row = json.loads(line)
            found.append(Judgment(**{**row, "flags": tuple(row["flags"])}))
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path}, line {number}: is no judgment ({error})") from None
    return found
