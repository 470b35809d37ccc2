"""Read the multiple-choice exams of Orca's paper from local files: BIG-Bench Hard, and AGIEval in English.

DATA/bbh/*.json and DATA/agieval/*.jsonl are the unchanged files of the two projects' repositories. They become questions
whose options have letters, and tasks for lm-evaluation-harness that anybody can run:

    lm_eval --include_path OUTPUT/tasks --tasks fastft_bbh_snarks --model …

`fastft bench` (fastft.judge.exams.bench) asks them.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastft.common.files import make_directory, write_whole
from fastft.common.records import read_records, repair_text
from fastft.errors import UserError

SUITES = {"bbh": "bbh/{}.json", "agieval": "agieval/{}.jsonl"}
SOURCES = {
    "bbh": "github.com/suzgunmirac/BIG-Bench-Hard, folder bbh",
    "agieval": "github.com/ruixiangcui/AGIEval, folder data/v1_1",
}
MODELS = ("Vicuna", "Orca", "TD-003", "ChatGPT", "GPT-4")  # the columns of published.csv; TD-003 is text-davinci-003
ASK = "Answer with the letter of the right option."
WORDS = {  # options that are not in the questions, because BBH names them in its instructions
    "boolean_expressions": ("True", "False"),
    "sports_understanding": ("yes", "no"),
    "web_of_lies": ("Yes", "No"),
}


@dataclass(frozen=True)
class Item:
    """A question with lettered options. `options` are the letters that an answer may name, `gold` is the right one."""

    prompt: str
    options: str
    gold: str


@dataclass(frozen=True)
class Published:
    """A line of Orca's tables 8 and 11 (arXiv:2306.02707): accuracy in percent by model, None if none was published."""

    suite: str
    task: str
    items: int
    accuracy: dict[str, float | None]

    @property
    def name(self) -> str:
        """The task's name in the harness."""
        return f"fastft_{self.suite}_{self.task}"


class MalformedItem(Exception):
    """An item of an exam that cannot be asked; the message says why."""


def published() -> list[Published]:
    """Return all tasks with their published results."""
    with open(Path(__file__).with_name("published.csv"), newline="", encoding="utf-8") as file:
        return [
            Published(
                row["suite"],
                row["task"],
                int(row["items"]),
                {model: float(row[model]) if row[model] else None for model in MODELS},
            )
            for row in csv.DictReader(file)
        ]


def chosen(wanted: str) -> list[Published]:
    """Return the tasks that `wanted` names: suites and tasks, separated by commas. Raises UserError for an unknown one."""
    known, found = published(), {}
    for name in filter(None, map(str.strip, wanted.split(","))):
        fitting = [row for row in known if name in (row.suite, row.task, f"{row.suite}/{row.task}")]
        if not fitting:
            tasks = ", ".join(row.task for row in known)
            raise UserError(f"--tasks {name}: there are the suites {', '.join(SUITES)} and the tasks {tasks}")
        found |= {row.name: row for row in fitting}
    if not found:
        raise UserError("--tasks is empty: give bbh, agieval or names of tasks")
    return list(found.values())


def load_items(data: Path, exam: Published) -> tuple[list[Item], list[str]]:
    """Return the items of a task, and a line for each that cannot be asked.

    Raises UserError if the file is missing, or holds no item that can be asked.
    """
    path = data / SUITES[exam.suite].format(exam.task)
    if not path.is_file():
        raise UserError(f"{path}: no such file; it comes from {SOURCES[exam.suite]}")
    items, skipped = [], []
    for where, row in _rows(path, exam.suite):
        try:
            items.append(_bbh_item(row, exam.task) if exam.suite == "bbh" else _agieval_item(row))
        except MalformedItem as error:
            skipped.append(f"{where}: {error}")
    if not items:
        raise UserError(f"{path}: holds no multiple-choice questions ({skipped[0] if skipped else 'it is empty'})")
    return items, skipped


