"""A bug of ours in a server is told as such: in its log with a request for a report, to clients in OpenAI's shape."""

import asyncio
import json
import sqlite3
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from helpers import gateways, models, tiny
from helpers.bugs import bug
from helpers.gateways import ask
from transformers import AutoModelForCausalLM

from fastft.errors import BUG
from fastft.inference import rows
from fastft.inference.detokenize import AnswerText, TokenBytes
from fastft.inference.rows import StepLoop
from fastft.inference.sampling import Sampling
from fastft.serve import moderation
from fastft.serve.arena import battles
from fastft.serve.gateway import app, events, exchange, pool
from fastft.serve.gateway.app import Gateway, GatewaySettings
from fastft.serve.moderation import Moderation, ModerationSettings
from fastft.serve.protocol import ApiError
from fastft.serve.ready_server import in_background, reporting
from fastft.serve.worker import app as worker_app
from fastft.serve.worker.generation import AnswerJob, Generation

NOWHERE = "http://127.0.0.1:9/v1"


async def ask_moderation() -> dict:
    workers = pool.WorkerPool()
    await workers.open()
    try:
        settings = ModerationSettings(NOWHERE)
        return await Moderation(settings).check(workers.fresh, {"messages": [{"role": "user", "content": "hi"}]})
    finally:
        await workers.close()


async def ask_models() -> list[str] | None:
    workers = pool.WorkerPool()
    await workers.open()
    try:
        return await workers.models_at(pool.PoolWorker(NOWHERE, "m", name="m"))
    finally:
        await workers.close()


def test_an_endpoint_that_is_not_there_is_unreachable():
    assert asyncio.run(ask_moderation()) == {"unreachable": True} and asyncio.run(ask_models()) is None


@pytest.mark.parametrize("fails", ["int('not a number')", "{}['injected']", "len(5)"])
def test_a_bug_in_what_asks_is_not_an_endpoint_that_is_unreachable(monkeypatch, fails):
    monkeypatch.setattr(moderation, "moderation_request", bug(moderation, fails))
    with pytest.raises((ValueError, KeyError, TypeError)):
        asyncio.run(ask_moderation())
    monkeypatch.setattr(pool.PoolWorker, "headers", bug(pool, fails))
    with pytest.raises((ValueError, KeyError, TypeError)):
        asyncio.run(ask_models())


class Record:
    """A record whose votes end with this error."""

    def __init__(self, error: Exception):
        self.error = error

    def add_vote(self, vote: dict) -> Future:
        written: Future = Future()
        written.set_exception(self.error)
        return written


@pytest.mark.parametrize(("error", "told"), [(sqlite3.OperationalError("full"), ApiError), (KeyError("x"), KeyError)])
def test_a_vote_that_a_bug_has_lost_is_no_fault_of_the_disk(error, told):
    battle = battles.Battle(True, {}, [], [])

    async def vote() -> None:
        await battles.Arena(pool.WorkerPool(), Record(error), list)._write(battle, {})

    with pytest.raises(told):
        asyncio.run(vote())
    assert battle.vote is None and battle.written is None


def asks_for_a_report(caplog, bugs: int = 1) -> list[str]:
    """What is logged beside the bugs; each must come with its traceback and a request for a report."""
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [bool(record.exc_info) for record in errors] == [True, False] * bugs
    assert [record.getMessage() for record in errors[1::2]] == [BUG] * bugs
    return [record.getMessage() for record in errors[::2]]


@pytest.fixture(scope="module")
def worker():
    with gateways.scripted("m") as process:
        yield process


async def chat(worker, streamed: bool) -> tuple[int, str, bytes]:
    workers = pool.WorkerPool()
    await workers.open()
    workers.add(pool.PoolWorker(worker.url, "m", name="m"))
    request = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": streamed}
    try:
        return await ask(Gateway(workers, GatewaySettings(), {}), "POST", "/v1/chat/completions", request)
    finally:
        await workers.close()


@pytest.mark.parametrize(
    "method, streamed",
    [*((method, streamed) for method in ("_begin", "_pick", "_ask") for streamed in (False, True)),
     ("_send_piece", True), ("_send_whole", False)],
)  # fmt: skip
def test_a_bug_in_an_exchange_is_answered_in_openais_shape(worker, monkeypatch, caplog, method, streamed):
    monkeypatch.setattr(exchange.Exchange, method, bug(exchange, "None.injected"))
    status, kind, body = asyncio.run(chat(worker, streamed))
    assert (status, kind) == (500, "application/json") and json.loads(body)["error"]["code"] == "internal_error"
    asks_for_a_report(caplog, bugs=2 if method == "_send_whole" else 1)


