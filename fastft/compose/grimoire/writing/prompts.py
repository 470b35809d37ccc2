"""Fill in the prompts: for the strong model that writes grimoires, and for the weak model that answers with their help.

The texts are files beside this module. A directory of one's own (`--prompts DIR`) may replace any of them, by its name.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastft.compose.grimoire.task import LabelTask, TaskQuestion
from fastft.errors import UserError

OWN = Path(__file__).with_name("prompts")
FIELDS = {  # the fields that a prompt must have; it may use the others of its row, too
    "profound": (("task", "labels", "samples"), ("words",)),
    "simple": (("grimoire",), ("labels", "words", "task")),
    "answer": (("task", "help", "labels"), ()),
}


@dataclass(frozen=True)
class PromptTexts:
    """The three texts, with {fields}."""

    profound: str
    simple: str
    answer: str


def load_prompts(directory: Path | None = None) -> PromptTexts:
    """Return our own prompts, or those of `directory` where it has them. Raises UserError for one without a field it needs."""
    if directory is not None and not any((directory / f"{name}.txt").is_file() for name in FIELDS):
        raise UserError(f"--prompts {directory}: holds none of {', '.join(f'{name}.txt' for name in FIELDS)}")
    return PromptTexts(**{name: _load(directory, name) for name in FIELDS})


def _load(directory: Path | None, name: str) -> str:
    own = directory / f"{name}.txt" if directory is not None else None
    path = own if own is not None and own.is_file() else OWN / f"{name}.txt"
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8") from None
    needed, known = FIELDS[name]
    if missing := [each for each in needed if f"{{{each}}}" not in text]:
        raise UserError(f"{path}: has no {{{missing[0]}}}; it needs {', '.join(f'{{{each}}}' for each in needed)}")
    if unknown := [each for each in re.findall(r"\{(\w+)\}", text) if each not in (*needed, *known)]:
        raise UserError(f"{path}: there is no {{{unknown[0]}}} here; it may have {', '.join((*needed, *known))}")
    return text


def fill(text: str, **values: str) -> str:
    """Put the values in their places. What a value contains stays as it is, braces too; no more than one blank line is left."""
    filled = re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), text)
    return re.sub(r"\n{3,}", "\n\n", filled).strip()


def shown_samples(samples: Sequence[TaskQuestion]) -> str:
    """Return the samples as the strong model sees them, "" if there are none."""
    if not samples:
        return ""
    return (
        "Examples with their right answers:\n\n"
        + "\n\n".join(f"{each.text}\nAnswer: {each.label}" for each in samples)
        + "\n"
    )


def system_prompt(texts: PromptTexts, task: LabelTask, help_text: str = "") -> str:
    """Return what the weak model is told before a question; `help_text` is a grimoire, examples, or nothing (zero-shot)."""
    return fill(texts.answer, task=task.description, help=help_text, labels=", ".join(task.labels))


def few_shot_help(examples: Sequence[TaskQuestion]) -> str:
    return "Examples:\n\n" + "\n\n".join(f"{each.text}\nAnswer: {each.label}" for each in examples)
