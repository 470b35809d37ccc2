"""Let real small models answer real tasks with and without grimoires that GPT-4 wrote, by `fastft grimoire` from end to end.

    python benchmarks/grimoire.py --data DATA/grimoire --weak models/smollm2-135m-instruct --task TREC -o runs/grimoire-trec

The strong model is a scripted endpoint on this machine. It hands out the archived texts of Grimoire's repository: each prompt
for a profound grimoire gets one of the task's, in order, and each prompt for a simple one the archived short form of its text.
So the texts are GPT-4's, but for other samples than those that our samplers have drawn.
"""

import gzip
import json
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import openai_server

from fastft.common.command_line import option, parse, run
from fastft.compose.grimoire import build, evaluate
from fastft.compose.grimoire.answering.weak import Dtype
from fastft.compose.grimoire.writing.samplers import SAMPLERS

PREFIX = "process and methods step by step:\n\n"  # ends what the repository puts before every grimoire


@dataclass(kw_only=True)
class GrimoireBenchmark:
    """Which model tries which task, on how many questions."""

    data: Path
    """The folder with TASK_train.jsonl.gz, TASK_test.jsonl.gz, tasks.json and grimoires.jsonl."""
    task: str = "TREC"
    """TREC, Subj, AgNews or RTE."""
    weak: str
    """The weak model's directory, or URL#name."""
    template: str | None = None
    """Its chat template, if its tokenizer has none."""
    train: int = 150
    """Training questions at most."""
    validation: int = 100
    """Validation questions at most."""
    test: int = 100
    """Test questions at most."""
    dtype: Dtype | None = None
    """As in fastft grimoire build."""
    samplers: str = ",".join(SAMPLERS)
    """As in fastft grimoire build."""
    calibrate: bool = False
    """As in fastft grimoire build."""
    output: Path = option(short="-o")
    """A directory for everything."""


def archived(data: Path, task: str) -> list[tuple[str, str]]:
    """Return the pairs (profound, simple) of a task, without the sentence that all of them begin with."""
    rows = [json.loads(line) for line in (data / "grimoires.jsonl").read_text("utf-8").splitlines()]
    return [
        tuple(row[kind].split(PREFIX)[-1].strip() for kind in ("profound", "simple"))
        for row in rows
        if row["task"] == task
    ]


@contextmanager
def scripted_strong(pairs: list[tuple[str, str]]):
    """Serve the pairs as a chat model, and yield its address."""
    given: dict[str, str] = {}
    lock = threading.Lock()

    def reply(prompt: str) -> str:
        for profound, simple in pairs:
            if profound in prompt:
                return simple
        with lock:
            return given.setdefault(prompt, pairs[len(given) % len(pairs)][0])

    with openai_server.endpoint(lambda body, number: reply(body["messages"][-1]["content"])) as server:
        yield f"{server.url}#archive"


def write_task(data: Path, name: str, output: Path) -> Path:
    """Write the task as a user would, with unpacked splits, and return its file."""
    output.mkdir(parents=True, exist_ok=True)
    row = json.loads((data / "tasks.json").read_text("utf-8"))[name]
    for split in ("train", "test"):
        content = gzip.decompress((data / f"{name}_{split}.jsonl.gz").read_bytes())
        (output / f"{name}_{split}.jsonl").write_bytes(content)
    task = {"name": name, "description": row["description"], "labels": row["labels"]}
    files = {split: f"{name}_{split}.jsonl" for split in ("train", "test")}
    (output / f"{name}.yaml").write_text(yaml.safe_dump({**task, **files}, sort_keys=False), "utf-8")
    return output / f"{name}.yaml"


def main() -> int:
    [config] = parse(sys.argv[1:], "benchmarks/grimoire.py", "Try grimoires on real models.", GrimoireBenchmark)
    task, where = write_task(config.data, config.task, config.output), str(config.output / "made")
    with scripted_strong(archived(config.data, config.task)) as strong:
        # The port is another one at each start; what was written is kept, so a second start needs no strong model.
        written = (config.output / "made/grimoires.jsonl").is_file()
        made = config.output / "made/settings.json"
        named = json.loads(made.read_text())["strong"] if made.is_file() and written else strong
        options = [
            "--strong",
            named,
            "--concurrency",
            "1",
            *(["--template", config.template] if config.template else []),
        ]
        limits = ["--max_train", str(config.train), "--max_validation", str(config.validation)]
        limits += ["--samplers", config.samplers, *(["--dtype", config.dtype] if config.dtype else [])]
        calibrate = ["--calibrate"] if config.calibrate else []
        build.main([str(task), "--weak", config.weak, "-o", where, *options, *limits, *calibrate])
        return evaluate.main([where, "--max_test", str(config.test)])


if __name__ == "__main__":
    sys.exit(run(main))
