"""Questions, answers and a judge for tests."""

import json
import re

from fastft import cli
from fastft.judge.judgment import Judgment, read_judgments

SECRET = "sk-very-secret-0123456789"


def run_judge(arguments: list[str]) -> int:
    """The exit code of `fastft judge`."""
    return cli.main(["judge", *arguments])


def run_answer(arguments: list[str]) -> int:
    """The exit code of `fastft answer`."""
    return cli.main(["answer", *arguments])


def judged(tmp_path) -> list[Judgment]:
    """The judgments of the run whose command `write_ground` returned."""
    return read_judgments(tmp_path / "judged/judgments.jsonl")


def longer_wins(body: dict, number: int = 0) -> str:
    """A judge without taste: the longer answer is the better one."""
    prompt = body["messages"][0]["content"]
    lengths = [
        len(re.search(rf"<answer of Assistant {n} \w+>\n(.*?)\n</answer of Assistant {n}", prompt, re.DOTALL)[1])
        for n in (1, 2)
    ]
    scores = [5 + (lengths[0] > lengths[1]), 5 + (lengths[1] > lengths[0])]
    return json.dumps({"explanation": f"{lengths}", "score_1": scores[0], "score_2": scores[1]})


def write_ground(tmp_path, questions: int = 10, models: tuple[str, ...] = ("a", "b")) -> list[str]:
    """Questions and answers; later models write longer. Returns the command line of `fastft judge` without a judge."""
    rows = [{"id": f"q{i}", "category": ("one", "two")[i % 2], "turns": [f"What is {i}?"]} for i in range(questions)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for place, model in enumerate(models):
        answers = [
            {"question_id": row["id"], "model": model, "turns": ["word " * (3 + place * (1 + i % 3))]}
            for i, row in enumerate(rows)
        ]
        (tmp_path / f"{model}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    files = [str(tmp_path / f"{model}.jsonl") for model in models]
    return ["--answers", *files, "--questions", str(tmp_path / "questions.jsonl"), "-o", str(tmp_path / "judged")]


def error_of(capsys, arguments: list[str]) -> str:
    """The one line that it says before it has asked anything."""
    capsys.readouterr()
    assert run_judge(arguments) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: "), said
    assert SECRET not in said[-1]
    return said[-1]
