"""Calls of the cleaner's command, a dump for tests of interrupted runs, and what a run has written."""

import json
from collections.abc import Sequence
from pathlib import Path

from fastft import cli

PAGE = '<div class="markdown prose w-full break-words"><p>%s</p></div>'


def clean_command(arguments: Sequence[str]) -> int:
    """`fastft clean ARGUMENTS`; returns the exit code."""
    return cli.main(["clean", *arguments])


def dump(path: Path, conversations: int = 60) -> Path:
    """Write a dump with duplicates, broken records, repeated ids and rounds that are dropped."""
    records = [
        {
            "id": str(i % 50),
            "conversations": [
                {"from": "human", "value": f"question {i % 55} of many"},
                {"from": "gpt", "value": PAGE % f"answer {i % 55} " * (i % 7 + 1) if i % 9 else "network error"},
                {"from": "human", "value": "and?"},
                {"from": "gpt", "value": PAGE % f"more {i}"},
            ],
        }
        for i in range(conversations)
    ]
    path.write_text(json.dumps([*records, 3, {"id": "x"}])[:-9])
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """The outputs of a finished run, by name."""
    assert not (directory / ".partial").exists()
    return {path.name: path.read_bytes() for path in directory.iterdir()}
