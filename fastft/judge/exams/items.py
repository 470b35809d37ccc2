"""Multiple-choice exams as Orca's paper reports them, from local files: BIG-Bench Hard and AGIEval in English.

DATA/bbh/*.json and DATA/agieval/*.jsonl are the files of the two projects' repositories, unchanged. They become
questions whose options have letters, and tasks for lm-evaluation-harness that anybody can run:

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

from fastft.common.records import read_records
from fastft.errors import UserError

SUITES = {"bbh": "bbh/{}.json", "agieval": "agieval/{}.jsonl"}
SOURCES = {
    "bbh": "github.com/suzgunmirac/BIG-Bench-Hard, folder bbh",
    "agieval": "github.com/ruixiangcui/AGIEval, folder data/v1_1",
}
MODELS = ("Vicuna", "Orca", "TD-003", "ChatGPT", "GPT-4")  # the columns of published.csv
ASK = "Answer with the letter of the right option."
WORDS = {  # what BBH leaves to its instructions
    "boolean_expressions": ("True", "False"),
    "sports_understanding": ("yes", "no"),
    "web_of_lies": ("Yes", "No"),
}


@dataclass(frozen=True)
class Item:
    """`options`: the letters that an answer may name; `gold`: the right one."""

    prompt: str
    options: str
    gold: str


@dataclass(frozen=True)
class Published:
    """A line of Orca's tables 8 and 11 (arXiv:2306.02707): accuracy in percent by model, None where there is none."""

    suite: str
    task: str
    items: int
    accuracy: dict[str, float | None]

    @property
    def name(self) -> str:
        """What the task is called in the harness."""
        return f"fastft_{self.suite}_{self.task}"


def published() -> list[Published]:
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
    """`wanted`: suites and tasks, separated by commas. Raises UserError for one that does not exist."""
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
    """The items of a task, and a line for each that cannot be asked. Raises UserError where the file is missing or no exam."""
    path = data / SUITES[exam.suite].format(exam.task)
    if not path.is_file():
        raise UserError(f"{path}: no such file; its home is {SOURCES[exam.suite]}")
    items, skipped = [], []
    for where, row in _rows(path, exam.suite):
        try:
            items.append(_bbh_item(row, exam.task) if exam.suite == "bbh" else _agieval_item(row))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            why = str(error) if type(error) is ValueError else "has not the shape of the others"
            skipped.append(f"{where}: {why}")
    if not items:
        raise UserError(f"{path}: holds no multiple-choice questions ({skipped[0] if skipped else 'it is empty'})")
    return items, skipped


def _rows(path: Path, suite: str) -> Iterator[tuple[str, Any]]:
    if suite == "agieval":
        for index, record in enumerate(read_records(path)):
            if record.error:
                raise UserError(f"{record.where}: {record.error}")
            yield f"{path.stem}[{index}]", record.value
        return
    try:
        examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is no JSON object with examples; its home is {SOURCES[suite]}") from None
    for index, row in enumerate(examples):
        yield f"{path.stem}[{index}]", row


def _bbh_item(row: dict[str, str], task: str) -> Item:
    """Options with letters stay as they are; words (- Yes, - No) get letters. Raises UserError for a malformed one."""
    question, mark, listed = row["input"].partition("Options:\n")
    target = row["target"].strip()
    lines = [line.strip() for line in listed.splitlines() if line.strip()]
    if mark and all(re.match(r"\([A-Z]\)", line) for line in lines):
        letters = "".join(line[1] for line in lines)
        return _checked(f"{row['input'].strip()}\n\n{ASK}", letters, target.strip("()"), target)
    words = [line.removeprefix("-").strip() for line in lines] if mark else list(WORDS.get(task, ()))
    right = words.index(target) if target in words else -1
    return _lettered(question.strip(), words, "" if right < 0 else chr(ord("A") + right), target)


def _agieval_item(row: dict[str, Any]) -> Item:
    words = [re.sub(r"^\(?[A-Z]\)\s*", "", option.strip()) for option in row["options"]]
    question = "\n\n".join(part.strip() for part in (row.get("passage"), row["question"]) if part)
    return _lettered(question, words, row["label"].strip("() "), row["label"])


def _lettered(question: str, words: list[str], gold: str, target: str) -> Item:
    letters = "".join(chr(ord("A") + index) for index in range(len(words)))
    options = "\n".join(f"({letter}) {word}" for letter, word in zip(letters, words))
    return _checked(f"{question}\nOptions:\n{options}\n\n{ASK}", letters, gold, target)


def _checked(prompt: str, letters: str, gold: str, target: str) -> Item:
    if len(letters) < 2 or letters != "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(letters)]:
        raise ValueError(f"its options are {letters or 'missing'}")
    if len(gold) != 1 or gold not in letters:
        raise ValueError(f"its target {target!r} is none of its options {letters}")
    return Item(prompt, letters, gold)


# Reading an answer ---------------------------------------------------------------------------------------------------------


def first_capital(text: str, options: str) -> str | None:
    """Orca's rule: the first capital letter that is an option. It reads "Answer: (B)" as A."""
    return next((character for character in text if character in options), None)


def lone_letter(text: str, options: str) -> str | None:
    """The first option's letter that stands alone. It reads "Answer: (B)" as B, and "A dog." as A."""
    found = re.search(rf"(?<![^\W_])[{options}](?![^\W_]|['’])", text)
    return found and found[0]


def score(item: dict[str, str], results: list[str]) -> dict[str, float]:
    """An answer by both rules; the harness calls this (`process_results`)."""
    (answer,) = results
    letter = first_capital(answer, item["options"])
    return {
        "first_capital": float(letter == item["gold"]),
        "lone_letter": float(lone_letter(answer, item["options"]) == item["gold"]),
        "no_letter": float(letter is None),
    }


METRICS = {"first_capital": True, "lone_letter": True, "no_letter": False}  # is higher better


def write_task(directory: Path, exam: Published, items: list[Item]) -> None:
    """The task and its data, two files. `!function` needs fastft to be installed where the harness runs."""
    import yaml

    directory.mkdir(parents=True, exist_ok=True)
    data = directory / f"{exam.name}.jsonl"
    data.write_text("".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
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
    (directory / f"{exam.name}.yaml").write_text(text, encoding="utf-8")
