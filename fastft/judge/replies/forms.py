"""Read a row of somebody else's judgments: its keys say whose it is, and each form has one short reader.

    looks = read_row(row, file)        # the judge's looks that it tells of: two if both orders are in one row

The forms are those of Vicuna and QLoRA (reviews), FastChat's MT-bench (pairs and single answers), Arena-Hard, AlpacaEval,
Chatbot Arena (votes), and our own judgments.jsonl. docs/judge.md has their keys.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastft.errors import UserError
from fastft.judge.judgment import Judgment, Reading, judgment_of
from fastft.judge.replies.parsing import parse_single
from fastft.judge.replies.verdicts import Asked, read_pair, side_of
from fastft.judge.rows import is_number, is_text

Row = dict[str, Any]
_PEOPLE = re.compile(r"(?:arena_user|expert|author|user)_\w+|people", re.IGNORECASE)
_REVIEWER = re.compile(r"[-_](gpt-?\d[\w.]*)[-_]reviewer(?:[-_]threeclass)?$")
_PREFIX = re.compile(r"^(?:review|answer)[-_]")


class Unread(Exception):
    """A row that is no judgment. The message says why, for a line that counts such rows."""


@dataclass(frozen=True)
class File:
    """A file of judgments, and what a row may need to know about it and about the answers beside it."""

    path: Path
    named: tuple[str, str] | None = None
    """The two models in the file's name, if it names two."""
    judge: str = "review"
    baseline: str | None = None
    names_of_ids: dict[str, list[str]] = field(default_factory=dict)
    """The names that the model of each answer's id goes by."""


@dataclass(frozen=True)
class Look:
    """One judge's look at one answer, or at two in one order, as a row tells of it."""

    question: str
    models: tuple[str, ...]  # in the order in which they were shown
    judge: str
    entered: Reading | None  # the result in the row's fields
    text: str = ""  # the judge's words; "" if the row has none
    asked: Asked | None = "scores"  # None: the words say nothing without the request
    turn: int = 1
    category: str | None = None
    referenced: bool = False
    flags: tuple[str, ...] = ()
    question_turns: tuple[str, ...] = ()  # if the row has them
    answer_turns: tuple[tuple[str, ...], ...] = ()
    whole: Judgment | None = None  # a row of our own, as it is

    @property
    def read(self) -> Reading | None:
        """What the judge's words say."""
        if len(self.models) == 1:
            score = parse_single(self.text)
            return None if score is None else (score,)
        return read_pair(self.text, self.asked) if self.asked else None


def file_of(path: Path, known: set[str], names_of_ids: dict[str, list[str]], baseline: str | None) -> File:
    """Describe a file. `known` are names of models with answers: they say where a name with underscores ends.

    FIRST-vs-SECOND-gpt-4-reviewer is QLoRA's way to name a file, review_FIRST_SECOND Vicuna's.
    """
    stem = path.name.split(".jsonl")[0].split(".json")[0]
    judge = _REVIEWER.search(stem)
    stem = _REVIEWER.sub("", stem)
    parts = re.split(r"[-_]vs[-_]", stem, maxsplit=1)
    if len(parts) == 2:
        named = tuple(_PREFIX.sub("", part) for part in parts)
    else:
        words = stem.removeprefix("review_").split("_")
        pairs = [("_".join(words[:i]), "_".join(words[i:])) for i in range(1, len(words))]
        named = next((pair for pair in pairs if {*pair} <= known), pairs[0] if pairs and all(pairs[0]) else None)
    return File(path, named, judge[1] if judge else "review", baseline, names_of_ids)


def read_row(row: Row, file: File, where: str) -> list[Look]:
    """Return the looks in a row. Raises Unread for a row that is no judgment."""
    for needed, read in FORMS:
        if needed <= row.keys():
            return list(read(row, file, where))
    raise Unread("no judgment, by their keys")


def _own(row: Row, file: File, where: str) -> Iterator[Look]:
    try:
        own = judgment_of(row, "no judgment of fastft")
    except UserError as error:
        raise Unread(str(error)) from None
    yield Look(own.question_id, (own.model_a, own.model_b or ""), own.judge, None, whole=own)


