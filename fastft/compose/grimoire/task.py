"""Reads a task: what is to be decided, the labels, and the questions of its three splits, which never mix.

    task = read_task(Path("trec.yaml"))
    parts = split_questions(task, Path("grimoires/trec/splits"))      # OpenSplits(train, validation)
    test, remarks = read_test(task, Path("grimoires/trec/splits"), earlier)      # only after the choice has been made

A task is a YAML file:

    name: trec
    description: Say what kind of answer the question asks for.
    labels: [Abbreviation, Entity, Description, Person, Location, Number]
    train: trec_train.jsonl.gz          # JSON Lines with text and label, beside this file
    validation: …                       # optional: else a third of train is set aside
    test: …                             # optional: else a fifth of train is set aside before that

What is set aside depends on the text alone (a hash), so the same text never comes into two splits, in whichever order the
rows stand. A test file is not opened before the choice is made.
"""

import hashlib
import json
import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastft.common.files import make_directory, write_whole
from fastft.common.records import repair_text
from fastft.errors import UserError
from fastft.judge.rows import read_objects

logger = logging.getLogger(__name__)

KEYS = ("name", "description", "labels", "train", "validation", "test")
VALIDATION_SHARE, TEST_SHARE = 1 / 3, 1 / 5


@dataclass(frozen=True)
class TaskQuestion:
    """A text with its right label. `zero_shot` says which models are known to have been right without help."""

    id: str
    text: str
    label: str
    zero_shot: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelTask:
    """What is to be decided, and where its questions are."""

    name: str
    description: str
    labels: tuple[str, ...]
    train: Path
    validation: Path | None = None
    test: Path | None = None


@dataclass(frozen=True)
class OpenSplits:
    """The questions that may be looked at before the choice. The strings say what was left out, for the user."""

    train: list[TaskQuestion]
    validation: list[TaskQuestion]
    remarks: tuple[str, ...] = ()


def read_task(path: Path) -> LabelTask:
    """Return the task that a YAML file describes. Raises UserError for the first thing that is wrong with it."""
    import yaml

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must have the keys description, labels and train")
    if unknown := [key for key in content if key not in KEYS]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}; a task has {', '.join(KEYS)}")
    for key in ("description", "train"):
        if not isinstance(content.get(key), str) or not content[key].strip():
            raise UserError(f"{path}: has no {key}")
    labels = _labels(path, content.get("labels"))
    places = {key: _place(path, key, content[key]) for key in ("train", "validation", "test") if content.get(key)}
    if len(set(places.values())) < len(places):
        raise UserError(f"{path}: two of train, validation and test name the same file; a split must be read once only")
    return LabelTask(str(content.get("name") or path.stem), content["description"].strip(), labels, **places)


def _labels(path: Path, labels: Any) -> tuple[str, ...]:
    """Return the labels. Raises UserError unless they are two texts or more that can be told apart in an answer."""
    if not labels:
        raise UserError(
            f"{path}: has no labels; a grimoire is for tasks with a fixed set of answers: labels: [yes, no]"
        )
    if not isinstance(labels, list):
        raise UserError(f"{path}: labels must be a list, such as [yes, no]")
    # YAML reads yes and true as truth values, and 1 as a number.
    if any(isinstance(label, bool) for label in labels):
        raise UserError(f"{path}: YAML reads yes, no, true and false as truth values; put quotes around such labels")
    texts = [str(label).strip() for label in labels]
    if len(texts) == 1:
        raise UserError(f"{path}: has one label, {texts[0]!r}; with a single answer there is nothing to decide")
    for i, label in enumerate(texts):
        if not normalized(label):
            raise UserError(f"{path}: label {i + 1} is {labels[i]!r}, which no answer can be compared with")
        if twin := next((other for other in texts[:i] if normalized(other) == normalized(label)), None):
            raise UserError(f"{path}: the labels {twin!r} and {label!r} are the same when answers are read; rename one")
    return tuple(texts)


def _place(path: Path, key: str, value: Any) -> Path:
    if not isinstance(value, str):
        raise UserError(f"{path}: {key} must name a file")
    place = path.parent / value
    if not place.is_file():
        raise UserError(f"{path}: {key}: {place}: no such file")
    return place.resolve()