def _rows(path: Path, suite: str) -> Iterator[tuple[str, Any]]:
    """Yield (task[index], row) of a file. Raises UserError if it cannot be read."""
    if suite == "agieval":
        for index, record in enumerate(read_records(path)):
            if record.error:
                raise UserError(f"{record.where}: {record.error}")
            yield f"{path.stem}[{index}]", record.value
        return
    try:
        examples = json.loads(path.read_bytes())["examples"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        examples = None
    if not isinstance(examples, list):
        raise UserError(f"{path}: is not a JSON object with examples; the file comes from {SOURCES[suite]}")
    for index, row in enumerate(examples):
        yield f"{path.stem}[{index}]", row


def _text(row: Any, key: str) -> str:
    """Return the text under `key`. Raises MalformedItem if there is none."""
    if not isinstance(row, dict) or not isinstance(row.get(key), str):
        raise MalformedItem(f"its {key} is missing or not a text")
    return row[key]


def _bbh_item(row: Any, task: str) -> Item:
    """Return a BBH item. Options with letters stay as they are; those that are words (- Yes, - No) get letters."""
    text, target = _text(row, "input"), _text(row, "target").strip()
    question, mark, listed = text.partition("Options:\n")
    lines = [line.strip() for line in listed.splitlines() if line.strip()]
    if mark and all(re.match(r"\([A-Z]\)", line) for line in lines):
        letters = "".join(line[1] for line in lines)
        return _checked(f"{text.strip()}\n\n{ASK}", letters, target.strip("()"), target)
    words = [line.removeprefix("-").strip() for line in lines] if mark else list(WORDS.get(task, ()))
    right = words.index(target) if target in words else -1
    return _lettered(question.strip(), words, "" if right < 0 else chr(ord("A") + right), target)


def _agieval_item(row: Any) -> Item:
    """Return an AGIEval item: the passage, if there is one, then the question, then the options with letters."""
    question, label = _text(row, "question"), _text(row, "label")
    options, passage = row.get("options"), row.get("passage") or ""
    if not isinstance(options, list) or not all(isinstance(each, str) for each in [*options, passage]):
        raise MalformedItem("its options or its passage are not texts")
    words = [re.sub(r"^\(?[A-Z]\)\s*", "", option.strip()) for option in options]
    whole = "\n\n".join(part.strip() for part in (passage, question) if part)
    return _lettered(whole, words, label.strip("() "), label)


def _lettered(question: str, words: list[str], gold: str, target: str) -> Item:
    letters = "".join(chr(ord("A") + index) for index in range(len(words)))
    options = "\n".join(f"({letter}) {word}" for letter, word in zip(letters, words))
    return _checked(f"{question}\nOptions:\n{options}\n\n{ASK}", letters, gold, target)


def _checked(prompt: str, letters: str, gold: str, target: str) -> Item:
    """Return the item. Raises MalformedItem if the letters are not A, B, C …, or if none of them is the target."""
    if len(letters) < 2 or letters != "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(letters)]:
        raise MalformedItem(f"its options are {letters or 'missing'}")
    if len(gold) != 1 or gold not in letters:
        raise MalformedItem(f"its target {target!r} is none of its options {letters}")
    return Item(prompt, letters, gold)


def first_capital(text: str, options: str) -> str | None:
    """Return the first capital letter that is an option, which is Orca's rule. It reads "Answer: (B)" as A."""
    return next((character for character in text if character in options), None)


def lone_letter(text: str, options: str) -> str | None:
    """Return the first letter of an option that stands alone. This reads "Answer: (B)" as B, and "A dog." as A."""
    found = re.search(rf"(?<![^\W_])[{options}](?![^\W_]|['’])", text)
    return found and found[0]


def score(item: dict[str, str], results: list[str]) -> dict[str, float]:
    """Score an answer by both rules; the harness calls this (`process_results`)."""
    (answer,) = results
    letter = first_capital(answer, item["options"])
    return {
        "first_capital": float(letter == item["gold"]),
        "lone_letter": float(lone_letter(answer, item["options"]) == item["gold"]),
        "no_letter": float(letter is None),
    }


METRICS = {"first_capital": True, "lone_letter": True, "no_letter": False}  # whether higher is better


def write_task(directory: Path, exam: Published, items: list[Item]) -> None:
    """Write a task and its data, two files. The harness needs fastft to be installed for the task's `!function`."""
    import yaml

    make_directory(directory)
    data = directory / f"{exam.name}.jsonl"
    write_whole(data, repair_text("".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)))
    task = {
        "task": exam.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{gold}}",
        "num_fewshot": 0,
        "generation_kwargs": {"until": [], "do_sample": False},
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": better} for name, better in METRICS.items()
        ],
        "metadata": {"version": 1.0},
    }
    text = yaml.safe_dump(task, sort_keys=False) + "process_results: !function fastft.judge.exams.items.score\n"
    write_whole(directory / f"{exam.name}.yaml", text)