def _fastchat_pair(row: Row, file: File, where: str) -> Iterator[Look]:
    """Both orders of a pair: model_1 was shown first in the first game."""
    models, (judge, prompt) = (_model(row, "model_1"), _model(row, "model_2")), _judge(row)
    for game, shown in ((1, models), (2, models[::-1])):
        winner, text = _text(row.get(f"g{game}_winner")), _words(row.get(f"g{game}_judgment"))
        first = f"model_{game}"
        yield Look(
            question=_question(row, where),
            models=shown,
            judge=judge,
            entered={first: "a", f"model_{3 - game}": "b", "tie": "tie"}.get(winner),
            text=text,
            asked="verdict" if re.search(r"\[\[\s*[ABC]", text) else "scores",
            turn=_turn(row),
            referenced="math" in prompt or "ref" in prompt,
        )


def _fastchat_single(row: Row, file: File, where: str) -> Iterator[Look]:
    """One answer's score; -1 where FastChat could not read it."""
    score, (judge, prompt) = row["score"], _judge(row)
    yield Look(
        question=_question(row, where),
        models=(_model(row, "model"),),
        judge=judge,
        entered=(float(score),) if is_number(score) and score >= 0 else None,
        text=_words(row["judgment"]),
        turn=_turn(row),
        referenced="math" in prompt or "ref" in prompt,
    )


def _arena_hard(row: Row, file: File, where: str) -> Iterator[Look]:
    """Two games: in the first one the baseline was shown first, in the second one the model."""
    if not isinstance(row["games"], list):
        raise Unread("games is no list")
    models = (_text(row.get("baseline")) or file.baseline or "baseline", _model(row, "model"))
    for shown, game in zip((models, models[::-1]), row["games"]):
        game = game if isinstance(game, dict) else {}
        label, text = game.get("score"), _words(game.get("judgment"))
        yield Look(
            question=_question(row, where),
            models=shown,
            judge=_judge(row)[0],
            entered=side_of(label) if isinstance(label, str) else None,
            text=text,
            asked="verdict",
            category=_text(row.get("category")),
        )


def _alpaca_eval(row: Row, file: File, where: str) -> Iterator[Look]:
    """A preference from 1 (the first output) to 2 (the second); 0 and 1.5 are ties.

    It becomes the two outputs' scores, so that the second one's total is what AlpacaEval calls its win rate. The row does not
    say which output was shown first, and the words name them by that, so only the preference is read.
    """
    value = row["preference"]
    value = 1.5 if value == 0 else value
    completion = row.get("raw_completion")
    completion = completion.get("message") or completion.get("text") if isinstance(completion, dict) else completion
    outputs = tuple((row[key],) for key in ("output_1", "output_2") if is_text(row.get(key)))
    yield Look(
        question=_digest(row["instruction"]),
        models=(_model(row, "generator_1"), _model(row, "generator_2")),
        judge=_text(row.get("annotator")) or "review",
        entered=(2.0 - value, value - 1.0) if is_number(value) and 1 <= value <= 2 else None,
        text=_words(completion),
        asked=None,
        category=_text(row.get("dataset")),
        question_turns=(row["instruction"],) if is_text(row["instruction"]) else (),
        answer_turns=outputs if len(outputs) == 2 else (),
    )


def _battle(row: Row, file: File, where: str) -> Iterator[Look]:
    """A person's vote on two answers side by side; model_a is the left one."""
    if row.get("anony") is False:
        raise Unread("votes of people who knew the models' names")
    winner = _text(row.get("winner")) or next(
        (key[7:] for key in row if key.startswith("winner_") and row[key] == 1), None
    )
    bad = winner is not None and re.sub(r"\W|_", "", winner) in ("tiebothbad", "bothbad")
    judge, _ = _judge(row, "people")
    sides = [_talk(row.get(key)) for key in ("conversation_a", "conversation_b")]
    asked = [turn for role, turn in sides[0] if role == "user"]
    answers = tuple(tuple(turn for role, turn in side if role == "assistant") for side in sides)
    yield Look(
        question=_question(row, where),
        models=(_model(row, "model_a"), _model(row, "model_b")),
        judge="people" if _PEOPLE.fullmatch(judge) else judge,
        entered={"model_a": "a", "model_b": "b", "tie": "tie"}.get(winner) or ("tie" if bad else None),
        turn=_turn(row),
        category=_text(row.get("category")) or "arena",
        flags=("both_bad",) if bad else (),
        question_turns=tuple(asked),
        answer_turns=answers if all(answers) else (),
    )


