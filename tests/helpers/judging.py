"""What tests of the judge share: questions, answers, a judge, and the verbs as a user calls them."""

import json
import re

from fastft import cli
from fastft.judge.judgment import Judgment, read_judgments

SECRET = "sk-very-secret-0123456789"


def run_judge(arguments: list[str]) -> int:
    """Run `fastft judge` and return its exit code."""
    return cli.main(["judge", *arguments])


def run_answer(arguments: list[str]) -> int:
    """Run `fastft answer` and return its exit code."""
    return cli.main(["answer", *arguments])


def judged(tmp_path) -> list[Judgment]:
    """Return the judgments of the run whose command line `write_ground` has returned."""
    return read_judgments(tmp_path / "judged/judgments.jsonl")


def longer_wins(body: dict, number: int = 0) -> str:
    """Judge without taste: the longer answer is the better one."""
    prompt = body["messages"][0]["content"]
    lengths = [
        len(re.search(rf"<answer of Assistant {n} \w+>\n(.*?)\n</answer of Assistant {n}", prompt, re.DOTALL)[1])
        for n in (1, 2)
    ]
    scores = [5 + (lengths[0] > lengths[1]), 5 + (lengths[1] > lengths[0])]
    return json.dumps({"explanation": f"{lengths}", "score_1": scores[0], "score_2": scores[1]})


def write_ground(tmp_path, questions: int = 10, models: tuple[str, ...] = ("a", "b")) -> list[str]:
    """Write questions and answers; later models write longer. Returns the options of `fastft judge` without a judge."""
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
    """Run `fastft judge`, which must fail, and return its last line, which must be the error and hold no key."""
    capsys.readouterr()
    assert run_judge(arguments) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: "), said
    assert SECRET not in said[-1]
    return said[-1]