def test_a_bug_in_the_middle_of_a_stream_ends_it_with_an_error(worker, monkeypatch, caplog):
    monkeypatch.setattr(pool.WorkerPool, "succeeded", bug(pool, "None.injected"))
    status, kind, body = asyncio.run(chat(worker, True))
    assert status == 200 and kind.startswith("text/event-stream")
    *_, error, done = body.decode().strip().split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "internal_error" and done == "data: [DONE]"
    asks_for_a_report(caplog)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/about"])
def test_a_bug_on_any_other_way_is_answered_in_openais_shape(monkeypatch, caplog, path):
    for name in ("able", "_served"):
        monkeypatch.setattr(Gateway, name, bug(app))
    status, kind, body = asyncio.run(ask(Gateway(pool.WorkerPool(), GatewaySettings(), {}), "GET", path))
    assert (status, kind) == (500, "application/json") and json.loads(body)["error"]["code"] == "internal_error"
    assert asks_for_a_report(caplog) == [f"GET {path} failed"]


@pytest.mark.parametrize(("path", "method"), [("/health", "health"), ("/v1/models", "models")])
def test_a_bug_of_the_worker_is_answered_and_logged_in_the_same_way(tiny_model, monkeypatch, caplog, path, method):
    monkeypatch.setattr(worker_app._Handlers, method, bug(worker_app))

    async def asked() -> tuple[int, str, bytes]:
        generation = Generation(StepLoop(tiny_model, [], 512), 8)
        application = worker_app.build_app(SimpleNamespace(dtype="float32"), generation, None, None)
        return await ask(reporting(application), "GET", path)

    status, kind, body = asyncio.run(asked())
    assert (status, kind) == (500, "application/json") and json.loads(body)["error"]["code"] == "internal_error"
    assert asks_for_a_report(caplog) == [f"GET {path} failed"]


def test_a_bug_that_ends_what_runs_beside_the_server_is_logged_at_once(monkeypatch, caplog):
    monkeypatch.setattr(pool.WorkerPool, "check_all", bug(pool))

    async def run() -> None:
        task = in_background(pool.WorkerPool().check_forever())
        await asyncio.wait([task])
        await asyncio.sleep(0)

    asyncio.run(run())
    assert asks_for_a_report(caplog) == ["WorkerPool.check_forever has ended"]


def test_a_vote_that_cannot_be_made_ends_neither_the_record_nor_later_votes(tmp_path):
    log = events.EventLog(tmp_path)
    with pytest.raises(TypeError):
        log.add_vote({"battle": "1", "winner": object()}).result(30)
    assert log.add_vote({"battle": "2", "winner": "a"}).result(30) is None
    log.close()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model"
    models.make_model(path)
    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize("method", ["step", "_read", "_forward", "_next_tokens", "add"])
def test_a_bug_in_the_step_loop_asks_for_a_report_and_the_next_request_is_answered(
    tiny_model, monkeypatch, caplog, method
):
    token_bytes = TokenBytes(tiny.byte_level())

    def job() -> AnswerJob:
        return AnswerJob([[rows.Answering([5, 6, 7], Sampling(temperature=0), 3, AnswerText(token_bytes, ()))]])

    async def run() -> None:
        with monkeypatch.context() as planted:
            planted.setattr(StepLoop, method, bug(rows, "None.injected"))
            generation = Generation(StepLoop(tiny_model, [], 512, max_rows=1), 8)
            asked = [job() for _ in range(2)]
            for each in asked:
                generation.submit(each)
            for each in asked:
                with pytest.raises(ApiError) as error:
                    await each.next(30)
                assert error.value.code == "internal_error"
        after = job()
        generation.submit(after)
        while not after.done:
            assert await after.next(30)

    asyncio.run(run())
    said = asks_for_a_report(caplog, bugs=sum(record.exc_info is not None for record in caplog.records))
    assert said and sum(int(line.split()[0]) for line in said) == 2, said


def test_too_little_memory_is_no_bug(tiny_model, monkeypatch, caplog):
    import torch

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    async def run() -> None:
        generation = Generation(StepLoop(tiny_model, [], 512), 8)
        job = AnswerJob([[rows.Answering([5], Sampling(), 3, AnswerText(TokenBytes(tiny.byte_level()), ()))]])
        generation.submit(job)
        with pytest.raises(ApiError):
            await job.next(30)

    monkeypatch.setattr(StepLoop, "_forward", full)
    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == ["1 answer failed: CUDA out of memory."]