def _review(row: Row, file: File, where: str) -> Iterator[Look]:
    """A pair of scores, or 1, 2 or 3, and the words. The ids of the answers say which was shown first, else the file's name."""
    if not isinstance(row["text"], str):
        raise Unread("no review, because they have no text")
    score = row.get("score")
    is_class = isinstance(score, int) and not isinstance(score, bool)
    yield Look(
        question=_question(row, where),
        models=_shown(row, file),
        judge=file.judge,
        entered={1: "a", 2: "b", 3: "tie"}.get(score) if is_class else _scores(score),
        text=row["text"],
        asked="number" if is_class else "scores",
    )


FORMS: list[tuple[set[str], Callable[[Row, File, str], Iterator[Look]]]] = [
    ({"question_id", "mode", "model_a", "parsed", "text"}, _own),
    ({"model_1", "model_2", "g1_winner", "g2_winner"}, _fastchat_pair),
    ({"model", "judgment", "score"}, _fastchat_single),
    ({"model", "games"}, _arena_hard),
    ({"generator_1", "generator_2", "preference", "instruction"}, _alpaca_eval),
    ({"model_a", "model_b", "winner"}, _battle),
    ({"model_a", "model_b", "winner_model_a", "winner_model_b"}, _battle),
    ({"text", "answer1_id", "answer2_id"}, _review),
    ({"text", "score"}, _review),
    ({"text", "question_id"}, _review),
]
"""(keys that a row must have, its reader); the first that fits is taken."""


def _shown(row: Row, file: File) -> tuple[str, str]:
    """Return the models of a review in the order in which they were shown. Raises Unread if nothing names them."""
    named = file.named or ()
    ids = [file.names_of_ids.get(str(row.get(key)), []) for key in ("answer1_id", "answer2_id")]
    plain_names = {plain(name): name for name in named}
    first, second = (
        next((plain_names[plain(name)] for name in names if plain(name) in plain_names), names[0] if names else None)
        for names in ids
    )
    if first and second:
        return first, second
    if not file.named:
        raise Unread(
            "reviews without models: give the answers with their ids (--answers), or name it FIRST-vs-SECOND.jsonl"
        )
    return named[::-1] if first == named[1] or second == named[0] else named


def plain(name: str) -> str:
    """Return a model's name without what people write differently: "gpt35" and "GPT-3.5" are one."""
    return re.sub(r"[\W_]", "", name).lower()


def _scores(value: Any) -> tuple[float, float] | None:
    """Return a field's scores, or None if none were entered, which Vicuna marks with -1."""
    good = isinstance(value, list) and len(value) == 2 and all(is_number(each) and each >= 0 for each in value)
    return (float(value[0]), float(value[1])) if good else None


def _model(row: Row, key: str) -> str:
    if not is_text(row[key]):
        raise Unread(f"without a model's name under {key}")
    return row[key]


def _text(value: Any) -> str | None:
    return value if is_text(value) else None


def _question(row: Row, where: str) -> str:
    """Return the question's id; a row without one is a question of its own."""
    keys = ("question_id", "message_id", "uid", "id")
    found = next((row[key] for key in keys if is_text(row.get(key)) or type(row.get(key)) is int), where)
    return str(found)


def _digest(text: Any) -> str:
    return hashlib.sha256(str(text).encode("utf-8", "replace")).hexdigest()[:12]


def _judge(row: Row, unknown: str = "review") -> tuple[str, str]:
    """Return the judge's name and its prompt's, which FastChat writes as a pair."""
    judge = row.get("judge") or unknown
    names = [each for each in (judge if isinstance(judge, (list, tuple)) else [judge]) if is_text(each)]
    return names[0] if names else unknown, "".join(names[1:2])


def _turn(row: Row) -> int:
    turn = row.get("turn")
    return int(turn) if is_number(turn) and math.floor(turn) == turn and turn >= 0 else 1


def _words(value: Any) -> str:
    """Return a text that may stand in an object, or in parts."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("answer", "content", "text") if value.get(key)), "")
    if isinstance(value, list):
        return "\n".join(filter(None, map(_words, value)))
    return value if isinstance(value, str) else ""


def _talk(value: Any) -> list[tuple[str, str]]:
    """Return (role, text) of each message of a conversation."""
    messages = value if isinstance(value, list) else []
    return [(str(each.get("role")), _words(each.get("content"))) for each in messages if isinstance(each, dict)]
