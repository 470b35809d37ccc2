"""What is decided before a worker is asked, without any: whose turn it is, what may be asked, and what is counted."""

import asyncio
import json
from pathlib import Path

import pytest
from helpers.gateways import ask

from fastft.errors import UserError
from fastft.serve.announce import reachable_url
from fastft.serve.gateway.app import Gateway, GatewaySettings
from fastft.serve.gateway.pool import FAILURES, PoolWorker, WorkerPool
from fastft.serve.moderation import ModerationSettings
from fastft.serve.worker.service import available_memory

NOWHERE = "http://127.0.0.1:9/v1"  # the discard port, where nobody listens


async def with_gateway(settings: GatewaySettings, *requests: tuple) -> list[tuple[int, str, bytes]]:
    """The answers of a gateway whose one worker, of the model m, cannot be reached."""
    pool = WorkerPool()
    await pool.open()
    pool.add(PoolWorker(NOWHERE, "m", name="m"))
    try:
        gateway = Gateway(pool, settings, {})
        return [await ask(gateway, *request) for request in requests]
    finally:
        await pool.close()


def test_after_a_pause_one_request_is_the_trial_whatever_older_ones_do():
    pool, worker = WorkerPool(), PoolWorker("http://127.0.0.1:9/v1", "m", name="m")
    pool.add(worker)
    older = [pool.pick("m") for _ in range(2)]
    for _ in range(FAILURES):
        worker.paused_until = 0.0
        pool.failed(worker)
    worker.paused_until = 0.0
    assert pool.pick("m") is worker, "the trial"
    pool.give_back(older[0])
    assert pool.pick("m") is None, "the trial still runs"
    pool.succeeded(worker)
    assert pool.pick("m") is worker


def test_every_failed_try_is_counted_the_last_one_too():
    request = ("POST", "/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "hi"}]})
    (status, *_), (*_, metrics) = asyncio.run(with_gateway(GatewaySettings(), request, ("GET", "/metrics")))
    assert status == 503 and b'fastft_gateway_failed_tries_total{outcome="connect"} 1.0' in metrics


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2], [3]], ["a text", [1]]])
def test_token_ids_do_not_pass_a_moderation_that_cannot_read_them(prompt):
    settings = GatewaySettings(moderation=ModerationSettings(f"{NOWHERE}/moderations"))
    request = ("POST", "/v1/completions", {"model": "m", "prompt": prompt})
    [(status, _, body)] = asyncio.run(with_gateway(settings, request))
    assert status == 400 and json.loads(body)["error"]["code"] == "content_unreadable"


def test_a_worker_that_only_its_machine_reaches_is_not_announced_elsewhere():
    with pytest.raises(UserError, match=r"give --host 0\.0\.0\.0"):
        reachable_url("127.0.0.1", 9000, "http://10.0.0.1:8000")
    assert reachable_url("127.0.0.1", 9000, "http://localhost:8000") == "http://127.0.0.1:9000/v1"


@pytest.mark.parametrize(("limit", "left"), [("max", 2048 << 10), (str(3 << 20), 2 << 20), (str(1 << 30), 2048 << 10)])
def test_memory_is_what_the_machine_can_give_and_a_containers_limit_leaves(monkeypatch, limit, left):
    """Pages of files count as available: mapped weights have just filled many."""
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    2048 kB\n",
        "/sys/fs/cgroup/memory.max": f"{limit}\n",
        "/sys/fs/cgroup/memory.current": f"{1 << 20}\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert available_memory() == left
