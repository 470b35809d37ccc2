"""What tests of grimoires share: a small task, and a weak and a strong model that answer by script."""

import json
from pathlib import Path

import yaml

LABELS = ("even", "odd")
RULE = "look at the last digit alone"
WORDS = "one two three four five six seven eight nine ten eleven twelve".split()


def rows(count: int, start: int = 0) -> list[dict]:
    """Questions whose label depends on the last digit; no two share eight words in a row."""
    made = []
    for number in range(start, start + count):
        words = [WORDS[(number * (place + 3) + place * place) % len(WORDS)] for place in range(9)]
        text = f"Box {number}: {' '.join(words)} and {number * 7 + 1}"
        made.append({"id": f"q{number}", "text": text, "label": LABELS[(number * 7 + 1) % 2]})
    return made


def write_rows(path: Path, made: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), "utf-8")


def write_task(directory: Path, counts: tuple[int, int, int] = (30, 24, 20), **changed) -> Path:
    """Write a task with three files, and return its YAML file. `changed` replaces keys; None leaves one out."""
    directory.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(("train", "validation", "test")):
        write_rows(directory / f"{name}.jsonl", rows(counts[place], 1000 * place))
    task = {
        "name": "parity",
        "description": "Say whether the last number is even or odd.",
        "labels": list(LABELS),
        **{name: f"{name}.jsonl" for name in ("train", "validation", "test")},
        **changed,
    }
    path = directory / "task.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in task.items() if value is not None}), "utf-8")
    return path


def is_for_strong(body: dict) -> bool:
    return body["model"] == "strong"


def scripted(body: dict, number: int = 0) -> str:
    """The strong model knows the rule only if it sees no examples, and its short form loses it. The weak model is right if
    it is told the rule, and says "even" otherwise.
    """
    told, asked = body["messages"][0]["content"], body["messages"][-1]["content"]
    if is_for_strong(body):
        if "Shorten these instructions" in told:
            return "Think hard before you answer even or odd."
        return "Read it twice." if "Examples with their right answers" in told else f"To decide, {RULE}: even or odd."
    label = LABELS[int(asked[-1]) % 2] if RULE in told else "even"
    return json.dumps({"answer": label}) if "response_format" in body else label
