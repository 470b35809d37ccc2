"""Five preemptions, each another way, of a real run whose storage cuts its connections; twenty of them, of 2
processes, are in benchmarks/chaos.py.
"""

import sys
from pathlib import Path

import models
import storage

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import chaos

from fastft import stopping

LIVES = [("notice", 2, 1), ("kill", 4, 1), ("save", 1, 1), ("lost", 4, 1), ("upload", 1, 1)]


def test_five_preemptions_change_no_bit_and_lose_no_step(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("FASTFT_CACHE", str(tmp_path / "cache"))
    models.make_model(tmp_path / "model")
    models.make_data(tmp_path / "data.jsonl")
    with storage.s3() as line:
        whole, torn, lives = chaos.chaos(tmp_path, line, LIVES, processes=1, steps=27)
        assert line.cuts > 0
    assert lives[0].code == stopping.EXIT_CODE
    assert (lives[0].held, lives[0].reached - lives[0].held) == (lives[1].resumed, 0), "with notice nothing is lost"
    assert all(later.resumed >= life.held for life, later in zip(lives, lives[1:])), lives
    assert chaos.curve(torn) == chaos.curve(whole)
    assert chaos.same_weights(whole, torn)
