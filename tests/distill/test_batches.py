"""Batch mode: rows go into batches, a killed run finds its batches again, and nothing is paid twice."""

import os
import signal
import time

import pytest
from helpers import openai_server
from helpers.distilling import distill, kept, ledger, query, rejected, right, rows, settings, start, write_lines
from helpers.openai_batches import BatchStore
from helpers.openai_server import Failure

from fastft.inference import batch


@pytest.fixture
def quick(monkeypatch):
    """Nobody waits a minute for a batch that ends at once."""
    for name, seconds in (("IDLE_S", 0.05), ("FIRST_POLL_S", 0.01), ("LAST_POLL_S", 0.02), ("GRACE_S", 0.2)):
        monkeypatch.setattr(batch, name, seconds)


def test_a_batch_is_written_down_like_other_answers_at_half_the_price(tmp_path, quick):
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(20)] + [{**query(3), "id": "again"}])
    store = BatchStore(polls=2)
    reply = lambda body, number: Failure(400, "no") if "What is 7 " in body["messages"][0]["content"] else right(body)  # noqa: E731
    with openai_server.endpoint(reply, batches=store) as server:
        given = settings(tmp_path, server.url, teacher_usd_per_million=[1000, 1000], verify={"near": 0})
        assert distill(tmp_path, "--batch", **given) == 0
        assert len(store.batches) == 1 and store.paid.total() == 19
        answers = rows(tmp_path / "run/answers.jsonl")
        assert {each["batch"] for each in answers} == {"batch_0"} and len(answers) == 19
        tokens = sum(each["prompt_tokens"] + each["completion_tokens"] for each in answers)
        assert ledger(tmp_path)["usd"] == pytest.approx(tokens / 1000 / 2)
        assert set(rejected(tmp_path)) == {("q7", "first"), ("again", "first")}
        assert distill(tmp_path, **given) == 0, "what is left is asked without a batch"
        assert store.paid.total() == 19 and len(store.batches) == 1
    assert len(kept(tmp_path)) == 19


@pytest.mark.slow
def test_rows_of_an_expired_batch_go_into_the_next_one(tmp_path, quick):
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(20)])
    store = BatchStore(end=lambda number: "completed" if number else "expired")
    with openai_server.endpoint(right, batches=store) as server:
        given = settings(tmp_path, server.url, teacher_mode="batch", verify={"near": 0})
        assert distill(tmp_path, **given) == 0
    assert len(store.batches) == 2 and store.paid.total() == len(store.paid) == 20 == len(kept(tmp_path))


@pytest.mark.slow
def test_a_killed_run_finds_its_batches_and_pays_nothing_twice(tmp_path):
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(50)])
    store = BatchStore(polls=1, end=lambda number: "completed")
    with openai_server.endpoint(right, batches=store) as server:
        given = settings(tmp_path, server.url, teacher_mode="batch", verify={"near": 0})
        store.polls = 10**9
        for _ in range(2):
            process = start(tmp_path, **given)
            while not any(store.looked.values()):
                assert process.poll() is None, (tmp_path / "output.txt").read_text()
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            store.looked.clear()
        store.polls = 1
        assert distill(tmp_path, **given) == 0
    assert len(store.batches) == 1 and store.paid.total() == len(store.paid) == 50
    assert len(kept(tmp_path)) == 50
