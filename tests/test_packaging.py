"""The wheel that users install holds every file that the modules read: templates, price lists, prompts, questions, the demo."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Files of the packages that git knows, and new ones that it does not ignore."""
    command = [
        "git",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "--deduplicate",
        "-z",
        "fastft",
        "cleaning",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def installed(tracked, tmp_path_factory) -> Path:
    """What a wheel, built from a copy of the tracked files alone, installs."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in [*tracked, "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    offline = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    build = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(source / "dist"), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_the_wheel_holds_every_file_of_the_packages(tracked, installed):
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith("fastft-")} == set(tracked)
    changed = [name for name in tracked if (installed / name).read_bytes() != (ROOT / name).read_bytes()]
    assert not changed, "edited while this test ran, or not the file that was built"


def test_the_installed_command_runs_away_from_the_checkout(installed, tmp_path):
    """The console script's function, in another directory, and with it the 80 questions that ship."""
    [entry_points] = installed.glob("fastft-*.dist-info/entry_points.txt")
    scripts = configparser.ConfigParser()
    scripts.read(entry_points)
    assert dict(scripts["console_scripts"]) == {"fastft": "fastft.cli:command"}
    code = f"import fastft.cli, sys; assert fastft.cli.__file__.startswith({str(installed)!r}); fastft.cli.command()"
    run = lambda *argv: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code, *argv],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert run("--version").stdout.startswith("fastft ")
    answered = run("answer", "-o", "answers.jsonl", "--model", "http://127.0.0.1:9/v1#x", "--dry_run")
    assert answered.returncode == 0 and "80 " in answered.stdout + answered.stderr, answered.stderr
