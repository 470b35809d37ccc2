"""Environments of the clients, one each under .venv-clients/: made on first use, with exactly the versions that stand here.

A client that is changed here gets a new environment; `make clean` removes all of them.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".venv-clients"
PACKAGES = {
    "openai-2": ["openai==2.54.0"],
    "openai-3": ["openai==3.57.0"],
    "langchain": ["langchain-openai==1.7.4"],
    "llm": ["llm==0.32.1"],
    "pydantic-ai": ["pydantic-ai-slim[openai]==2.31.1"],
    "aider": ["aider-chat==0.86.2"],
    "lm-eval": ["lm-eval[api]==0.4.13"],
    "open-webui": ["open-webui==0.12.4"],
    "playwright": ["playwright==1.65.2"],
    "smg": ["smg==1.13.0"],
    "ray": ["ray[serve]==2.60.0"],
}
WITH_OURS = {"ray"}
"""Environments in which fastft runs, too: what they lack is taken from the one that runs this."""
NODE_PACKAGES = {"openai-node": ["openai@7.59.0"], "continue": ["@continuedev/cli@1.5.47"]}


def program(environment: str, name: str) -> str:
    """Path of a program in an environment of Python."""
    packages = PACKAGES[environment]
    place = PLACE / environment
    if not _is_ready(place, packages):
        _make(
            place,
            packages,
            [sys.executable, "-m", "venv", place],
            [f"{place}/bin/python", "-m", "pip", "install", "-q"],
        )
        if environment in WITH_OURS:
            [packages_of_it] = place.glob("lib/python*/site-packages")
            (packages_of_it / "fastft.pth").write_text(f"{ROOT}\n{sysconfig.get_paths()['purelib']}\n")
    return str(place / "bin" / name)


def node_modules(environment: str) -> Path:
    """Where the packages of an environment of Node lie. Skips the test where there is no Node."""
    packages, place = NODE_PACKAGES[environment], PLACE / environment
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("SKIPPED ALOUD: this client needs node and npm, and they are not here")
    if not _is_ready(place, packages):
        install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(place)]
        _make(place, packages, ["mkdir", "-p", str(place)], install)
    return place / "node_modules"


def _is_ready(place: Path, packages: list[str]) -> bool:
    ready = place / "ready"
    return ready.is_file() and ready.read_text().split() == packages


def _make(place: Path, packages: list[str], begin: list, install: list[str]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    for command in (begin, [*install, *packages]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{place.name}: {done.stderr[-2000:]}"
    (place / "ready").write_text("\n".join(packages))
