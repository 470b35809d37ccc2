"""The cleaner on Ray gives the bytes that worker processes give. `make test-cluster` installs Ray and runs this."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cleaning_runs import contents, dump

import cleaning.first_pass
from cleaning.pipeline import clean
from cleaning.settings import FilterSettings
from fastft.errors import UserError


def test_without_ray_or_a_cluster_it_is_one_line(tmp_path):
    """In a process of its own: Ray does not recover from an address where nobody answers."""
    command = [
        sys.executable,
        "-m",
        "cleaning",
        dump(tmp_path / "d.json"),
        "-o",
        tmp_path / "out",
        "--ray",
        "ray://127.0.0.1:1",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(errors) == 1 and "--ray" in errors[0] and "Traceback" not in result.stderr


def test_the_result_is_the_same_on_ray(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(cleaning.first_pass, "SHARD_BYTES", 4_000)
    source = dump(tmp_path / "d.json", 300)
    clean([source], tmp_path / "here", holdout=0.1, workers=1)
    clean([source], tmp_path / "ray", holdout=0.1, workers=2, ray="")
    assert contents(tmp_path / "here") == contents(tmp_path / "ray")


def test_what_a_task_raises_is_what_the_function_raised(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    faulty = tmp_path / "faulty.py"
    faulty.write_text("def f(conversation):\n    return 1 / 0\n")
    settings = FilterSettings(own_filters=(f"{faulty}:f",))
    with pytest.raises(UserError, match="ZeroDivisionError"):
        clean([dump(tmp_path / "d.json")], tmp_path / "out", settings=settings, ray="", workers=1)
