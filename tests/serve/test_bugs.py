"""A bug of ours in a service that the gateway asks is a bug, and not the fault of that service."""

import asyncio
import sqlite3
from concurrent.futures import Future

import pytest
from helpers.bugs import bug

from fastft.serve import moderation
from fastft.serve.arena import battles
from fastft.serve.gateway import pool
from fastft.serve.moderation import Moderation, ModerationSettings
from fastft.serve.protocol import ApiError

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
