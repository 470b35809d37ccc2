"""Distillations for tests: files of queries and settings, runs in this process, and what they have written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastft.distill.command import main


def query(number: int, **more: Any) -> dict[str, Any]:
    """A query whose gold answer is in its text, so that a scripted teacher can know it."""
    row = {
        "id": f"q{number}",
        "collection": "mine",
        "task": f"task{number % 3}",
        "query": f"What is {number} plus {number}?",
    }
    return {**row, "gold": str(2 * number), **more}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(tmp_path: Path, url: str | list[str] = "http://127.0.0.1:9/v1", **more: Any) -> dict[str, Any]:
    """Settings with one teacher, whose keys are given with the prefix `teacher_`."""
    teacher = {"name": "first", "url": url, "model": "small", "retries": 2}
    teacher |= {key.removeprefix("teacher_"): more.pop(key) for key in list(more) if key.startswith("teacher_")}
    made = {"queries": str(tmp_path / "queries.jsonl"), "messages": "none", "output": str(tmp_path / "run")}
    return {**made, "teachers": [teacher], **more}


def write_settings(tmp_path: Path, **given: Any) -> str:
    """Write settings as a YAML file (JSON is YAML) and return its path."""
    path = tmp_path / "distill.yaml"
    path.write_text(json.dumps(given))
    return str(path)


def distill(tmp_path: Path, *options: str, **given: Any) -> int:
    """Run `fastft distill` in this process. Raises what its `main` raises."""
    return main([write_settings(tmp_path, **given), *options])


def start(tmp_path: Path, *options: str, **given: Any) -> subprocess.Popen:
    """Run it in a process of its own, in a session of its own."""
    command = [sys.executable, "-m", "fastft.distill.command", write_settings(tmp_path, **given), *options]
    output = open(tmp_path / "output.txt", "ab")  # noqa: SIM115
    return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ledger(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run/ledger.json").read_text())


def plan(tmp_path: Path) -> list[dict[str, Any]]:
    return rows(tmp_path / "run/plan.jsonl")


def kept(tmp_path: Path, stage: int = 1) -> list[dict[str, Any]]:
    return rows(tmp_path / f"run/stage{stage}/conversations.jsonl")


def rejected(tmp_path: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """(id, teacher) -> (status, reason)."""
    found = rows(tmp_path / "run/rejected.jsonl")
    return {(row["id"], row["teacher"]): (row["status"], row["reason"]) for row in found}


def right(body: dict, number: int = 0) -> str:
    """The right answer to a query of `query`, with its reasons."""
    said = body["messages"][-1]["content"]
    half = int(said.split()[2])
    return f"{half} and {half} are put together.\nThe answer is {2 * half}."
