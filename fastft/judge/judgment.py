"""What a judge said about one answer, or about two in one order: the contract between asking judges and computing figures.

A run of `fastft judge` writes one `Judgment` a line to judgments.jsonl; figures and reports are made from that file alone.
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
    """One judge's words about one answer (mode "single"), or about two in one order (mode "pairwise").

    `model_a` was shown first, as Assistant 1. Scores are on the judge's own scale, 1 to 10 unless its prompt says otherwise.
    `parsed` is false where no score could be read: the scores are None then, and every table counts the judgment as unparsed.
    `flags` name what a reader should know; `fastft.judge.tables.FLAGS` says what each means.
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
    referenced: bool = False  # whether the judge was shown a reference answer
    flags: tuple[str, ...] = field(default=())
    usd: float | None = None

    @property
    def winner(self) -> str | None:
        """The better model's name, "tie", or None where nothing could be read or there is only one model."""
        if self.model_b is None or self.score_a is None or self.score_b is None:
            return None
        if self.score_a == self.score_b:
            return "tie"
        return self.model_a if self.score_a > self.score_b else self.model_b


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write dataclasses as JSON, one a line."""
    write_whole(path, repair_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)))


def read_judgments(path: Path) -> list[Judgment]:
    """Return the judgments of a file. Raises UserError where there is none, and for a line that is no judgment."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):  # bytes, because U+2028 ends no line of JSON
        try:
            row = json.loads(line)
            found.append(Judgment(**{**row, "flags": tuple(row["flags"])}))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
            raise UserError(f"{path}, line {number}: is not a judgment ({error})") from None
    return found