def overlapping_labels(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of labels of which the first is a part of the second, as "true" is of "untrue"."""
    read = {label: normalized(label) for label in labels}
    return [(a, b) for a in labels for b in labels if a != b and read[a] in read[b]]


def normalized(text: str) -> str:
    """Return a text as answers and labels are compared: in lower case, letters and digits only, one space between words."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() or unicodedata.combining(c) else " " for c in folded).split())


# Splits --------------------------------------------------------------------------------------------------------------------


def split_questions(task: LabelTask, directory: Path) -> OpenSplits:
    """Return train and validation, and keep them in `directory`, where a later call finds them; a test split is kept unseen.

    Raises UserError for rows that are no questions, and for splits without questions.
    """
    paths = {name: directory / f"{name}.jsonl" for name in ("train", "validation", "test")}
    remarks: list[str] = []
    if not paths["validation"].is_file():  # written last
        make_directory(directory)
        train, validation, test = _divide(task, remarks)
        if test is not None:
            _write_questions(paths["test"], test)
        write_whole(directory / "remarks.json", json.dumps(remarks, ensure_ascii=False) + "\n")
        _write_questions(paths["train"], train)
        _write_questions(paths["validation"], validation)
    kept = json.loads((directory / "remarks.json").read_text("utf-8"))
    return OpenSplits(*(read_questions(paths[name], task.labels) for name in ("train", "validation")), tuple(kept))


def divided(task: LabelTask) -> OpenSplits:
    """Return train and validation without keeping anything. Raises UserError as `split_questions` does."""
    remarks: list[str] = []
    train, validation, _ = _divide(task, remarks)
    return OpenSplits(train, validation, tuple(remarks))


def _divide(
    task: LabelTask, remarks: list[str]
) -> tuple[list[TaskQuestion], list[TaskQuestion], list[TaskQuestion] | None]:
    """Return train, validation, and the test split if it is made of train and not a file of its own."""
    train = _each_text_once(read_questions(task.train, task.labels), "train", set(), remarks)
    test = None
    if task.test is None:
        test = [each for each in train if hash_share("test", each.text) < TEST_SHARE]
        train = [each for each in train if hash_share("test", each.text) >= TEST_SHARE]
        remarks.append(f"{len(test)} questions of train are set aside as test, because the task names none")
    if task.validation is not None:
        seen = {normalized(each.text) or each.text for each in [*train, *(test or [])]}
        validation = _each_text_once(read_questions(task.validation, task.labels), "validation", seen, remarks)
    else:
        validation = [each for each in train if hash_share("validation", each.text) < VALIDATION_SHARE]
        train = [each for each in train if hash_share("validation", each.text) >= VALIDATION_SHARE]
        remarks.append(f"{len(validation)} questions of train are set aside as validation, because the task names none")
    if lacking := [label for label in task.labels if all(each.label != label for each in train)]:
        remarks.append(f"no training question has the label {', '.join(map(repr, lacking))}: no sample can show it")
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        if part is not None and not part:
            raise UserError(f"{task.train}: no questions are left for {name}; give the task more, or a file for {name}")
    return train, validation, test


def read_test(
    task: LabelTask, directory: Path, earlier: Sequence[TaskQuestion]
) -> tuple[list[TaskQuestion], list[str]]:
    """Return the test split, and a remark about questions that are left out because an earlier split has their text.

    Call this only after the choice has been made: nothing before it opens the file. Raises UserError.
    """
    remarks: list[str] = []
    seen = {normalized(each.text) or each.text for each in earlier}
    path = task.test or directory / "test.jsonl"
    questions = _each_text_once(read_questions(path, task.labels), "test", seen, remarks)
    if not questions:
        raise UserError(f"{path}: no question is left that train and validation do not hold, too")
    return questions, remarks


def read_questions(path: Path, labels: Sequence[str]) -> list[TaskQuestion]:
    """Return the questions of a file. Raises UserError for the first row that is none."""
    by_reading, found, ids = {normalized(label): label for label in labels}, [], set()
    for number, record in enumerate(read_objects(path)):
        row, wrong = record.value, f"{record.where}: is not a question"
        if isinstance(row.get("label"), (bool, int)):  # JSON's 1 or true, for the labels "1" or "true"
            row = {**row, "label": str(row["label"])}
        for key in ("text", "label"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise UserError(f"{wrong}: its {key} is missing or not a text")
        label = by_reading.get(normalized(row["label"]))
        if label is None:
            raise UserError(f"{wrong}: its label {row['label']!r} is none of {', '.join(labels)}")
        name = str(row.get("id", f"{path.name.partition('.')[0]}.{number}"))
        if name in ids:
            raise UserError(f"{wrong}: its id {name!r} stands there twice")
        ids.add(name)
        known = row.get("zero_shot_correct", row.get("zero_shot")) or {}
        if not isinstance(known, dict):
            raise UserError(f"{wrong}: zero_shot_correct must give 1 or 0 for each model")
        found.append(
            TaskQuestion(name, row["text"].strip(), label, {model: bool(right) for model, right in known.items()})
        )
    return found


def _each_text_once(questions: list[TaskQuestion], name: str, seen: set[str], remarks: list[str]) -> list[TaskQuestion]:
    """Return the questions whose text is not in `seen` and comes for the first time."""
    kept, taken = [], set(seen)
    for question in questions:
        text = normalized(question.text) or question.text
        if text not in taken:
            taken.add(text)
            kept.append(question)
    if left_out := len(questions) - len(kept):
        where = "an earlier split or row has" if seen else "an earlier row has"
        remarks.append(f"{left_out} of {len(questions)} questions of {name} are left out: {where} the same text")
    return kept


def _write_questions(path: Path, questions: Sequence[TaskQuestion]) -> None:
    write_whole(path, repair_text("".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in questions)))


def hash_share(salt: str, text: str) -> float:
    """A number from [0, 1) that depends on the text's words alone."""
    digest = hashlib.blake2b(f"{salt}:{normalized(text) or text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / (1 << 64)


def first_by_hash(questions: Sequence[TaskQuestion], most: int | None) -> list[TaskQuestion]:
    """Return `most` questions, chosen by their hash, in the order of the file; all if `most` is None."""
    if most is None or len(questions) <= most:
        return list(questions)
    chosen = {each.id for each in sorted(questions, key=lambda each: hash_share("first", each.text))[:most]}
    return [each for each in questions if each.id in chosen]
