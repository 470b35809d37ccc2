"""Let DSPy's InferRules write rules for a small model, beside zero-shot, on the same questions as `benchmarks/grimoire.py`.

    python -m venv dspy && dspy/bin/pip install dspy
    python benchmarks/grimoire_dspy.py --dspy dspy/bin/python --made runs/grimoire-trec/made --data DATA/grimoire

InferRules has a teacher induce rules from training examples, and keeps the best of several on validation questions, by the
mean alone. It runs in an environment of its own and asks two endpoints of this process. The teacher is scripted, as in
benchmarks/grimoire.py: it hands out the archived texts of GPT-4. The weak model is the real one: it answers in DSPy's form
with its likeliest label, so that its skill counts, and not whether it can write that form.
"""

import json
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from grimoire import archived  # which also makes the tests' helpers importable
from helpers import openai_server

from fastft.common.command_line import parse, run
from fastft.compose.grimoire.choosing.choice import Chosen
from fastft.compose.grimoire.choosing.choose import compare
from fastft.compose.grimoire.task import first_by_hash, read_test
from fastft.data.conversation import Message
from fastft.inference.engine import ChatModel
from fastft.inference.likelihood import answer_likelihoods

FIELD = "[[ ## {} ## ]]\n{}\n\n"
END = "[[ ## completed ## ]]"
PROGRAM = """
import json, sys
import dspy
from typing import Literal
from dspy.teleprompt import InferRules

given = json.load(sys.stdin)
weak, strong = (
    dspy.LM(f"openai/{name}", api_base=given["url"], api_key="none", temperature=0, max_tokens=300, cache=False, num_retries=0)
    for name in ("weak", "strong")
)
dspy.configure(lm=weak, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False))
Label = Literal[tuple(given["labels"])]
signature = dspy.Signature({"text": (str, dspy.InputField()), "label": (Label, dspy.OutputField())}, given["description"])
student = dspy.Predict(signature)
examples = {
    name: [dspy.Example(**row).with_inputs("text") for row in given[name]] for name in ("train", "validation", "test")
}
right = lambda example, said, trace=None: said.label == example.label

def score(program):
    found = {}
    for row in examples["test"]:
        try:
            found[row.id] = float(right(row, program(text=row.text)))
        except Exception:
            found[row.id] = None
    return found

before = score(student)
made = InferRules(
    num_candidates=given["candidates"], num_rules=10, num_threads=1, metric=right, max_bootstrapped_demos=0,
    max_labeled_demos=0, teacher_settings={"lm": strong}, max_errors=1000,
).compile(student, trainset=examples["train"], valset=examples["validation"])
print(json.dumps({"zero-shot": before, "infer-rules": score(made), "rules": made.signature.instructions}))
"""


@dataclass(kw_only=True)
class DspyBenchmark:
    """What is compared, and how much of it."""

    dspy: Path
    """The Python of an environment with dspy."""
    made: Path
    """What benchmarks/grimoire.py has made: OUTPUT/made, evaluated."""
    data: Path
    """The folder with grimoires.jsonl."""
    train: int = 24
    """Training examples that the teacher sees."""
    validation: int = 60
    """Validation questions at most."""
    test: int = 100
    """Test questions at most."""
    candidates: int = 10
    """Sets of rules that are tried."""


def main() -> int:
    what = "Compare DSPy's InferRules on the questions of a grimoire."
    [config] = parse(sys.argv[1:], "benchmarks/grimoire_dspy.py", what, DspyBenchmark)
    choice = Chosen.load(config.made)
    task, split, places = choice.task(), choice.split(), choice.content["places"]
    test, _ = read_test(task, config.made / "splits", [*split.train, *split.validation])
    chat = ChatModel(places["weak"], places["template"], places["dtype"])
    texts, count = [profound for profound, _ in archived(config.data, task.name)], {"weak": 0, "strong": 0}

    def reply(body: dict, number: int) -> str:
        count[body["model"]] += 1
        if body["model"] == "strong":
            rules = texts[(count["strong"] - 1) % len(texts)]
            return FIELD.format("reasoning", "From the examples.") + FIELD.format("natural_language_rules", rules) + END
        messages = [Message(each["role"], each["content"]) for each in body["messages"]]
        answers = [FIELD.format("label", label).strip() for label in task.labels]
        best = int(answer_likelihoods(chat, [messages], answers)[0].argmax())
        return FIELD.format("label", task.labels[best]) + END

    train = random.Random(22).sample(split.train, min(config.train, len(split.train)))
    given = {
        "description": task.description,
        "labels": task.labels,
        "train": [asdict(each) for each in train],
        "validation": [asdict(each) for each in first_by_hash(split.validation, config.validation)],
        "test": [asdict(each) for each in first_by_hash(test, config.test)],
        "candidates": config.candidates,
    }
    with openai_server.endpoint(reply) as server:
        done = subprocess.run(
            [config.dspy, "-c", PROGRAM],
            input=json.dumps({**given, "url": server.url}),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    outcomes = {
        name: {key: right for key, right in found[name].items() if right is not None}
        for name in ("zero-shot", "infer-rules")
    }
    for gain in compare(outcomes, together=False):
        value, low, high = (100 * each for each in (gain.gain.value, gain.gain.low, gain.gain.high))
        print(
            f"{gain.setting}: {100 * gain.accuracy.value:.1f} % of {gain.questions}, gain {value:+.1f} [{low:.1f}, {high:.1f}], "
            f"{len(given['test']) - gain.questions} without a readable answer"
        )
    print(
        f"{count['strong']} calls of the teacher, {count['weak']} of the weak model; dspy's choice is by the mean alone"
    )
    (config.made / "dspy.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
