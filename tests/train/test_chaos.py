"""Five preemptions, each in another way, of a real run on 2 processes whose storage cuts its connections.

The first life is started as SkyPilot starts it, by sky_yamls/train.sh with torchrun, and ends with a notice. Twenty
preemptions are in benchmarks/chaos.py.
"""

import random
import sys
from pathlib import Path

import pytest
from helpers import models, storage

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import chaos

from fastft.train.preemption import stop as stopping

ROOT = Path(__file__).parents[2]
LIVES = [("notice", 2, 2), ("kill", 4, 2), ("save", 1, 2), ("lost", 4, 2), ("upload", 1, 2)]
STEPS = 60

# Steps and saves that last long enough for this process to see them, on a busy machine too; the ranks agree every other step.
SLOW = """
import time
from fastft.common import logs
from fastft.common.command_line import leave, run
from fastft.common.distributed import first_to_fail
from fastft.train import loop
from fastft.train.checkpoint import local
from fastft.train.preemption import stop as stopping
def slower(module, name, seconds):
    original = getattr(module, name)
    setattr(module, name, lambda *given: (time.sleep(seconds), original(*given))[1])
slower(loop, "train_step", 0.05)
slower(local, "publish", 0.2)
stopping.NOTICE_S = 1.0
logs.show()
leave(run(loop.main, first_to_fail))
"""
# Replaces torchrun of the environment, because another test may use its port.
ACTIVATE = """
torchrun() {{ local given=("${{@/fastft.train/slow}}"); {python} -m torch.distributed.run "${{given[@]/29500/{port}}}"; }}
"""


def as_skypilot_does(run: chaos.Run, flags: list[str]) -> list[str]:
    """The command of a node with two processes. Its home holds what the YAML and its set-up put there."""
    home = run.ground / "home"
    for directory in ("venv/bin", "data"):
        (home / directory).mkdir(parents=True)
    (home / "venv/bin/activate").write_text(ACTIVATE.format(python=sys.executable, port=29600 + random.randrange(300)))
    (home / "data/conversations.jsonl").symlink_to(run.ground / "data.jsonl")
    (home / "runs").symlink_to(run.ground)
    bucket, name = run.remote.rsplit("/", 1)
    envs = {
        "HOME": home, "MODEL": run.ground / "model", "BUCKET": bucket, "RUN_NAME": name, "GLOBAL_BATCH": 4, "ARGS": "",
        "SKYPILOT_NODE_IPS": "127.0.0.1", "SKYPILOT_NODE_RANK": 0, "SKYPILOT_NUM_NODES": 1, "SKYPILOT_NUM_GPUS_PER_NODE": 2,
    }  # fmt: skip
    return ["env", *(f"{key}={value}" for key, value in envs.items()), "bash", str(ROOT / "sky_yamls/train.sh"), *flags]


def command(run: chaos.Run, processes: int, restarts: int = 0) -> list[str]:
    """chaos.Run.command, but with processes that share their imports."""
    first_life = run.out.name == "torn" and not run.log()
    target = ["-m", "fastft.train"] if run.out.name == "whole" else [str(run.ground / "slow.py")]
    flags = run.flags()
    if first_life:
        taken = ("--model", "--data", "--output_dir", "--checkpoint.remote", "--global_batch_size")
        pairs = zip(flags[::2], flags[1::2])
        return as_skypilot_does(run, [word for pair in pairs if pair[0] not in taken for word in pair])
    return [sys.executable, str(ROOT / "tests/helpers/ranks.py"), str(processes), *target, *flags]


@pytest.mark.slow
def test_five_preemptions_change_no_bit_and_lose_no_step(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("FASTFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(chaos.Run, "command", command)
    (tmp_path / "slow.py").write_text(SLOW)
    models.make_model(tmp_path / "model")
    models.make_data(tmp_path / "data.jsonl")
    with storage.s3() as line:
        whole = chaos.Run(tmp_path, tmp_path / "whole", None, STEPS)
        torn = chaos.Run(tmp_path, tmp_path / "torn", "s3://runs/torn", STEPS)
        lives = chaos.chaos(whole, torn, line, LIVES, processes=2)
        assert line.cuts > 0
    assert lives[0].code == stopping.EXIT_CODE, "though torchrun itself ended with 1"
    assert (lives[0].held, lives[0].reached - lives[0].held) == (lives[1].resumed, 0), "with notice nothing is lost"
    assert chaos.failures(whole, torn, lives) == []
    assert all(life.rows == whole.curve()[: len(life.rows)] for life in lives)
    assert torn.curve() == whole.curve()
    assert chaos.same_weights(whole, torn)
